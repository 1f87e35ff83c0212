"""Regions of many images in one file, backed by a journal during the run: a killed run resumes."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

from sightloop.annotation.region_files import Drawings, RegionFile, RegionRow, write_regions
from sightloop.data.atomic import TEMP_PREFIX, atomic_write
from sightloop.data.datasets.schema import json_text, region_from_fields
from sightloop.data.journal import Journal, JournalLine
from sightloop.errors import SightloopError, UsageError
from sightloop.types import JsonDict, JsonMapping


class RegionTable:
    """Table of the regions of images, in a format of `region_files`.

    During the run, regions go to the journal `FILE.partial`; `finish` writes FILE and removes the journal. A JSON lines
    file that exists keeps its lines as they are, and new images are added behind them; other files are not replaced.

    Args:
        path: FILE; for YOLO a folder.
        kind: the format.
        settings: of the run; a journal of other settings is refused.
        drawings: also draws the regions of images that are skipped because an earlier run has found them.

    Raises:
        UsageError: FILE exists already or cannot be read, or a journal is of another run.
    """

    def __init__(
        self, path: Path, kind: RegionFile, settings: JsonMapping, drawings: Drawings | None = None
    ) -> None:
        if not path.parent.is_dir():
            raise UsageError(f"--out {path}: the folder {path.parent} does not exist; make it first.")
        if os.path.lexists(path) and kind != "jsonl":
            raise UsageError(f"--out {path}: exists already; give another name.")
        self.path, self._kind, self._drawings = path, kind, drawings
        self._before = path.read_bytes() if path.exists() else b""
        self._written = {os.path.abspath(path.parent / name) for name in _images_of(path, self._before)}
        self._settings: JsonDict = json.loads(json.dumps(settings, default=str))
        self._offsets: dict[str, int] = {}  # path of an image -> start of its line in the journal
        self._order: dict[str, None] = {}  # of those among the inputs
        journal = path.with_name(path.name + ".partial")
        try:
            self._journal = Journal(journal, self._load_line, dumps=json_text)
        except OSError as error:
            raise UsageError(f"--out: {journal} cannot be written: {error.strerror}.") from error
        if journal.stat().st_size == 0:
            self._journal.add({"settings": self._settings})

    def __contains__(self, image: str) -> bool:
        """Whether FILE or the journal of an earlier run has the image."""
        return os.path.abspath(image) in self._written or image in self._offsets

    def entry(self, image: str) -> JsonDict:
        """The "rows" of an image: its regions as JSON, if an earlier, unfinished run has found them."""
        start = self._offsets.get(image)
        return {"rows": [] if start is None else self._journal.read(start)["regions"]}

    def add(self, image: str, rows: Iterable[JsonMapping]) -> None:
        """Adds the regions of an image, as JSON."""
        self._offsets[image] = self._journal.add({"name": image, "regions": list(rows)})
        self._order[image] = None

    def note_skipped(self, image: str) -> None:
        """Puts the regions of a skipped image at its position among the inputs, and draws them."""
        if image in self._offsets:
            self._order[image] = None
            if self._drawings is not None:
                self._drawings.add(image, self._row(image)[1])

    def commit(self) -> None:
        """Forces the journal onto the disk (fsync)."""
        self._journal.sync()

    def finish(self) -> None:
        """Writes FILE and removes the journal.

        Raises:
            SightloopError: another program changed FILE during the run; the journal is kept.
        """
        if self._offsets:
            rows = [name for name in self._offsets if name not in self._order] + list(self._order)
            if self._before:
                self._append(map(self._row, rows))
            else:
                write_regions(self.path, self._kind, map(self._row, rows))
        self._journal.remove()

    def close(self) -> None:
        """Closes the journal and deletes it if it has no regions; does nothing after `finish`."""
        if self._journal.closed:
            return
        if self._offsets:
            self.commit()
            self._journal.close()
        else:
            self._journal.remove()

    def _append(self, rows: Iterator[RegionRow]) -> None:
        temporary = self.path.with_name(f"{TEMP_PREFIX}{secrets.token_hex(8)}")
        try:
            write_regions(temporary, self._kind, rows)
            data = temporary.read_bytes()
        finally:
            temporary.unlink(missing_ok=True)
        if self.path.read_bytes() != self._before:
            raise SightloopError(
                f"{self.path} was changed during the run, so it was left as it is. The new regions are in "
                f"{self._journal.path.name}: run the same command again to add them."
            )
        end = b"" if self._before.endswith(b"\n") else b"\n"
        atomic_write(self.path, self._before + end + data)

    def _row(self, image: str) -> RegionRow:
        fields: list[JsonDict] = self._journal.read(self._offsets[image])["regions"]
        return image, [region_from_fields(region) for region in fields]

    def _load_line(self, line: JournalLine) -> None:
        """Records the offset of an image. The first line holds the settings of the run that began the journal."""
        name = self.path.with_name(self.path.name + ".partial")
        entry = line.entry
        if entry is None or (line.number == 1) != ("settings" in entry):
            raise UsageError(f"{name} is not the journal of a run: move it elsewhere.")
        if line.number > 1:
            self._offsets[entry["name"]] = line.start
        elif entry["settings"] != self._settings:
            raise UsageError(
                f"{name}: is of a run with another model or other options; repeat that one, or remove the file."
            )


def _images_of(path: Path, data: bytes) -> Iterator[str]:
    """The images of the lines of a JSON lines file. UsageError names a line that has none."""
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            image = json.loads(line)["image"]
        except (ValueError, LookupError, TypeError):
            image = None
        if not isinstance(image, str):
            raise UsageError(
                f"--out {path}: line {number} is no object with an image; give another name, or mend the file."
            )
        yield image
