"""Caption table: captions of many images in one .jsonl or .csv file, backed by a journal during the run."""

from __future__ import annotations

import csv
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from sightloop.annotation.captioning import Caption
from sightloop.data.atomic import atomic_path, check_regular, remove_stale_temporaries
from sightloop.data.datasets.schema import json_text, portable_name
from sightloop.data.journal import Journal, JournalLine
from sightloop.errors import SightloopError, UsageError
from sightloop.types import Failed, JsonDict, JsonMapping, Skipped

_BOM = b"\xef\xbb\xbf"


class CaptionTable:
    """Sink that writes captions to a table with the columns name, caption and, if captions are scored, match.

    During the run, rows go to the journal `FILE.partial`; `finish` writes FILE in input order by atomic rename and
    removes the journal. A run after a kill resumes from the journal.

    Args:
        path: FILE, ending in .jsonl or .csv.
        mode: "skip" keeps the rows of an existing FILE as they are, including columns added by hand; rows of images
            that are not among the inputs come first. "overwrite" replaces FILE.
        settings: Settings of the run. In mode "overwrite" a journal is resumed only if its settings are equal.

    Raises:
        UsageError: FILE cannot be read or written, or another run is writing it.
    """

    def __init__(
        self,
        path: Path,
        mode: Literal["skip", "overwrite"] = "skip",
        settings: JsonMapping | None = None,
    ) -> None:
        _check_path(path)
        self.path = path
        self.journal_path = path.with_name(path.name + ".partial")
        self._mode = mode
        self._file_id = _file_id(path)
        self._settings: JsonDict = json.loads(json.dumps({"mode": mode, **(settings or {})}, default=str))
        finished_rows = _rows_by_name(path) if mode == "skip" and path.exists() else {}
        self._offsets: dict[str, int] = {}  # name -> start of its latest line in the journal
        self._resumable: bool | None = None  # None: the journal has no line yet
        self._journal = self._open_journal()
        remove_stale_temporaries(path.parent)
        self._has_new_rows = bool(self._offsets)  # rows that FILE does not have
        self._changed = self._has_new_rows or not path.exists() or mode == "overwrite"
        # Rows of FILE, which may be edited by hand, take precedence over rows of a killed run.
        for name, rows in finished_rows.items():
            self._offsets[name] = self._journal.add({"name": name, "rows": rows})
        self._order = array("q")  # journal offsets of the images, in input order
        self._ordered_names: set[str] = set()

    def check(self, image: str) -> Skipped | Failed | None:
        """`Skipped` if the table has a row of this image already; called before the image is read."""
        return Skipped(image, "it has a row already") if portable_name(image) in self._offsets else None

    def add(self, image: str, caption: Caption) -> Skipped | Failed | None:
        """Adds one line to the journal; a dropped caption is recorded there but not written to FILE."""
        name = portable_name(image)
        row: JsonDict = {"name": name, "caption": caption.text}
        if caption.score is not None:
            row["match"] = round(caption.score, 6)
        self._order.append(self._journal.add({"name": name, "rows": [] if caption.dropped else [row]}))
        self._changed = self._has_new_rows = True
        return None

    def note_skipped(self, image: str) -> None:
        """Puts the existing row of a skipped image at its position among the inputs."""
        name = portable_name(image)
        if name in self._offsets and name not in self._ordered_names:
            self._ordered_names.add(name)
            self._order.append(self._offsets[name])

    def commit(self) -> None:
        """Forces the journal onto the disk (fsync)."""
        self._journal.sync()

    def finish(self) -> None:
        """Writes FILE and removes the journal.

        Raises `SightloopError`, and keeps the journal, if another program changed FILE during the run.
        """
        self.commit()
        if self._mode == "skip" and _file_id(self.path) != self._file_id:
            raise SightloopError(
                f"{self.path} was changed during the run, so it was left as it is. The new captions are in "
                f"{self.journal_path.name}: run the same command again to merge them."
            )
        if self._changed:
            with atomic_path(self.path) as temporary:
                if self.path.suffix.lower() == ".csv":
                    self._write_csv(temporary)
                else:
                    with temporary.open("wb") as file:
                        file.writelines(json_text(row).encode() + b"\n" for row in self._rows())
        self._journal.remove()

    def close(self) -> None:
        """Closes the journal and deletes it if it has no new rows; does nothing after `finish`."""
        if not self._journal.closed:
            self.commit()
            if self._has_new_rows:
                self._journal.close()
            else:
                self._journal.remove()

    def _open_journal(self) -> Journal:
        try:
            journal = Journal(self.journal_path, self._load_line, dumps=json_text)
        except OSError as error:
            raise UsageError(f"--out: {self.journal_path} cannot be written: {error.strerror}.") from error
        if not self._resumable:
            journal.clear()
            try:
                journal.add({"name": "", "settings": self._settings})
            except OSError:
                journal.remove()
                raise
        return journal

    def _load_line(self, line: JournalLine) -> None:
        """Records the offset of a row. The first line holds the settings of the run that began the journal."""
        if self._resumable is False:
            return
        entry = line.entry
        is_first = line.number == 1
        if entry is None or not isinstance(entry.get("name"), str) or is_first != ("settings" in entry):
            raise UsageError(f"{self.journal_path} is not the journal of a run: move it elsewhere.")
        if is_first:
            self._resumable = self._mode == "skip" or entry["settings"] == self._settings
        else:
            self._offsets[entry["name"]] = line.start

    def _rows(self) -> Iterator[JsonDict]:
        """All rows: first those of images that are not among the inputs, then in input order."""
        for name, offset in self._offsets.items():
            if name not in self._ordered_names:
                yield from self._journal.read(offset)["rows"]
        for offset in self._order:
            yield from self._journal.read(offset)["rows"]

    def _write_csv(self, path: Path) -> None:
        columns = dict.fromkeys(["name", "caption"])
        for row in self._rows():
            columns.update(dict.fromkeys(row))
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            table = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
            table.writeheader()
            table.writerows(self._rows())


