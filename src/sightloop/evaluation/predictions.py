"""predictions.jsonl: what a model gave, a line at a time as it comes, whole after a kill, scored again at any time.

The first line says whose predictions these are; each other line belongs to a sample: {"key": ..., "caption": ...}.
Lines of one key add up. Files of other programs may leave the first line out.
"""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sightloop.data.atomic import try_lock
from sightloop.errors import UsageError
from sightloop.types import JsonDict, JsonMapping

Records: TypeAlias = "dict[str, JsonDict]"

MARK = "predictions"
_SYNC_EVERY = 64  # lines
# What must be the same, and what it is called where it is not.
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


def check_compatible(found: JsonMapping, wanted: JsonMapping, path: Path, remedy: str = "") -> None:
    """Raises UsageError in plain words where a file's first line says something else than what is wanted."""
    for name, words in _MUST_AGREE.items():
        if name in found and name in wanted and found[name] != _plain(wanted[name]):
            about = f"{found[name]}; now {wanted[name]}"
            if name == "settings":
                about = _difference(found[name], _plain(wanted[name]))
            elif owner := {"weights": "model", "data_fingerprint": "data"}.get(name):
                about = f"{found.get(owner)}, {found[name]}; now {wanted.get(owner)}, {wanted[name]}"
            raise UsageError(
                f"{path} holds predictions of {words} ({about}): use what it was made with{remedy}."
            )


def packed(values: NDArray[Any]) -> str:
    """float32 or int32 numbers as text, exactly (base64 of their little-endian bytes)."""
    kind = "<f4" if np.issubdtype(values.dtype, np.floating) else "<i4"
    return base64.b64encode(np.ascontiguousarray(values, kind).tobytes()).decode()


def floats(text: str) -> NDArray[np.float32]:
    """What `packed` made of float32."""
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)


def integers(text: str) -> NDArray[np.int64]:
    """What `packed` made of integers."""
    return np.frombuffer(base64.b64decode(text), "<i4").astype(np.int64)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _difference(found: Any, wanted: Any) -> str:
    names = sorted(found.keys() | wanted.keys()) if isinstance(found, dict) else []
    return "; ".join(
        f"{name}: {found.get(name)}, now {wanted.get(name)}"
        for name in names
        if found.get(name) != wanted.get(name)
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
    if not try_lock(file):
        raise UsageError(f"{path}: another run is writing this file now; wait for its end.")
