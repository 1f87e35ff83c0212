"""Review of a folder's captions: what models propose, what people decide, and what is in the caption files, kept apart.

    FOLDER/photo.txt                 the caption on disk; written only by a person's edit, undo or replacement
    FOLDER/.sightloop/review.jsonl   append-only journal: proposals, fits, edits with the text before and after

An edit names the text that it was made from (its ETag). It is in the journal, on disk, before the caption file changes;
the file changes only if it still has that text (`compare_swap`). So a kill at any moment loses neither an
acknowledged edit nor what another program wrote.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from sightloop.annotation.sidecars import SidecarSink
from sightloop.apps.server.compare_swap import SWAP_PREFIX, read_or_none, replace_if_unchanged
from sightloop.data.datasets.sidecar_files import MAX_SIDECAR_BYTES
from sightloop.data.journal import Journal, JournalLine
from sightloop.errors import UsageError
from sightloop.types import JsonDict

REVIEW_FOLDER = ".sightloop"
ABSENT = "absent"  # ETag of a caption file that does not exist
MAX_CAPTION_BYTES = 64 * 1024

Origin: TypeAlias = Literal["typed", "accepted", "replaced", "undone"]
ReviewState: TypeAlias = Literal["open", "accepted", "rejected", "none"]


@dataclass(frozen=True, slots=True)
class CaptionOnDisk:
    """Content of a caption file.

    Attributes:
        text: without the newline at its end; None if there is no file.
        etag: 16 hexadecimal digits of the SHA-256 of its bytes, or `ABSENT`.
    """

    text: str | None
    etag: str


@dataclass(frozen=True, slots=True)
class Proposal:
    """Caption that a model wrote for an image. `fit`: its ITM probability or ITC cosine, if it was scored."""

    text: str
    model: str
    time: float
    fit: float | None = None


@dataclass(frozen=True, slots=True)
class Edit:
    """One change of a caption file, in the order of the journal.

    Attributes:
        number: of its line in the journal.
        before: the text that it replaced; None: there was no file.
        after: the new text; None: the file was deleted (undo of a first caption).
        origin: how it came about.
        batch: common name of the edits of one replacement or undo, or "".
        time: seconds since the epoch.
    """

    number: int
    image: str
    before: str | None
    after: str | None
    origin: Origin
    batch: str
    time: float


@dataclass(slots=True)
class _Record:
    """What the journal says about one image."""

    proposal: Proposal | None = None
    state: ReviewState = "none"
    fits: dict[str, float] = field(default_factory=dict[str, float])  # ETag of the text -> fit
    refused: str | None = None  # ETag of the text on disk that was rejected
    edits: list[Edit] = field(default_factory=list[Edit])


class EditConflict(Exception):
    """The caption file has changed since the edit's text was read. `current`: what is in it now."""

    def __init__(self, current: CaptionOnDisk) -> None:
        super().__init__("the caption was changed meanwhile")
        self.current = current


