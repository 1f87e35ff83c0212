"""Output folder of a CapFilt run: settings, manifest with checksums, quarantine.

    job.json           the settings; a run with other settings is refused
    manifest.jsonl     a line for each finished shard, with checksums of its files and of the line itself
    quarantine.jsonl   samples that could not be processed: input shard, key, reason
    log.jsonl          seconds for each shard; no part of the result (see `bootstrap`)
    000000.tar ...     the new dataset, read by `open_dataset` and training
    evidence/          000000.jsonl ...: every text of every image, with its scores and whether it is kept

A shard is done when the manifest has its line and its files match the checksums. The files are written first, by
atomic rename, then the line; so a kill costs at most the shard that is being processed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

from sightloop.capfilt.options import RULE
from sightloop.data.atomic import atomic_write, lock_folder, remove_stale_temporaries
from sightloop.data.datasets.schema import json_text
from sightloop.data.journal import Journal, JournalLine
from sightloop.errors import UsageError, os_error_reason
from sightloop.types import JsonDict, JsonMapping

_MAX_CHANGES = 5  # changed input shards named in a message
_MAX_SHOWN = 40  # characters of a wrong value in a message
# Settings that a resumed run takes over.
_MAX_COUNT = 1_000_000
_COUNTS = ("group", "threads")


class Manifest:
    """State of one output folder. Only the holder of `open_manifest` may use it.

    Attributes:
        done: Manifest entries of the shards that are done, by index; filled by `verify` and `commit`.
        outdated: Indices of the shards that are done with another rule and have whole evidence; filled by `verify`.
        damaged: Names of files that differ from their checksums, or are gone; their shards are done again.

    Args:
        out: The output folder.
        job: Content of job.json for this run.
        check_rule: Called with the folder and the rule (`options.RULE`) if the folder has another one; raises
            `UsageError` if the texts cannot be filtered again.

    Raises:
        UsageError: The folder holds a run with other settings.
    """

    def __init__(self, out: Path, job: JsonMapping, check_rule: Callable[[Path, JsonMapping], None]) -> None:
        self.out = out
        self.done: dict[int, JsonDict] = {}
        self.outdated: list[int] = []
        self.damaged: list[str] = []
        self._rule: JsonDict = {name: job["settings"].get(name) for name in RULE}
        self._stored: dict[int, JsonDict] = {}  # the last manifest line of each shard
        self._fatal: dict[str, str] = {}  # key -> reason
        self._quarantined: set[tuple[str, str]] = set()  # (input shard, key)
        _write_job(out, job, lambda: check_rule(out, self._rule))
        (out / "evidence").mkdir(exist_ok=True)
        self._remove_temporaries()
        with ExitStack() as opened:
            self._manifest = Journal(
                out / "manifest.jsonl", self._load_record, checksum=True, sync_every=1, dumps=json_text
            )
            opened.callback(self._manifest.close)
            self._quarantine = Journal(
                out / "quarantine.jsonl", self._load_quarantined, checksum=True, sync_every=1, dumps=json_text
            )
            opened.callback(self._quarantine.close)
            self._opened = opened.pop_all()

    def verify(self, shards: int) -> dict[int, JsonDict]:
        """Entries of the shards that are done: with a manifest line, and files that match it byte for byte."""
        for index in range(shards):
            entry = self._stored.get(index)
            if entry is None:
                continue
            if not self._has_evidence(entry):
                self.damaged.append(f"evidence/{index:06}.jsonl")
            elif entry.get("rule") != self._rule:
                self.outdated.append(index)
            elif _matches(self.out / entry["shard"], entry["bytes"], entry["sha256"]):
                self.done[index] = entry
            else:
                self.damaged.append(str(entry["shard"]))
        return self.done

    def quarantined(self) -> dict[str, str]:
        """Key and reason of the samples that killed a worker twice and are not processed again."""
        return dict(self._fatal)

    def quarantine(self, source: str, key: str, reason: str) -> None:
        """Records, durably, a sample that must not be processed again."""
        self._quarantine.add({"shard": source, "key": key, "reason": reason, "fatal": True})
        self._quarantined.add((source, key))
        self._fatal[key] = reason

    def commit(self, entry: JsonDict) -> None:
        """Records, durably, a shard whose files are in place. `entry`: what `process_shard` returned."""
        for source, key, reason in entry["failed"]:
            if (source, key) not in self._quarantined:
                self._quarantine.add({"shard": source, "key": key, "reason": reason})
                self._quarantined.add((source, key))
        self._manifest.add(entry)
        self.done[entry["unit"]] = entry

    def finish(self) -> None:
        """Sorts manifest and quarantine by shard, so that they are the same whatever the order of the work."""
        entries = [self.done[index] for index in sorted(self.done)]
        self._quarantine.finish(
            {"shard": source, "key": key, "reason": reason} | ({"fatal": True} if key in self._fatal else {})
            for entry in entries
            for source, key, reason in entry["failed"]
        )
        self._manifest.finish(entries)
        self._remove_temporaries()  # of killed workers

    def close(self) -> None:
        """Closes the files; every committed line is on the disk already."""
        self._opened.close()

    def _load_record(self, line: JournalLine) -> None:
        unit = None if line.entry is None else line.entry.get("unit")
        if line.entry is not None and isinstance(unit, int):
            self._stored[unit] = line.entry
        else:  # its shard is done again
            self.damaged.append("manifest.jsonl")

    def _load_quarantined(self, line: JournalLine) -> None:
        if line.entry is not None:
            source, key = line.entry["shard"], line.entry["key"]
            self._quarantined.add((source, key))
            if line.entry.get("fatal"):
                self._fatal[key] = line.entry["reason"]

    def _remove_temporaries(self) -> None:
        for folder in (self.out, self.out / "evidence"):
            remove_stale_temporaries(folder)

    def _has_evidence(self, entry: JsonMapping) -> bool:
        evidence = self.out / "evidence" / f"{entry['unit']:06}.jsonl"
        return _matches(evidence, entry["evidence_bytes"], entry["evidence"])


@contextmanager
def open_manifest(out: Path) -> Generator[None]:
    """Holds the output folder, which is created if missing.

    Raises `UsageError` if another process holds it, or if it holds something else than a CapFilt run.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; name a folder")
    has_files = out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir())
    if has_files and not (out / "job.json").exists():
        raise UsageError(f"{out} exists already and holds no bootstrap; name another --out")
    out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out, ".lock"):
        yield