def _check_path(path: Path) -> None:
    if path.suffix.lower() not in (".jsonl", ".csv"):
        raise UsageError(f"--out {path}: the file must end in .jsonl or .csv.")
    if path.is_dir():
        raise UsageError(f"--out {path}: this is a folder; name a file.")
    if not path.parent.is_dir():
        raise UsageError(f"--out {path}: the folder {path.parent} does not exist; make it first.")
    check_regular(path)


def _file_id(path: Path) -> tuple[int, int, int] | None:
    """Inode, size and modification time, which tell whether a file was changed; None if it does not exist."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns)


def _rows_by_name(path: Path) -> dict[str, list[JsonDict]]:
    """The rows of a finished table. Raises `UsageError` naming the line that cannot be read."""
    rows: dict[str, list[JsonDict]] = {}
    try:
        for row in _csv_rows(path) if path.suffix.lower() == ".csv" else _jsonl_rows(path):
            rows.setdefault(row["name"], []).append(row)
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(
            f"--out {path} cannot be continued: {error}; fix it, move it, or replace it with --write overwrite."
        ) from error
    return rows


def _csv_rows(path: Path) -> Iterator[JsonDict]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file, strict=True)
        for number, cells in enumerate(table, 2):
            if cells.get("name") is None or None in cells:
                raise ValueError(f"row {number} has no 'name', or too many cells")
            yield {key: value for key, value in cells.items() if value is not None}


def _jsonl_rows(path: Path) -> Iterator[JsonDict]:
    """Rows of a file that people may have edited: blank lines, a BOM and a last line without newline are allowed."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.removeprefix(_BOM))
            except ValueError:
                row = None
            if not isinstance(row, dict) or not isinstance(row.get("name"), str):
                raise ValueError(f"line {number} is not a JSON object with a 'name'")
            yield row