class CaptionReview:
    """Store of proposals, fits and edits of a folder's captions. Thread-safe; one process at a time may hold it.

    Args:
        folder: the images' folder. Images are named by their path relative to it, with `/`.
        home: folder of the review; that of the images by default.
        dataset_caption: the caption that a dataset has for an image, shown while it has no caption file; None for none.

    Raises:
        UsageError: another process has the review open, or the journal cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        home: str | os.PathLike[str] | None = None,
        dataset_caption: Callable[[str], str | None] = lambda _image: None,
    ) -> None:
        self.folder = Path(folder)
        self._dataset_caption = dataset_caption
        self._lock = threading.RLock()
        self._records: dict[str, _Record] = {}
        self._sinks: dict[str, tuple[int, SidecarSink]] = {}
        self._lines = 0
        place = self._scratch = Path(home or folder) / REVIEW_FOLDER
        try:
            place.mkdir(exist_ok=True)
            self._journal = Journal(place / "review.jsonl", self._load, checksum=True)
        except OSError as error:
            raise UsageError(
                f"{place}: cannot be written ({error.strerror}), so captions cannot be edited"
            ) from error
        self._void_unfinished()

    def read(self, image: str) -> CaptionOnDisk:
        """The caption of an image as readers of the folder see it."""
        return self.with_given(image, caption_on_disk(self._sink(image).current(str(self.folder / image))))

    def with_given(self, image: str, caption: CaptionOnDisk) -> CaptionOnDisk:
        """The caption of an image; that of the dataset if there is no caption file."""
        text = self._dataset_caption(image) if caption.etag == ABSENT else None
        return caption if text is None else caption_of_dataset(text)

    def proposal(self, image: str) -> Proposal | None:
        """The latest proposal, whatever was decided about it."""
        return self._record(image).proposal

    def state(self, image: str) -> ReviewState:
        """What was decided about the latest proposal; "accepted" also after a caption was typed; "none" without one."""
        return self._record(image).state

    def fit(self, image: str, etag: str) -> float | None:
        """How well the caption with this ETag fits the image; None if that text was not scored."""
        return self._record(image).fits.get(etag)

    def history(self, image: str) -> Sequence[Edit]:
        """All edits of an image, the oldest first."""
        return tuple(self._record(image).edits)

    def batch(self, name: str) -> Sequence[Edit]:
        """The edits of one replacement."""
        with self._lock:
            edits = [edit for record in self._records.values() for edit in record.edits if edit.batch == name]
        return sorted(edits, key=lambda edit: edit.number)

    def propose(self, proposals: Mapping[str, Proposal]) -> None:
        """Adds proposals, durably. A proposal equal to the one that was decided already stays decided."""
        with self._lock:
            for image, proposal in proposals.items():
                self._add(
                    {
                        "op": "propose",
                        "image": image,
                        "text": proposal.text,
                        "model": proposal.model,
                        "fit": proposal.fit,
                        "time": proposal.time,
                    }
                )
            self._journal.sync()

    def set_fits(self, fits: Iterable[tuple[str, str, float]]) -> None:
        """Adds (image, ETag of its caption, fit), durably."""
        with self._lock:
            for image, etag, fit in fits:
                self._add({"op": "fit", "image": image, "etag": etag, "fit": fit})
            self._journal.sync()

    def reject(self, image: str) -> None:
        """Marks the latest proposal as rejected; the caption on disk stays."""
        with self._lock:
            self._add({"op": "reject", "image": image, "time": time.time()})
            self._journal.sync()

    def refuse(self, image: str, etag: str, refused: bool) -> None:
        """Marks the text on disk as rejected, or takes that back; the file stays as it is.

        Raises:
            EditConflict: the caption file has another ETag now.
        """
        with self._lock:
            current = self.read(image)
            if current.etag != etag or current.text is None:
                raise EditConflict(current)
            self._add({"op": "refuse", "image": image, "etag": etag if refused else "", "time": time.time()})
            self._journal.sync()

    def is_refused(self, image: str, etag: str) -> bool:
        """Whether the text with this ETag was rejected."""
        return self._record(image).refused == etag

    def refused(self) -> Sequence[str]:
        """Images of which a text was rejected; it may have been edited since."""
        with self._lock:
            return [image for image, record in self._records.items() if record.refused]

    def edit(
        self, image: str, text: str | None, etag: str, origin: Origin = "typed", batch: str = ""
    ) -> CaptionOnDisk:
        """Writes a caption, if the caption file still has the ETag that the edit was made from.

        Args:
            image: an image of the folder.
            text: the new caption, one or several lines; None deletes the file.
            etag: `CaptionOnDisk.etag` of the text that the person saw.
            origin: how it came about.
            batch: name of the replacement that it is part of.

        Returns:
            The new content. It is on disk.

        Raises:
            EditConflict: the file has another content now; nothing is written.
            UsageError: an empty or overlong text, or a file that cannot be written.
        """
        data = None if text is None else _encode(text)
        with self._lock:
            path = self.path(image)
            before = read_or_none(path)
            # a.txt is read as the caption of a.jpg and of a.png, but theirs are written to a.jpg.txt and a.png.txt
            seen = self.read(image) if before is None else _on_disk(before)
            if seen.etag != etag:
                raise EditConflict(seen)
            self._add(
                {
                    "op": "edit",
                    "image": image,
                    "before": seen.text,
                    "after": None if data is None else _on_disk(data).text,
                    "origin": origin,
                    "batch": batch,
                    "time": time.time(),
                }
            )
            self._journal.sync()
            try:
                written = replace_if_unchanged(path, before, data, self._scratch)
            except OSError as error:
                self._add({"op": "void", "image": image})
                name = os.path.basename(path)
                raise UsageError(f"its caption file {name} cannot be written: {error.strerror}") from error
            if not written:
                self._add({"op": "void", "image": image})
                raise EditConflict(_on_disk(read_or_none(path)))
            return _on_disk(data)

    def undo(self, batch: str) -> tuple[int, list[str]]:
        """Takes a replacement back.

        Returns:
            Number of captions that have their text of before again, and the images whose caption was changed since.
        """
        name = f"undo {batch}"
        undone, changed = 0, list[str]()
        for edit in reversed(self.batch(batch)):
            current = self.read(edit.image)
            try:
                if current.text != edit.after:
                    raise EditConflict(current)
                self.edit(edit.image, edit.before, current.etag, "undone", name)
                undone += 1
            except EditConflict:
                changed.append(edit.image)
        return undone, changed

    def close(self) -> None:
        """Closes the journal; another process may then review the folder."""
        self._journal.close()

    def _sink(self, image: str) -> SidecarSink:
        """Rule of the sidecars' names in the image's folder, read again when a name was added to or removed from it."""
        folder = os.path.dirname(self.folder / image)
        modified = os.stat(folder).st_mtime_ns if os.path.isdir(folder) else 0
        with self._lock:
            known = self._sinks.get(folder)
            if known is None or known[0] != modified:
                known = self._sinks[folder] = (modified, SidecarSink())
            return known[1]

    def path(self, image: str) -> str:
        """Path of the file that an edit of this image's caption writes. UsageError if it is no plain file."""
        path = self._sink(image).path(str(self.folder / image))
        if os.path.islink(path) or (os.path.lexists(path) and not os.path.isfile(path)):
            raise UsageError(f"its caption file {os.path.basename(path)} is not a plain file")
        return path

    def _record(self, image: str) -> _Record:
        with self._lock:
            return self._records.get(image) or _Record()

    def _add(self, entry: JsonDict) -> None:
        self._journal.add(entry)
        self._lines += 1
        self._apply(entry, self._lines)

    def _load(self, line: JournalLine) -> None:
        self._lines = line.number
        if line.entry is None:
            raise UsageError(
                f"{self._scratch / 'review.jsonl'}: line {line.number} is damaged: move the file away"
            )
        self._apply(line.entry, line.number)

    def _apply(self, entry: JsonDict, number: int) -> None:
        record = self._records.setdefault(str(entry.get("image")), _Record())
        op = entry.get("op")
        if op == "propose":
            proposal = Proposal(
                str(entry.get("text")),
                str(entry.get("model")),
                _number(entry, "time") or 0.0,
                _number(entry, "fit"),
            )
            decided = record.proposal is not None and record.proposal.text == proposal.text
            record.state = record.state if decided and record.state != "none" else "open"
            record.proposal = proposal
        elif op == "fit":
            record.fits = {str(entry.get("etag")): _number(entry, "fit") or 0.0}
        elif op == "reject":
            record.state = "rejected"
        elif op == "refuse":
            record.refused = _text(entry, "etag") or None
        elif op == "edit":
            edit = Edit(
                number,
                str(entry.get("image")),
                _text(entry, "before"),
                _text(entry, "after"),
                _origin(entry.get("origin")),
                str(entry.get("batch")),
                _number(entry, "time") or 0.0,
            )
            record.edits.append(edit)
            record.state = "accepted" if edit.after is not None else "none"
        elif op == "void" and record.edits:
            record.edits.pop()
            record.state = "accepted" if record.edits else ("open" if record.proposal else "none")

    def _void_unfinished(self) -> None:
        """A kill between journal and caption file leaves the last edit without its file: it did not take place."""
        edits = [record.edits[-1] for record in self._records.values() if record.edits]
        last = max(edits, key=lambda edit: edit.number, default=None)
        if last is not None and last.before != last.after and self.read(last.image).text == last.before:
            self._add({"op": "void", "image": last.image})
        seen = set() if last is None else {last.before, last.after}
        for file in self._scratch.glob(f"{SWAP_PREFIX}*"):
            if caption_on_disk(str(file)).text in seen:
                file.unlink()
            else:  # another program's text, which a killed edit had taken out and nobody saw
                file.rename(file.with_name(f"recovered-{file.name}.txt"))


