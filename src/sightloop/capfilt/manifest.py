"""OUT: whose job it is, what of it is done, and proof of that.

    job.json           the settings; another job is refused
    manifest.jsonl     a line for each finished unit, with the checksums of its files and of itself
    quarantine.jsonl   samples that could not be worked on, with the shard that they came from, and why
    000000.tar ...     the new dataset: what `open_dataset(OUT)` and training read
    evidence/          000000.jsonl ...: every text of every image, with scores and verdict

A unit is done when its line is whole and its files are what the line says. Files come first, each whole or absent, then
the line: whoever is killed anywhere has lost at most the unit at hand.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from sightloop.data.atomic import atomic_write, lock_folder, remove_stale_temporaries, sync_folder
from sightloop.data.datasets.schema import json_text
from sightloop.errors import UsageError
from sightloop.types import JsonDict, JsonMapping

_CHECK = "check"
_NAMED = 5  # changed sources in a message


class JournalFile:
    """A file of checksummed JSON lines that grows by whole lines. What a kill tore off goes when it is opened."""

    def __init__(self, path: Path) -> None:
        """entries: what the whole lines say, in order; a damaged line is left out."""
        self.entries: list[JsonDict] = []
        self._path = path
        known = path.exists()
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 (closed by close)
        try:
            self._file.seek(0)
            data = self._file.readall()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                self._file.truncate(whole)
            for line in data[:whole].splitlines():
                if (entry := _checked(line)) is not None:
                    self.entries.append(entry)
            if not known:
                sync_folder(path.parent)
        except BaseException:
            self.close()
            raise

    def add(self, entry: JsonMapping) -> None:
        """One line, on the disk when this returns. Raises OSError; then the file is as it was, or will be."""
        line = _line(entry)
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) != len(line):
                raise OSError(28, os.strerror(28), str(self._path))  # only a full disk takes a part
            os.fsync(self._file.fileno())
        except OSError:
            with suppress(OSError):
                self._file.truncate(end)
            raise
        self.entries.append(dict(entry))

    def settle(self, entries: Iterable[JsonMapping]) -> None:
        """Makes these, in this order, the whole file, if it is not so already; the last thing that is done to it."""
        data = b"".join(_line(entry) for entry in entries)
        self.close()
        if self._path.read_bytes() != data:
            atomic_write(self._path, data)

    def close(self) -> None:
        """Every line is on the disk already."""
        self._file.close()


class Manifest:
    """A job's folder, held by one process at a time. Used through `opened`."""

    def __init__(self, out: Path, job: JsonMapping) -> None:
        """Raises `UsageError` where the folder holds another job, or something else."""
        self.out = out
        _claim(out, job)
        (out / "evidence").mkdir(exist_ok=True)
        self._clean()
        self._manifest = JournalFile(out / "manifest.jsonl")
        try:
            self._quarantine = JournalFile(out / "quarantine.jsonl")
        except BaseException:
            self._manifest.close()
            raise
        self._named = {(e["shard"], e["key"]) for e in self._quarantine.entries}
        self.done: dict[int, JsonDict] = {}

    def verify(self, units: int) -> dict[int, JsonDict]:
        """The units that are done: a line, and both files as it says, byte for byte. The last line of a unit counts."""
        told = {entry.get("unit"): entry for entry in self._manifest.entries}
        for unit in range(units):
            if unit in told and self._is_there(told[unit]):
                self.done[unit] = told[unit]
        return self.done

    def quarantined(self) -> dict[str, str]:
        """Samples that took a whole process with them, twice, and are not touched again."""
        return {e["key"]: e["reason"] for e in self._quarantine.entries if e.get("fatal")}

    def quarantine(self, shard: str, key: str, reason: str) -> None:
        """A sample that is not to be touched again, at once."""
        self._quarantine.add({"shard": shard, "key": key, "reason": reason, "fatal": True})
        self._named.add((shard, key))

    def commit(self, entry: JsonDict) -> None:
        """A unit is done: its files are in place."""
        for shard, key, reason in entry["failed"]:
            if (shard, key) not in self._named:
                self._quarantine.add({"shard": shard, "key": key, "reason": reason})
                self._named.add((shard, key))
        self._manifest.add(entry)
        self.done[entry["unit"]] = entry

    def finish(self) -> None:
        """All units are done: the same lines in the same order, however they came to be."""
        entries = [self.done[unit] for unit in sorted(self.done)]
        fatal = self.quarantined()
        self._quarantine.settle(
            {"shard": shard, "key": key, "reason": reason} | ({"fatal": True} if key in fatal else {})
            for entry in entries
            for shard, key, reason in entry["failed"]
        )
        self._manifest.settle(entries)
        self._clean()  # of workers that died

    def close(self) -> None:
        """Everything is on the disk already."""
        self._manifest.close()
        self._quarantine.close()

    def _clean(self) -> None:
        for folder in (self.out, self.out / "evidence"):
            remove_stale_temporaries(folder)

    def _is_there(self, entry: JsonMapping) -> bool:
        evidence = self.out / "evidence" / f"{entry['unit']:06}.jsonl"
        return _is(self.out / entry["shard"], entry["bytes"], entry["sha256"]) and _is(
            evidence, entry["evidence_bytes"], entry["evidence"]
        )


