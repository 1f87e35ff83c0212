"""Journal of embeddings: what a run has embedded so far, from which the next one resumes."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sightloop.annotation.result_table import digest_of_files
from sightloop.data.journal import Journal, JournalLine
from sightloop.errors import UsageError
from sightloop.types import Floats32, JsonDict

_COMMIT_EVERY = 64  # images between two syncs of the journal


class EmbeddingJournal:
    """Embeddings by image in `FILE.partial`; those of images that changed since do not count.

    Args:
        file: that is written in the end.
        settings: what decides the embeddings beside the images; a journal of others is begun anew.

    Raises:
        UsageError: the journal cannot be written, or another run is writing it.
    """

    def __init__(self, file: Path, settings: str) -> None:
        self._path = file.with_name(file.name + ".partial")
        self._settings = settings
        self._offsets: dict[str, tuple[int, str]] = {}  # image -> start of its line, digest of its state
        self._order: dict[str, None] = {}
        self._is_same = False
        try:
            self._journal = Journal(self._path, self._load_line, sync_every=_COMMIT_EVERY)
        except OSError as error:
            raise UsageError(f"--out: {self._path} cannot be written: {error.strerror}.") from error
        if not self._is_same:
            self._journal.clear()
            self._journal.add({"settings": settings})

    def __contains__(self, image: str) -> bool:
        """Whether the image was embedded and has not changed since."""
        return image in self._offsets and self._offsets[image][1] == _state(image)

    def add(self, image: str, vectors: Floats32) -> None:
        """Adds the vectors of an image, float32 `[d]` or `[q, d]`."""
        state = _state(image)
        data = base64.b64encode(np.ascontiguousarray(vectors, "<f4").tobytes()).decode("ascii")
        line: JsonDict = {"name": image, "state": state, "shape": list(vectors.shape), "data": data}
        self._offsets[image] = self._journal.add(line), state
        self._order[image] = None

    def note_skipped(self, image: str) -> None:
        """Puts an image that was embedded before at its position among the inputs."""
        if image in self._offsets:
            self._order[image] = None

    @property
    def images(self) -> Sequence[str]:
        """The images of this run that are embedded, in the order of the inputs."""
        return list(self._order)

    def vectors(self, image: str) -> Floats32:
        """The vectors of an image."""
        line = self._journal.read(self._offsets[image][0])
        return np.frombuffer(base64.b64decode(line["data"]), "<f4").reshape(line["shape"])

    def remove(self) -> None:
        """Deletes the journal: the file has what it holds."""
        self._journal.remove()

    def close(self) -> None:
        """Closes the journal and deletes it if it is empty; does nothing after `remove`."""
        if self._journal.closed:
            return
        if self._offsets:
            self._journal.close()
        else:
            self._journal.remove()

    def _load_line(self, line: JournalLine) -> None:
        entry = line.entry
        if entry is None or (line.number == 1) != ("settings" in entry):
            raise UsageError(f"{self._path} is not the journal of a run: move it elsewhere.")
        if line.number == 1:
            self._is_same = entry["settings"] == self._settings
        elif self._is_same:
            self._offsets[entry["name"]] = line.start, entry["state"]


def _state(image: str) -> str:
    """Size and time of a file; "" if it is gone."""
    try:
        return digest_of_files((), [image])
    except OSError:
        return ""
