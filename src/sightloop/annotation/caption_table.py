"""Captions of many images in one file, .jsonl or .csv: a journal while the run goes on, the whole file at its end."""

from __future__ import annotations

import csv
import json
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

from sightloop.annotation.captioning import Caption
from sightloop.data.atomic import atomic_path, remove_stale_temporaries, try_lock
from sightloop.data.datasets.schema import portable_name
from sightloop.errors import SightloopError, UsageError
from sightloop.types import Failed, JsonDict, JsonMapping, Skipped

_Row = JsonDict
_BOM = b"\xef\xbb\xbf"


class CaptionTable:
    """A table with the columns name, caption and, where captions are judged, match.

    While the run goes on, rows go to the journal `FILE.partial`, and each `commit` puts them on the disk; `finish`
    writes FILE whole, in the order of the inputs, and removes the journal. A run after a kill goes on behind the
    last whole line of the journal. In mode "skip", the rows that FILE has stay as they are, columns added by hand
    too; rows of images that are not among the inputs come first. In mode "overwrite" FILE is begun anew; its
    journal is taken up only by a run with the same `settings`.
    """

    def __init__(
        self,
        path: Path,
        mode: Literal["skip", "overwrite"] = "skip",
        settings: JsonMapping | None = None,
    ) -> None:
        """Opens the journal. Raises `UsageError` where FILE cannot be read or written, or another run is writing it."""
        self.path = path
        self.journal_path = path.with_name(path.name + ".partial")
        self._check_place()
        self._mode = mode
        self._stamp = _stamp(path)
        before = _rows_by_name(path) if mode == "skip" and path.exists() else {}
        try:
            self._journal: IO[bytes] = open(self.journal_path, "a+b")  # noqa: SIM115 (closed by finish and close)
        except OSError as error:
            raise UsageError(f"--out: {self.journal_path} cannot be written: {error.strerror}.") from error
        self._lock()
        remove_stale_temporaries(path.parent)
        self._end = 0
        self._known = self._recover({"mode": mode, **(settings or {})})
        self._worth_keeping = bool(self._known)  # captions that FILE does not have
        self._changed = self._worth_keeping or not path.exists() or mode == "overwrite"
        for name, rows in before.items():  # what a person may have edited stands above what a killed run left
            self._known[name] = self._append({"name": name, "rows": rows})
        self._order = array("q")  # where in the journal each image's line starts, in the order of the inputs
        self._used: set[str] = set()

    def check(self, picture: str) -> Skipped | Failed | None:
        """Before the image is read: `Skipped` where its row is there already."""
        return Skipped(picture, "it has a row already") if portable_name(picture) in self._known else None

    def keep(self, picture: str, caption: Caption) -> Skipped | Failed | None:
        """Adds one line to the journal; a dropped caption is noted there and stays out of FILE."""
        name = portable_name(picture)
        row: _Row = {"name": name, "caption": caption.text}
        if caption.score is not None:
            row["match"] = round(caption.score, 6)
        self._order.append(self._append({"name": name, "rows": [] if caption.dropped else [row]}))
        self._changed = self._worth_keeping = True
        return None

    def skipped(self, picture: str) -> None:
        """Takes the row that was there already to its place among the inputs."""
        name = portable_name(picture)
        if name in self._known and name not in self._used:
            self._used.add(name)
            self._order.append(self._known[name])

    def commit(self) -> None:
        """Puts the lines so far on the disk."""
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def finish(self) -> None:
        """Writes FILE and removes the journal. Raises `SightloopError` where FILE was changed by others meanwhile."""
        self.commit()
        if self._mode == "skip" and _stamp(self.path) != self._stamp:
            raise SightloopError(
                f"{self.path} was changed during the run, so it was left as it is. The new captions are in "
                f"{self.journal_path.name}: run the same command again to put them together."
            )
        if self._changed:
            with atomic_path(self.path) as temporary:
                if self.path.suffix.lower() == ".csv":
                    self._write_csv(temporary)
                else:
                    with temporary.open("wb") as file:
                        file.writelines(_json_line(row) for row in self._rows())
        self._journal.close()
        self.journal_path.unlink()

    def close(self) -> None:
        """Leaves the journal for the next run, if there is anything in it; nothing to do after `finish`."""
        if not self._journal.closed:
            self.commit()
            self._journal.close()
            if not self._worth_keeping:
                self.journal_path.unlink()

    def _check_place(self) -> None:
        if self.path.suffix.lower() not in (".jsonl", ".csv"):
            raise UsageError(f"--out {self.path}: the file must end in .jsonl or .csv.")
        if self.path.is_dir():
            raise UsageError(f"--out {self.path}: this is a folder; name a file.")
        if not self.path.parent.is_dir():
            raise UsageError(
                f"--out {self.path}: the folder {self.path.parent} does not exist; make it first."
            )

    def _lock(self) -> None:
        if not try_lock(self._journal):
            self._journal.close()
            raise UsageError(f"--out {self.path}: another run is writing this file now.")

    def _recover(self, settings: _Row) -> dict[str, int]:
        """Where the line of each image starts in the journal; a torn last line is cut off."""
        known: dict[str, int] = {}
        settings = json.loads(json.dumps(settings, default=str))
        self._journal.seek(0)
        for line in self._journal:
            if not line.endswith(b"\n"):
                break
            entry = _parsed(line)
            if entry is None or (self._end == 0) != ("settings" in entry):
                self._journal.close()
                raise UsageError(f"{self.journal_path} is not the journal of a run: move it elsewhere.")
            if self._end == 0 and settings["mode"] == "overwrite" and entry["settings"] != settings:
                break
            if self._end:
                known[entry["name"]] = self._end
            self._end += len(line)
        self._journal.truncate(self._end)
        if self._end == 0:
            self._append({"name": "", "settings": settings})
        return known

    def _append(self, entry: _Row) -> int:
        line = _json_line(entry)
        offset = self._end
        self._journal.write(line)
        self._end += len(line)
        return offset

    def _rows(self) -> Iterator[_Row]:
        for name, offset in self._known.items():
            if name not in self._used:
                yield from self._rows_at(offset)
        for offset in self._order:
            yield from self._rows_at(offset)

    def _rows_at(self, offset: int) -> list[_Row]:
        self._journal.seek(offset)
        return json.loads(self._journal.readline())["rows"]

    def _write_csv(self, path: Path) -> None:
        columns = dict.fromkeys(["name", "caption"])
        for row in self._rows():
            columns.update(dict.fromkeys(row))
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            table = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
            table.writeheader()
            table.writerows(self._rows())


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns)


