"""Caption table: captions of many images in one .jsonl, .csv or .parquet file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sightloop.annotation.captioning import Caption
from sightloop.annotation.result_table import ResultTable
from sightloop.types import Failed, JsonDict, JsonMapping, Skipped


class CaptionTable:
    """Sink that writes captions to a table: name, caption, if they are scored match, and if it is known writer.

    Args:
        path, mode, settings: See `ResultTable`.
        writer: Identity of the captioning model, for the column "writer": a model that later judges its own captions is
            told from others by it. "" for no such column.

    Raises:
        UsageError: FILE cannot be read or written, or another run is writing it.
    """

    def __init__(
        self,
        path: Path,
        mode: Literal["skip", "overwrite"] = "skip",
        settings: JsonMapping | None = None,
        writer: str = "",
    ) -> None:
        self._table = ResultTable(path, mode, settings, ("name", "caption"))
        self._writer = writer

    def check(self, image: str) -> Skipped | Failed | None:
        """`Skipped` if the table has a row of this image already; called before the image is read."""
        return Skipped(image, "it has a row already") if image in self._table else None

    def add(self, image: str, caption: Caption) -> Skipped | Failed | None:
        """Adds one line to the journal; a dropped caption is recorded there but not written to FILE."""
        row: JsonDict = {"caption": caption.text}
        if caption.score is not None:
            row["match"] = round(caption.score, 6)
        if self._writer:
            row["writer"] = self._writer
        self._table.add(image, [] if caption.dropped else [row])
        return None

    def note_skipped(self, image: str) -> None:
        """Puts the existing row of a skipped image at its position among the inputs."""
        self._table.note_skipped(image)

    def commit(self) -> None:
        """Forces the journal onto the disk (fsync)."""
        self._table.commit()

    def finish(self) -> None:
        """Writes FILE and removes the journal.

        Raises `SightloopError`, and keeps the journal, if another program changed FILE during the run.
        """
        self._table.finish()

    def close(self) -> None:
        """Closes the journal and deletes it if it has no new rows; does nothing after `finish`."""
        self._table.close()