@contextmanager
def open_manifest(out: Path) -> Generator[None]:
    """Holds OUT, made where it is missing. Raises `UsageError` where another process holds it."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; name a folder")
    used = out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir())
    if used and not (out / "job.json").exists():
        raise UsageError(f"{out} is there already and holds no bootstrap; name another --out")
    out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out, ".lock"):
        yield


def stored_job(out: Path) -> JsonDict:
    """What job.json says; empty where there is none. Raises `UsageError` where it is damaged."""
    path = out / "job.json"
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found["settings"], dict):
            raise ValueError("no settings")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: is not what a bootstrap writes ({error}); name another --out") from error
    return found


def _claim(out: Path, job: JsonMapping) -> None:
    theirs, ours = stored_job(out), json.loads(json.dumps(job))
    differ = _differences(theirs, ours) if theirs else []
    if differ and _has_work(out):
        raise UsageError(
            f"{out} holds a bootstrap with other settings ({'; '.join(differ)}): use those, or name another --out"
        )
    if differ or not theirs:
        atomic_write(out / "job.json", json_text(ours) + "\n")


def _has_work(out: Path) -> bool:
    """Whether a job has come so far that its settings stand."""
    files = (path for folder in (out, out / "evidence") for path in folder.glob("[!.]*") if path.is_file())
    return any(path.name != "job.json" and path.stat().st_size for path in files)


def _differences(theirs: JsonMapping, ours: JsonMapping) -> list[str]:
    """Which settings are not the same, in words."""
    was, now = theirs["settings"], ours["settings"]
    names = [name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name)]
    models = theirs.get("models", {}), ours["models"]
    said: list[str] = []
    for name in names:
        part = name.removesuffix(", prepared")
        if name == "data":
            said.append(f"DATA: {_changes(theirs.get('sources', []), ours['sources'])}")
        elif part != name:
            said += [] if part in names else [f"{part}: its config, preprocessing or tokenizer is another"]
        elif name in models[0] and models[0][name] == models[1].get(name):
            said.append(f"{name}: {models[1][name]} has other weights now")
        else:
            before, after = (m.get(name, s.get(name)) for m, s in zip(models, (was, now), strict=True))
            said.append(f"{name}: {before}, now {after}")
    return said


def _changes(theirs: Sequence[Sequence[str]], ours: Sequence[Sequence[str]]) -> str:
    """Which sources, pairs of a name and a digest, are not what they were."""
    before, after = (Counter((name, digest) for name, digest in each) for each in (theirs, ours))
    gone, new = ({name for name, _ in each} for each in (before - after, after - before))
    said = [f"{name} has changed" for name in sorted(gone & new)]
    said += [f"{name} is gone" for name in sorted(gone - new)] + [
        f"{name} is new" for name in sorted(new - gone)
    ]
    more = [f"and {len(said) - _NAMED} more"] if len(said) > _NAMED else []
    return ", ".join([*said[:_NAMED], *more]) or "other samples of it, or in another order"


def _line(entry: JsonMapping) -> bytes:
    body = json_text(dict(entry))
    return f'{body[:-1]}, "{_CHECK}": "{_checksum(body)}"}}\n'.encode()


def _checked(line: bytes) -> JsonDict | None:
    try:
        entry = json.loads(line)
        check = entry.pop(_CHECK)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None
    return entry if check == _checksum(json_text(entry)) else None


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _is(path: Path, size: int, sha256: str) -> bool:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != size:
                return False
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except OSError:
        return False