def stored_job(out: Path) -> JsonDict:
    """Content of job.json; empty if there is none. Raises `UsageError` if it is damaged."""
    path = out / "job.json"
    if not path.exists():
        return {}
    if not path.is_file():  # reading a FIFO would not end
        raise UsageError(f"{path} is no regular file; name another --out")
    try:
        job = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {os_error_reason(error)}; name another --out") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON, so it is no bootstrap's; name another --out") from error
    if wrong := _wrong_field(job):
        raise UsageError(f"{path}: {wrong}, which no bootstrap writes; mend it, or name another --out")
    return job


def _wrong_field(job: object) -> str:
    """The first field of job.json whose type is wrong, in words; "" if all are right."""
    if not isinstance(job, dict):
        return "its content is no JSON object"
    fields = cast(JsonDict, job)
    if not isinstance(fields.get("settings"), dict):
        return '"settings" is missing or no object'
    for name, value in fields["settings"].items():
        if name in _COUNTS and value is not None and (type(value) is not int or not 1 <= value <= _MAX_COUNT):
            shown = json.dumps(value)[:_MAX_SHOWN]
            return f'"settings": "{name}" is {shown}, and must be a whole number from 1 to {_MAX_COUNT:,}'
    models = fields.get("models", {})
    if not isinstance(models, dict) or not all(isinstance(name, str) for name in models.values()):
        return '"models" is no object of texts'
    sources = fields.get("sources", [])
    if not isinstance(sources, list) or not all(_is_source(source) for source in sources):
        return '"sources" is no list of pairs of texts'
    return ""


def _is_source(source: object) -> bool:
    """Whether this is a pair of a name and a digest."""
    return isinstance(source, list) and [type(each) for each in cast("list[object]", source)] == [str, str]


def _write_job(out: Path, job: JsonMapping, check_rule: Callable[[], None]) -> None:
    """Writes job.json. Raises `UsageError` if the folder holds results of a run with other settings than the rule."""
    stored, current = stored_job(out), json.loads(json.dumps(job))
    differences = _differences(stored, current) if stored else []
    if differences and _has_results(out):
        if all(difference.partition(":")[0] in RULE for difference in differences):
            check_rule()
            atomic_write(out / "job.json", json_text(current) + "\n")
            return
        raise UsageError(
            f"{out} holds a bootstrap with other settings ({'; '.join(differences)}): use those, or name another "
            "--out"
        )
    if differences or not stored:
        atomic_write(out / "job.json", json_text(current) + "\n")


def _has_results(out: Path) -> bool:
    """Whether the folder has any non-empty file but job.json."""
    files = (path for folder in (out, out / "evidence") for path in folder.glob("[!.]*") if path.is_file())
    return any(path.name != "job.json" and path.stat().st_size for path in files)


def _differences(stored: JsonMapping, current: JsonMapping) -> list[str]:
    """The settings that differ, in words for people."""
    before, after = stored["settings"], current["settings"]
    names = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    models_before, models_after = stored.get("models", {}), current["models"]
    differences: list[str] = []
    for name in names:
        role = name.removesuffix(", prepared")
        if name == "data":
            differences.append(f"DATA: {_source_changes(stored.get('sources', []), current['sources'])}")
        elif role != name:
            if role not in names:
                differences.append(f"{role}: its config, preprocessing or tokenizer is another")
        elif name in models_before and models_before[name] == models_after.get(name):
            differences.append(f"{name}: {models_after[name]} has other weights now")
        else:
            value_before = models_before.get(name, before.get(name))
            value_after = models_after.get(name, after.get(name))
            differences.append(f"{name}: {value_before}, now {value_after}")
    return differences


def _source_changes(before: Sequence[Sequence[str]], after: Sequence[Sequence[str]]) -> str:
    """The input shards, pairs of name and digest, that changed; in words for people."""
    counts_before, counts_after = (
        Counter((name, digest) for name, digest in pairs) for pairs in (before, after)
    )
    gone = {name for name, _ in counts_before - counts_after}
    new = {name for name, _ in counts_after - counts_before}
    changes = [f"{name} has changed" for name in sorted(gone & new)]
    changes += [f"{name} is gone" for name in sorted(gone - new)]
    changes += [f"{name} is new" for name in sorted(new - gone)]
    more = [f"and {len(changes) - _MAX_CHANGES} more"] if len(changes) > _MAX_CHANGES else []
    return ", ".join([*changes[:_MAX_CHANGES], *more]) or "other samples of it, or in another order"


def _matches(path: Path, size: int, sha256: str) -> bool:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != size:
                return False
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except OSError:
        return False
