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
import os
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sightloop.data.atomic import lock
from sightloop.errors import UsageError
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
        """Begins the file, or goes on behind its last whole line.

        Raises UsageError where it holds predictions of another model, data or settings, is no such file, or another
        run is writing it.
        """
        self.records: Records = {}
        self._file: IO[bytes] | None = None
        self._unsynced = 0
        if path is None:
            return
        self._file = open(path, "a+b")  # noqa: SIM115 (closed by close)
        try:
            _lock(self._file, path)
            found, self.records, end = _parsed(self._file, path)
            self._file.truncate(end)
            if end == 0:
                self._write(dict(header))
            else:
                check_compatible(
                    found, header, path, ", or name another folder with --out, or remove the file"
                )
        except BaseException:
            self._file.close()
            raise

    def add(self, key: str, fields: JsonMapping) -> None:
        """One sample's line, handed to the system at once; on the disk after some lines, and at `close`."""
        self.records.setdefault(key, {}).update(fields)
        self._write({"key": key, **fields})

    def close(self) -> None:
        """Put everything on the disk."""
        if self._file is not None and not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def _write(self, line: JsonMapping) -> None:
        if self._file is None:
            return
        self._file.write((json.dumps(line) + "\n").encode())
        self._file.flush()
        self._unsynced += 1
        if self._unsynced >= _SYNC_EVERY:
            os.fsync(self._file.fileno())
            self._unsynced = 0


def read_predictions(path: Path) -> tuple[JsonDict, Records]:
    """The first line (empty where the file has none) and the predictions by key; a torn last line is left out.

    Raises UsageError that names the line which is damaged.
    """
    try:
        with path.open("rb") as file:
            header, records, _ = _parsed(file, path)
    except OSError as error:
        raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    return header, records


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


def _parsed(file: IO[bytes], path: Path) -> tuple[JsonDict, Records, int]:
    """The first line, the records, and where the last whole line ends."""
    header: JsonDict = {}
    records: Records = {}
    end = 0
    file.seek(0)
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict) and number == 1 and MARK in entry.get("sightloop", ""):
            header = entry
        elif isinstance(entry, dict) and isinstance(entry.get("key"), str):
            records.setdefault(entry.pop("key"), {}).update(entry)
        else:
            raise UsageError(
                f'{path}, line {number}: no JSON object with a "key"; mend the line or remove it'
            )
        end += len(line)
    return header, records, end


def _lock(file: IO[bytes], path: Path) -> None:
    if not lock(file):
        raise UsageError(f"{path}: another run is writing this file now; wait for its end.")
