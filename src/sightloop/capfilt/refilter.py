"""Filtering again with another rule: the texts of a shard are kept or dropped by the scores in its evidence.

No model is loaded and no image is decoded. The result is that of a run with the new rule, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from sightloop.capfilt.filtering import DECIDED_BY_SCORE, CandidateText, decide
from sightloop.capfilt.options import CapFiltOptions
from sightloop.capfilt.records import ShardItem
from sightloop.capfilt.shard import Job, load_item, write_shard
from sightloop.errors import UsageError
from sightloop.types import JsonDict, JsonMapping


def refilter_shard(job: Job, index: int) -> JsonDict:
    """Writes a finished shard again, with the texts that the job's rule keeps.

    Args:
        job: The job, with the new rule.
        index: Number of the shard, whose evidence is as its run wrote it.

    Returns:
        The shard's new manifest entry.
    """
    lines = _evidence(job.evidence_path(index))
    return write_shard(job, index, _decided_items(job, index, lines))


def check_scores(out: Path, rule: JsonMapping) -> None:
    """Checks that the evidence has the scores that a rule needs.

    Args:
        out: The output folder.
        rule: Fields of `CapFiltOptions.rule`.

    Raises:
        UsageError: They were not computed.
    """
    field = "itc" if rule["keep"] == "top-k-itc" else "itm"
    for path in sorted((out / "evidence").glob("[!.]*.jsonl")):
        for line in _whole_lines(path):
            if line.get("reason") in DECIDED_BY_SCORE:  # the scores of all texts come from the same models
                if line.get(field) is None:
                    raise UsageError(
                        f"{out}: keep={rule['keep']!r} needs the {field.upper()} score of every text, which this "
                        "bootstrap did not compute; name another --out"
                    )
                return


def _decided_items(job: Job, index: int, lines: Sequence[JsonMapping]) -> Iterator[ShardItem]:
    """The samples of a shard, with their texts decided by the job's rule."""
    of_key: dict[str, list[JsonMapping]] = {}
    for line in lines:
        of_key.setdefault(str(line["key"]), []).append(line)
    failed = {key: str(texts[0]["failed"]) for key, texts in of_key.items() if "failed" in texts[0]}
    for sample in range(*job.shards[index]):
        item = load_item(job.dataset, sample, failed)
        if not item.reason:
            item.texts = [_text(line) for line in of_key.get(item.key, [])]
            _decide_again(item.texts, job.options)
        yield item


def _decide_again(texts: Sequence[CandidateText], options: CapFiltOptions) -> None:
    decide([text for text in texts if text.reason in DECIDED_BY_SCORE], options)


def _text(line: Mapping[str, object]) -> CandidateText:
    """The text of a line of evidence, with its scores."""
    itm, itc = (score if isinstance(score, float | int) else None for score in (line["itm"], line["itc"]))
    source = "synthetic" if line["source"] == "synthetic" else "web"
    text = CandidateText(source, str(line["text"]), itm, itc, line["verdict"] == "kept", str(line["reason"]))
    turn, attributes = line.get("turn"), line.get("attributes")
    if isinstance(turn, int) and isinstance(attributes, dict):
        text.turn, text.attributes = turn, attributes
    return text


def _whole_lines(path: Path) -> Iterator[JsonDict]:
    """The lines of a file whose checksum is not compared yet, without damaged ones."""
    for line in path.read_bytes().splitlines():
        with suppress(ValueError, RecursionError):
            if isinstance(entry := json.loads(line), dict):
                yield entry


def _evidence(path: Path) -> list[JsonDict]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
