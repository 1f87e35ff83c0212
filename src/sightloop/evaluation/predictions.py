"""predictions.jsonl: the predictions of one model, appended line by line, complete after a kill, scored at any time.

    {"sightloop": "predictions", "task": "captions", "weights": "3f...", "settings": {...}, ...}
    {"key": "000001", "caption": "a dog runs"}
    {"key": "000002", "failed": "cannot be decoded"}

The first line is the header: task, model, data and settings. Each other line belongs to a sample; lines with the same
key are merged. Files of other programs may omit the header.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sightloop.data.journal import Journal, JournalLine, read_journal
from sightloop.data.json_members import parse_strict
from sightloop.errors import SightloopError, UsageError
from sightloop.types import Floats32, Integers, JsonDict, JsonMapping

Records: TypeAlias = "dict[str, JsonDict]"  # key of a sample -> its fields

MARK = "predictions"
_SYNC_EVERY = 64  # lines
# Header fields that must agree, and what a file with another value holds.
_MUST_AGREE = {
    "task": "another task",
    "weights": "another model",
    "prepared": "the model with another config, preprocessing or tokenizer",
    "precision": "the model in another precision",
    "data_fingerprint": "other data",
    "settings": "other settings",
}


class PredictionFile:
    """The predictions so far, and the file that they go to. path None: they stay in memory."""

    def __init__(self, path: Path | None, header: JsonMapping) -> None:
        """Begins the file, or appends after its last whole line.

        Raises UsageError where it holds predictions of another model, data or settings, is no such file, or another
        run is writing it.
        """
        self.records: Records = {}
        self._journal: Journal | None = None
        if path is None:
            return
        stored: JsonDict = {}
        self._journal = Journal(
            path, lambda line: _load_line(line, stored, self.records, path), sync_every=_SYNC_EVERY
        )
        try:
            if stored or self.records:
                check_compatible(
                    stored, header, path, ", or name another folder with --out, or remove the file"
                )
            else:
                self._journal.add(header)
        except BaseException:
            self._journal.close()
            raise

    def add(self, key: str, fields: JsonMapping) -> None:
        """One sample's line, handed to the system at once; on the disk after some lines, and at `close`."""
        self.records.setdefault(key, {}).update(fields)
        if self._journal is not None:
            self._journal.add({"key": key, **fields})

    def close(self) -> None:
        """Put everything on the disk."""
        if self._journal is not None:
            self._journal.close()


def read_predictions(path: Path) -> tuple[JsonDict, Records]:
    """The first line (empty where the file has none) and the predictions by key.

    A last line without newline counts if it is complete.

    Raises UsageError that names the line which is damaged, has a value of the wrong type, or repeats a prediction.
    """
    header: JsonDict = {}
    records: Records = {}
    try:
        for line in _all_lines(path):
            key = line.entry.get("key") if line.entry is not None else None
            before = set(records.get(key, ())) if isinstance(key, str) else set[str]()
            fields = {} if line.entry is None or not isinstance(key, str) else dict(line.entry)
            _load_line(line, header, records, path)
            _check_fields(fields, before, f"{path}, line {line.number}")
    except OSError as error:
        raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    return header, records


def _all_lines(path: Path) -> Iterator[JournalLine]:
    """The lines of a journal, and a last one without newline."""
    number, end = 0, 0
    for line in read_journal(path):
        number, end = line.number, line.end
        yield line
    with path.open("rb") as file:
        file.seek(end)
        rest = file.read()
    if rest.strip():
        try:
            entry = parse_strict(rest)
        except (ValueError, RecursionError):
            entry = None
        yield JournalLine(number + 1, end, end + len(rest), entry if isinstance(entry, dict) else None)


def _check_fields(fields: JsonMapping, before: Collection[str], where: str) -> None:
    """Raises UsageError for a value of the wrong type, and for a field that an earlier line of the key has."""
    for name, value in fields.items():
        if name in before:
            raise UsageError(f"{where}: a second {name} of {fields['key']!r}; remove one of the two lines")
        kind = _KINDS.get(name)
        if kind is not None and not kind.holds(value):
            shown = json.dumps(value)
            raise UsageError(
                f"{where}: {name} must be {kind.noun}, but it is {shown[:60]}; mend the line or remove it"
            )


