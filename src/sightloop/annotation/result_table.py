"""Result table: rows of many images in one .jsonl, .csv or .parquet file, backed by a journal during the run."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from sightloop.annotation.table_files import check_table_path, rows_by_name, write_rows
from sightloop.data.atomic import remove_stale_temporaries
from sightloop.data.datasets.schema import json_text, portable_name
from sightloop.data.journal import Journal, JournalLine
from sightloop.errors import SightloopError, UsageError
from sightloop.types import JsonDict, JsonMapping

Rows: TypeAlias = list[JsonDict]


class ResultTable:
    """Table with one or more rows an image; a row is an object with a "name", the image's path.

    During the run, rows go to the journal `FILE.partial`; `finish` writes FILE in input order by atomic rename and
    removes the journal. A run after a kill resumes from the journal.

    Args:
        path: FILE, ending in .jsonl, .csv or .parquet.
        mode: "skip" keeps the rows of an existing FILE as they are, including columns added by hand; rows of images
            that are not among the inputs come first. "overwrite" replaces FILE.
        settings: Settings of the run. In mode "overwrite" a journal is resumed only if its settings are equal.
        columns: The first columns of a CSV or Parquet file, in order.

    Raises:
        UsageError: FILE cannot be read or written, or another run is writing it.
    """

    def __init__(
        self,
        path: Path,
        mode: Literal["skip", "overwrite"] = "skip",
        settings: JsonMapping | None = None,
        columns: Sequence[str] = ("name",),
    ) -> None:
        check_table_path(path)
        self.path = path
        self.journal_path = path.with_name(path.name + ".partial")
        self._mode = mode
        self._columns = tuple(columns)
        self._file_id = _file_id(path)
        self._settings: JsonDict = json.loads(json.dumps({"mode": mode, **(settings or {})}, default=str))
        finished_rows = rows_by_name(path) if mode == "skip" and path.exists() else {}
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

    def __contains__(self, image: str) -> bool:
        """Whether FILE or the journal of an earlier run has the image."""
        return portable_name(image) in self._offsets

    def entry(self, image: str) -> JsonDict:
        """What FILE, or an earlier run, has of an image: its "rows", and what else was added with them; else {}."""
        start = self._offsets.get(portable_name(image))
        return {} if start is None else self._journal.read(start)

    def add(self, image: str, rows: Iterable[JsonMapping], **more: object) -> None:
        """Adds one line to the journal.

        Args:
            image: Path of the image.
            rows: Its rows, without the "name"; none if nothing is to be written to FILE.
            more: JSON values for the journal alone, which `finish` hands to its `arrange`.
        """
        name = portable_name(image)
        line = {"name": name, "rows": [{"name": name, **row} for row in rows], **more}
        start = self._journal.add(line)
        if name in self._offsets:  # it replaces older rows
            self._offsets[name] = start
            self._put_in_order(name)
        else:
            self._order.append(start)
        self._changed = self._has_new_rows = True

    def note_skipped(self, image: str) -> None:
        """Puts the existing rows of a skipped image at its position among the inputs."""
        name = portable_name(image)
        if name in self._offsets:
            self._put_in_order(name)

    def commit(self) -> None:
        """Forces the journal onto the disk (fsync)."""
        self._journal.sync()

    def finish(self, arrange: Callable[[Iterator[JsonDict]], Rows] | None = None) -> Rows | None:
        """Writes FILE and removes the journal.

        Args:
            arrange: Makes the rows of FILE from all journal entries, in input order. By default their rows as they are.

        Returns:
            What `arrange` made, all in memory; None without it.

        Raises:
            SightloopError: another program changed FILE during the run; the journal is kept.
        """
        self.commit()
        if self._mode == "skip" and _file_id(self.path) != self._file_id:
            raise SightloopError(
                f"{self.path} was changed during the run, so it was left as it is. The new rows are in "
                f"{self.journal_path.name}: run the same command again to merge them."
            )
        arranged = None if arrange is None else arrange(self._entries())
        if self._changed:
            write_rows(self.path, lambda: self._rows() if arranged is None else arranged, self._columns)
        self._journal.remove()
        return arranged

    def close(self) -> None:
        """Closes the journal and deletes it if it has no new rows; does nothing after `finish`."""
        if not self._journal.closed:
            self.commit()
            if self._has_new_rows:
                self._journal.close()
            else:
                self._journal.remove()

    def _put_in_order(self, name: str) -> None:
        if name not in self._ordered_names:
            self._ordered_names.add(name)
            self._order.append(self._offsets[name])

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

    def _entries(self) -> Iterator[JsonDict]:
        """All entries: first those of images that are not among the inputs, then in input order."""
        for name, offset in self._offsets.items():
            if name not in self._ordered_names:
                yield self._journal.read(offset)
        for offset in self._order:
            yield self._journal.read(offset)

    def _rows(self) -> Iterator[JsonDict]:
        for entry in self._entries():
            yield from entry["rows"]


def _file_id(path: Path) -> tuple[int, int, int] | None:
    """Inode, size and modification time, which tell whether a file was changed; None if it does not exist."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns)
