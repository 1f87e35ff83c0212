"""Library: the images of the server's folder with their captions, as the page lists, filters and sorts them.

The table is kept in memory. A folder is listed again when its modification time changes, a caption file is read again
when its size or time does, so that what other programs do is seen.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from sightloop.apps.server.caption_review import (
    CaptionOnDisk,
    CaptionReview,
    ReviewState,
    caption_of_dataset,
    caption_on_disk,
)
from sightloop.apps.server.errors import ApiError
from sightloop.apps.server.image_sets import ImageSet
from sightloop.data.datasets.sidecar_files import CAPTION_EXTENSIONS, find_sidecar, unusual_sidecars
from sightloop.data.image_names import is_image_name, is_video_name
from sightloop.errors import UsageError
from sightloop.types import JsonDict

_LIST_SECONDS = 1.0  # between two looks at the folders' times
_CAPTION_SECONDS = (
    5.0  # between two looks at all caption files; those of rows that are shown are always looked at
)
_MAX_DEPTH = 32

Sort: TypeAlias = Literal["path", "fit", "changed"]
Shown: TypeAlias = Literal["open", "accepted", "rejected", "none", "captioned", "uncaptioned", ""]


@dataclass(slots=True)
class LibraryImage:
    """An image or a video of the folder.

    Attributes:
        id: 16 hexadecimal digits, of the path.
        path: relative to the folder, with `/`.
        sidecar: its caption file, absolute; None if it has none.
        stamp: size and modification time of the caption file when it was read.
        caption: what it said.
        is_video: whether it is a video.
    """

    id: str
    path: str
    sidecar: str | None
    stamp: tuple[int, int] = (-1, -1)
    caption: CaptionOnDisk | None = None
    is_video: bool = field(init=False)

    def __post_init__(self) -> None:
        self.is_video = is_video_name(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Which images are listed, and in which order.

    Args:
        text: what the caption contains, whatever the case.
        without: what it does not contain.
        state: of the latest proposal, or whether there is a caption; "" for all.
        sort: by name, by fit (worst first, those without a fit last), or by the time of the last change (latest first).
    """

    text: str = ""
    without: str = ""
    state: Shown = ""
    sort: Sort = "path"