def check_finite(key: str, fields: JsonMapping, precision: str) -> None:
    """Raises SightloopError if a model's prediction holds NaN or an infinite number.

    Args:
        key: of the sample.
        fields: the prediction.
        precision: dtype of the model, for the remedy.
    """
    numbers = [
        floats(v) if name in _PACKED_FLOATS and isinstance(v, str) else v for name, v in fields.items()
    ]
    if not all(_is_finite(value) for value in numbers):
        dtype = "bfloat16 or float32" if precision == "float16" else "float32"
        raise SightloopError(
            f"{key}: the model's output is not a finite number in {precision}; try --dtype {dtype}; if it stays so, "
            "the weights are damaged"
        )


def _is_finite(value: object) -> bool:
    if isinstance(value, np.ndarray):
        return bool(np.isfinite(value).all())
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_list_of(holds: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(holds, value))


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _is_label(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_text(value[0]) and _is_number(value[1])


def _is_ranking(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_is_label, value))


class _Kind(NamedTuple):
    """What a field of a prediction holds."""

    noun: str
    holds: Callable[[object], bool]


_PACKED_FLOATS = ("image", "texts", "logits")
_TEXT = _Kind("text", _is_text)
_KINDS = {
    "caption": _TEXT,
    "failed": _TEXT,
    **dict.fromkeys((*_PACKED_FLOATS, "judged"), _TEXT),
    "answers": _Kind("a list of texts", _is_list_of(_is_text)),
    "cosines": _Kind("a list of two numbers", _is_pair),
    "scores": _Kind("a list of lists of numbers", _is_list_of(_is_list_of(_is_number))),
    "top": _Kind("a list of at least one [label, probability]", _is_ranking),
    "regions": _Kind("a list of objects", _is_list_of(lambda value: isinstance(value, dict))),
}


def check_compatible(header: JsonMapping, expected: JsonMapping, path: Path, remedy: str = "") -> None:
    """Raises UsageError if the header of the file `path` differs from what is expected; `remedy` ends the message."""
    for name, content in _MUST_AGREE.items():
        if name in header and name in expected and header[name] != _as_json(expected[name]):
            difference = f"{header[name]}; now {expected[name]}"
            if name == "settings":
                difference = _settings_difference(header[name], _as_json(expected[name]))
            elif owner := {"weights": "model", "data_fingerprint": "data"}.get(name):
                difference = (
                    f"{header.get(owner)}, {header[name]}; now {expected.get(owner)}, {expected[name]}"
                )
            raise UsageError(
                f"{path} holds predictions of {content} ({difference}): use what it was made with{remedy}."
            )


def packed(values: NDArray[np.generic]) -> str:
    """float32 or int32 values `[...]` as text, exact: base64 of their little-endian bytes."""
    dtype = "<f4" if np.issubdtype(values.dtype, np.floating) else "<i4"
    return base64.b64encode(np.ascontiguousarray(values, dtype).tobytes()).decode()


def floats(text: str) -> Floats32:
    """The float32 values that `packed` encoded, flat `[n]`."""
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)


def integers(text: str) -> Integers:
    """The integers that `packed` encoded, flat `[n]`."""
    return np.frombuffer(base64.b64decode(text), "<i4").astype(np.int64)


def _as_json(value: object) -> Any:
    """The value as it is after being written and read: tuples become lists."""
    return json.loads(json.dumps(value))


def _settings_difference(settings: Any, expected: Any) -> str:
    names = sorted(settings.keys() | expected.keys()) if isinstance(settings, dict) else []
    return "; ".join(
        f"{name}: {settings.get(name)}, now {expected.get(name)}"
        for name in names
        if settings.get(name) != expected.get(name)
    )


def _load_line(line: JournalLine, header: JsonDict, records: Records, path: Path) -> None:
    """Adds a line to the header or the records. Raises UsageError for a line that belongs to neither."""
    entry = line.entry
    if entry is not None and line.number == 1 and MARK in str(entry.get("sightloop", "")):
        header.update(entry)
    elif entry is not None and isinstance(entry.get("key"), str):
        records.setdefault(entry.pop("key"), {}).update(entry)
    else:
        raise UsageError(
            f'{path}, line {line.number}: no JSON object with a "key", or a name occurs twice; mend the line or '
            "remove it"
        )