def caption_on_disk(path: str | None) -> CaptionOnDisk:
    """Content of a caption file; one that cannot be read has no text, and an ETag that no edit can have.

    Args:
        path: the file; None if the image has none.
    """
    try:
        return _on_disk(read_or_none(path) if path is not None else None)
    except OSError:
        return CaptionOnDisk(None, "unreadable")


def caption_of_dataset(text: str) -> CaptionOnDisk:
    """A dataset's caption, as something to edit; its ETag is no file's."""
    return CaptionOnDisk(text, "given-" + hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16])


def _on_disk(data: bytes | None) -> CaptionOnDisk:
    if data is None:
        return CaptionOnDisk(None, ABSENT)
    text = data[:MAX_SIDECAR_BYTES].decode("utf-8-sig", "replace").replace("\r\n", "\n").rstrip("\n")
    return CaptionOnDisk(text, hashlib.sha256(data).hexdigest()[:16])


def _encode(text: str) -> bytes:
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    data = ("\n".join(lines).strip("\n") + "\n").encode("utf-8", "replace")
    if not data.strip():
        raise UsageError("an empty caption: type a text, or reject the proposal")
    if len(data) > MAX_CAPTION_BYTES or b"\0" in data:
        raise UsageError(f"the caption is longer than {MAX_CAPTION_BYTES:,} bytes or has a null character")
    return data


def _number(entry: JsonDict, key: str) -> float | None:
    value = entry.get(key)
    return float(value) if isinstance(value, int | float) else None


def _text(entry: JsonDict, key: str) -> str | None:
    value = entry.get(key)
    return value if isinstance(value, str) else None


def _origin(value: object) -> Origin:
    return value if value in ("accepted", "replaced", "undone") else "typed"