class Library:
    """Images and captions of a folder. Its methods look at the disk: call them on a thread.

    Args:
        folder: the images' folder, resolved.
        image_set: images of an index or a dataset, in place of all that are in the folder.
    """

    def __init__(self, folder: Path, image_set: ImageSet | None = None) -> None:
        self.folder = folder
        self.image_set = image_set
        self.source = folder if image_set is None else image_set.source
        """What is served."""
        self.home = folder if image_set is None else image_set.home
        """Where the review, the index and the trainings are kept."""
        self.obstacle = ""
        """Why captions cannot be edited; "" if they can."""
        self._review: CaptionReview | None = None
        self._lock = threading.RLock()
        self._folders: dict[str, tuple[int, list[LibraryImage], list[str]]] = {}
        self._entries: list[LibraryImage] = []
        self._archived: list[LibraryImage] = []
        self._by_id: dict[str, LibraryImage] = {}
        self._listed_at = self._captions_at = 0.0
        if image_set is not None and image_set.obstacle:
            self.obstacle = image_set.obstacle
            return
        try:
            self._review = CaptionReview(folder, self.home, self._given)
        except UsageError as error:
            self.obstacle = str(error).replace(f"{self.home}", self.home.name)

    @property
    def review(self) -> CaptionReview:
        """Store of proposals and edits. Raises ApiError (403) where the folder cannot be written."""
        if self._review is None:
            raise ApiError(403, f"captions cannot be edited: {self.obstacle}", code="read_only")
        return self._review

    @property
    def is_editable(self) -> bool:
        """Whether captions can be edited."""
        return self._review is not None

    def close(self) -> None:
        """Closes the review."""
        if self._review is not None:
            self._review.close()

    def entries(self) -> Sequence[LibraryImage]:
        """All images, by path."""
        with self._lock:
            if time.monotonic() - self._listed_at > _LIST_SECONDS:
                self._list()
                self._listed_at = time.monotonic()
            return self._entries

    def entry(self, image_id: str) -> LibraryImage:
        """The image with an id. Raises ApiError (404)."""
        self.entries()
        if (entry := self._by_id.get(image_id)) is None:
            raise ApiError(404, "the folder has no such image", code="image_not_found")
        return entry

    def by_path(self, path: str) -> LibraryImage | None:
        """The image at a relative path; None if there is none."""
        self.entries()
        return self._by_id.get(image_id(path))

    def select(self, listing: Listing) -> Sequence[LibraryImage]:
        """The images of a listing, in its order."""
        entries = self.entries()
        if listing.text or listing.without or listing.state or listing.sort != "path":
            self._read_captions(entries)
        contained, absent = listing.text.casefold(), listing.without.casefold()
        chosen = [
            entry
            for entry in entries
            if (not contained or contained in _text(entry))
            and (not absent or absent not in _text(entry))
            and (not listing.state or self._is_shown(entry, listing.state))
        ]
        if listing.sort == "fit":
            chosen.sort(key=lambda entry: 2.0 if (fit := self.fit(entry)) is None else fit)
        elif listing.sort == "changed":
            chosen.sort(key=lambda entry: -entry.stamp[1])
        return chosen

    def captioned(self) -> Sequence[LibraryImage]:
        """Images with a caption file that has a text."""
        return self.select(Listing(state="captioned"))

    def caption(self, entry: LibraryImage) -> CaptionOnDisk:
        """The caption of an image, read again if its file has changed."""
        with self._lock:
            stamp = _stamp(entry.sidecar)
            if entry.caption is None or stamp != entry.stamp:
                entry.caption = caption_on_disk(entry.sidecar)
                entry.stamp = stamp
                if entry.caption.text is None and (text := self._given(entry.path)) is not None:
                    entry.caption = caption_of_dataset(text)
            return entry.caption

    def _given(self, path: str) -> str | None:
        """The dataset's caption of an image."""
        return None if self.image_set is None else self.image_set.given(path)

    @property
    def has_given_captions(self) -> bool:
        """Whether captions come from a dataset until they are edited."""
        return self.image_set is not None and self.image_set.has_captions

    def is_plain(self, entry: LibraryImage) -> bool:
        """Whether it is an image in a file, which jobs read."""
        return not entry.is_video and not self.is_archived(entry)

    def is_archived(self, entry: LibraryImage) -> bool:
        """Whether an image is inside an archive, where no caption file has a place."""
        return self.image_set is not None and entry.path in self.image_set.in_archives

    def note_edit(self, entry: LibraryImage, caption: CaptionOnDisk) -> None:
        """Takes over what an edit wrote."""
        with self._lock:
            if caption.text is not None and entry.sidecar is None:
                entry.sidecar = self.review.path(entry.path)
            entry.caption, entry.stamp = caption, _stamp(entry.sidecar)

    def fit(self, entry: LibraryImage) -> float | None:
        """How well the caption on disk fits; None if that text was not scored."""
        if self._review is None or entry.caption is None:
            return None
        return self._review.fit(entry.path, entry.caption.etag)

    def is_rejected(self, entry: LibraryImage) -> bool:
        """Whether the caption on disk was rejected, which leaves the image out of trainings."""
        if self._review is None or entry.caption is None:
            return False
        return self._review.is_refused(entry.path, entry.caption.etag)

    def rejected(self) -> int:
        """Number of captions on disk that were rejected."""
        refused = [] if self._review is None else [self.by_path(path) for path in self._review.refused()]
        return sum(self.is_rejected(entry) for entry in refused if entry and self.caption(entry).text)

    def state(self, entry: LibraryImage) -> ReviewState:
        """What was decided about the latest proposal."""
        return "none" if self._review is None else self._review.state(entry.path)

    def row(self, entry: LibraryImage) -> JsonDict:
        """An image as the page shows it."""
        caption = self.caption(entry)
        proposal = None if self._review is None else self._review.proposal(entry.path)
        return {
            "id": entry.id,
            "path": entry.path,
            "video": entry.is_video,
            "caption": {"text": caption.text, "etag": caption.etag},
            "proposal": proposal and {"text": proposal.text, "model": proposal.model, "fit": proposal.fit},
            "state": self.state(entry),
            "rejected": self.is_rejected(entry),
            "fit": self.fit(entry),
        }

    def _is_shown(self, entry: LibraryImage, state: Shown) -> bool:
        has_caption = bool(_text(entry).strip())
        if state in ("captioned", "uncaptioned"):
            return has_caption == (state == "captioned")
        return self.state(entry) == state or (state == "rejected" and self.is_rejected(entry))

    def _read_captions(self, entries: Sequence[LibraryImage]) -> None:
        with self._lock:
            is_due = time.monotonic() - self._captions_at > _CAPTION_SECONDS
            for entry in entries:
                if entry.caption is None or is_due:
                    self.caption(entry)
            if is_due:
                self._captions_at = time.monotonic()

    def _list(self) -> None:
        """Lists the folders that have changed, and puts the entries together."""
        before = self._folders
        after: dict[str, tuple[int, list[LibraryImage], list[str]]] = {}
        pending, changed = [("", 0)], False
        if self.image_set is not None:
            folders = {os.path.dirname(path) for path in self.image_set.files}
            pending = [(folder, _MAX_DEPTH) for folder in folders]
        while pending:
            relative, depth = pending.pop()
            try:
                modified = os.stat(self.folder / relative).st_mtime_ns
            except OSError:
                continue
            known = before.get(relative)
            if known is None or known[0] != modified:
                known = (modified, *self._list_folder(relative, known[1] if known else []))
                changed = True
            after[relative] = known
            if depth < _MAX_DEPTH:
                pending += [(name, depth + 1) for name in known[2]]
        if changed or len(after) != len(before) or (self.image_set is not None and not self._entries):
            self._folders = after
            if self.image_set is not None and not self._archived:  # archives do not change
                self._archived = [
                    LibraryImage(image_id(path), path, None) for path in self.image_set.in_archives
                ]
            entries = [entry for _, own, _ in after.values() for entry in own] + self._archived
            entries.sort(key=lambda entry: entry.path)
            self._entries = entries
            self._by_id = {entry.id: entry for entry in entries}

    def _list_folder(
        self, relative: str, known: Sequence[LibraryImage]
    ) -> tuple[list[LibraryImage], list[str]]:
        """Images and subfolders of a folder; links to elsewhere and hidden folders are left out."""
        prefix = os.path.join(self.folder, relative) if relative else str(self.folder)
        images: list[str] = []
        folders: list[str] = []
        listed: set[str] = set()
        try:
            with os.scandir(prefix) as scan:
                for item in scan:
                    if item.name.startswith("."):
                        continue
                    if item.is_dir(follow_symlinks=False):
                        folders.append(f"{relative}/{item.name}" if relative else item.name)
                        continue
                    listed.add(item.path)
                    is_listed = is_image_name(item.name) or is_video_name(item.name)
                    if is_listed and (not item.is_symlink() or self._is_inside(item.path)):
                        images.append(item.name)
        except OSError:
            return [], []
        unusual = unusual_sidecars(listed)
        present = {entry.path: entry for entry in known}
        entries: list[LibraryImage] = []
        for name in sorted(images):
            path = f"{relative}/{name}" if relative else name
            if self.image_set is not None and path not in self.image_set.files:
                continue
            entry = present.get(path) or LibraryImage(image_id(path), path, None)
            entry.sidecar = find_sidecar(os.path.join(prefix, name), CAPTION_EXTENSIONS, unusual, listed)
            entries.append(entry)
        return entries, sorted(folders)

    def _is_inside(self, path: str) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(self.folder)


def image_id(path: str) -> str:
    """Id of an image: 16 hexadecimal digits of the SHA-256 of its relative path."""
    return hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _text(entry: LibraryImage) -> str:
    return "" if entry.caption is None or entry.caption.text is None else entry.caption.text.casefold()


def _stamp(sidecar: str | None) -> tuple[int, int]:
    try:
        status = os.stat(sidecar) if sidecar is not None else None
    except OSError:
        status = None
    return (-1, -1) if status is None else (status.st_size, status.st_mtime_ns)
