"""Append-only journals of JSON lines: one writer, and a kill costs at most the line that is being written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from sightloop.data.atomic import (
    atomic_path,
    atomic_write,
    check_regular,
    name_disk_errors,
    sync_folder,
    try_lock,
)
from sightloop.data.json_members import parse_strict
from sightloop.errors import UsageError
from sightloop.types import JsonDict, JsonMapping

_CHECK = b', "check": "'  # between an entry and its checksum, the last member of its line


class JournalLine(NamedTuple):
    """One whole line of a journal.

    Attributes:
        number: From 1.
        start: Offset of its first byte.
        end: Offset behind its newline.
        entry: Its JSON object; None if the line is no JSON object, its checksum does not match, or a name occurs twice.
    """

    number: int
    start: int
    end: int
    entry: JsonDict | None


def read_journal(path: Path, *, checksum: bool = False) -> Iterator[JournalLine]:
    """Yields the whole lines of a journal, damaged ones too; a last line without a newline is left out.

    Safe while another process writes. Raises OSError if the file cannot be read.
    """
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            start, end = end, end + len(line)
            yield JournalLine(number, start, end, _decode(line, checksum))


def write_journal(
    path: Path, entries: Iterable[JsonMapping], *, dumps: Callable[[JsonMapping], str] = json.dumps
) -> None:
    """Writes a whole journal without checksums by atomic rename; `entries` may still be read from `path`."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.writelines(_encode(entry, dumps, checksum=False) for entry in entries)


class Journal:
    """Append-only file of JSON objects, one a line, for one writer.

    Every line goes to the operating system when it is added, so a killed process loses none; a power cut may lose
    those since the last fsync. Opening repairs the tail: a last line without a newline is cut off, and so is one
    that does not parse, unless it is the only one (then the file is probably no journal).

    Args:
        path: The file; created if missing, in a folder that exists.
        load: Called with each whole line in order. It may raise to refuse the file, which then stays as it is.
        checksum: Each line ends in `"check"`: 16 hexadecimal digits of the SHA-256 of the entry's JSON.
        sync_every: Lines between two fsyncs; 1 makes each `add` durable, 0 leaves it to `sync`.
        dumps: Encoder of one entry to JSON text on one line.

    Raises:
        UsageError: Another process has the journal open for writing (where the file system has locks).
        OSError: The file cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        load: Callable[[JournalLine], None],
        *,
        checksum: bool = False,
        sync_every: int = 0,
        dumps: Callable[[JsonMapping], str] = json.dumps,
    ) -> None:
        self.path = path
        self._checksum = checksum
        self._sync_every = sync_every
        self._dumps = dumps
        self._unsynced = 0
        self._reader: IO[bytes] | None = None
        check_regular(path)  # reading a named pipe would not end
        is_new = not path.exists()
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 (closed by close)
        try:
            if not try_lock(self._file):
                raise UsageError(f"{path}: another run is writing this file; wait for it to end")
            self._load(load)
            if is_new:
                sync_folder(path.parent)
        except BaseException:
            self._file.close()
            raise

    def _load(self, load: Callable[[JournalLine], None]) -> None:
        """Passes every whole line to `load`, then cuts off the torn tail."""
        size, end = os.fstat(self._file.fileno()).st_size, 0
        for line in read_journal(self.path, checksum=self._checksum):
            if line.entry is None and line.number > 1 and line.end == size:
                break
            load(line)
            end = line.end
        if end < size:
            self._file.truncate(end)

    def add(self, entry: JsonMapping) -> int:
        """Appends one line and returns its offset in bytes. Raises OSError; then the line is not in the file."""
        line = _encode(entry, self._dumps, self._checksum)
        start = self._file.seek(0, os.SEEK_END)
        unsynced = self._unsynced + 1
        try:
            with name_disk_errors(self.path):
                if self._file.write(line) != len(line):  # only a full disk takes a part
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if unsynced == self._sync_every:
                    os.fsync(self._file.fileno())
                    unsynced = 0
        except OSError:
            with suppress(OSError):
                self._file.truncate(start)
            raise
        self._unsynced = unsynced
        return start

    @property
    def closed(self) -> bool:
        """Whether it was closed, finished or removed."""
        return self._file.closed

    def sync(self) -> None:
        """Forces all lines so far onto the disk (fsync)."""
        with name_disk_errors(self.path):
            os.fsync(self._file.fileno())
        self._unsynced = 0

    def read(self, start: int) -> JsonDict:
        """The entry whose line starts at this offset, as `add` returned it."""
        if self._reader is None:
            self._reader = self.path.open("rb")
        self._reader.seek(start)
        entry = _decode(self._reader.readline(), self._checksum)
        if entry is None:
            raise ValueError(f"{self.path}: no entry at byte {start}")
        return entry

    def clear(self) -> None:
        """Removes all lines."""
        self._close_reader()  # its buffer holds what was cut
        self._file.truncate(0)

    def finish(self, entries: Iterable[JsonMapping]) -> None:
        """Closes the journal and makes these entries its whole content by atomic rename, unless they are already."""
        data = b"".join(_encode(entry, self._dumps, self._checksum) for entry in entries)
        self.close()
        if self.path.read_bytes() != data:
            atomic_write(self.path, data)

    def remove(self) -> None:
        """Closes and deletes the journal: its content is somewhere else."""
        self._close_reader()
        self._file.close()
        self.path.unlink()

    def close(self) -> None:
        """Closes the file, after an fsync where `sync_every` asks for some. May be called again."""
        self._close_reader()
        if not self._file.closed:
            try:
                if self._sync_every and self._unsynced:
                    self.sync()
            finally:
                self._file.close()

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def _encode(entry: JsonMapping, dumps: Callable[[JsonMapping], str], checksum: bool) -> bytes:
    text = dumps(entry).encode()
    return (_add_checksum(text) if checksum else text) + b"\n"


def _decode(line: bytes, checksum: bool) -> JsonDict | None:
    if checksum:
        text = line.rpartition(_CHECK)[0] + b"}"
        if _add_checksum(text) + b"\n" != line:
            return None
        line = text
    try:
        entry = parse_strict(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _add_checksum(text: bytes) -> bytes:
    """`{"a": 1}` -> `{"a": 1, "check": "<16 hexadecimal digits>"}`."""
    digits = hashlib.sha256(text).hexdigest()[:16].encode()
    return text[:-1] + _CHECK + digits + b'"}'