def _json_line(row: _Row) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
    except (
        UnicodeEncodeError
    ):  # a lone surrogate in a row that somebody else wrote: JSON has an escape for it
        return json.dumps(row).encode("ascii") + b"\n"


def _parsed(line: bytes) -> _Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("name"), str) else None


def _rows_by_name(path: Path) -> dict[str, list[_Row]]:
    """The rows of a finished table. Raises `UsageError` naming the line where it cannot be read."""
    rows: dict[str, list[_Row]] = {}
    try:
        for row in _csv_rows(path) if path.suffix.lower() == ".csv" else _jsonl_rows(path):
            rows.setdefault(row["name"], []).append(row)
    except (OSError, ValueError, csv.Error) as error:
        remedy = "mend it or move it, or begin it anew with --write overwrite."
        raise UsageError(f"--out {path} is there and cannot be continued: {error}; {remedy}") from error
    return rows


def _csv_rows(path: Path) -> Iterator[_Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file, strict=True)
        for number, cells in enumerate(table, 2):
            if cells.get("name") is None or None in cells:
                raise ValueError(f"row {number} has no 'name', or too many cells")
            yield {key: value for key, value in cells.items() if value is not None}


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = _parsed(line.removeprefix(_BOM))
            if row is None:
                raise ValueError(f"line {number} is not a JSON object with a 'name'")
            yield row
