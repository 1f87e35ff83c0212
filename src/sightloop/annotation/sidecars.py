"""Caption sidecars: `photo.txt` for `photo.jpg`, written by atomic rename. `sidecar_files` says which file counts."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from sightloop.annotation.caption_record import record_caption
from sightloop.annotation.captioning import Caption
from sightloop.data.atomic import atomic_write, remove_stale_temporaries
from sightloop.data.datasets.sidecar_files import (
    CAPTION_EXTENSIONS,
    MAX_SIDECAR_BYTES,
    find_sidecar,
    read_plain_file,
    unusual_sidecars,
)
from sightloop.data.image_names import is_image_name
from sightloop.errors import os_error_reason
from sightloop.types import Failed, Skipped

WriteMode: TypeAlias = Literal["skip", "overwrite", "append", "prepend"]

_BOM = b"\xef\xbb\xbf"
_MAX_BLANK_BYTES = 4096  # a larger file is taken for a caption without a look


@dataclass(frozen=True, slots=True)
class _Folder:
    """What the names of the files of a folder say.

    Attributes:
        shared_stems: case-folded stems of several files (`_shared_stems`).
        unusual: `sidecar_files.unusual_sidecars`.
    """

    shared_stems: frozenset[str]
    unusual: dict[str, str]


class SidecarSink:
    """Sink that writes each caption to a text file next to its image.

    A caption file that readers take for that of the image is used, whatever its form (a.jpg.txt, a.caption, a.TXT); a
    blank one counts as missing. Images of one folder that differ only in their ending (a.jpg, a.png) get `a.jpg.txt`
    and `a.png.txt`; an `a.txt` that is there is the caption of both and is never written.

    Args:
        mode: What happens to a caption file with content. "skip" leaves it as it is; "overwrite" replaces it; "append"
            and "prepend" add the caption as the last or first line, unless it is that line already, so a run can be
            repeated.
        notify: Called once with a message when images of a folder differ only in their ending.
        writer: Identity of the captioning model, for the record of the folder (`caption_record`); "" for none.
    """

    def __init__(
        self, mode: WriteMode = "skip", notify: Callable[[str], None] | None = None, writer: str = ""
    ) -> None:
        self.mode = mode
        self._writer = writer
        self._notify = notify
        self._folders: dict[str, _Folder] = {}

    def path(self, image: str) -> str:
        """Path that an image's caption is written to; no two images of a folder share one."""
        folder, name = os.path.split(image)
        if not is_image_name(name):
            return image + ".txt"
        stem = os.path.splitext(image)[0]
        current = self.current(image)
        if self._folder(folder).shared_stems.isdisjoint([os.path.basename(stem).casefold()]):
            return current or stem + ".txt"
        is_own = current is not None and os.path.splitext(current)[0] == image
        return current if current is not None and is_own else image + ".txt"

    def current(self, image: str) -> str | None:
        """Path of the caption file that readers take for that of the image; it may be shared with another image."""
        folder, name = os.path.split(image)
        if not is_image_name(name):
            return image + ".txt"
        return find_sidecar(image, CAPTION_EXTENSIONS, self._folder(folder).unusual)

    def check(self, image: str) -> Skipped | Failed | None:
        """None if the caption is needed and its file can be written; called before the image is read."""
        current = self.current(image) if self.mode == "skip" else None
        target = current or self.path(image)
        name = os.path.basename(target)
        try:
            mode = os.lstat(target).st_mode
        except FileNotFoundError:
            folder = os.path.dirname(target) or "."
            if not os.access(folder, os.W_OK | os.X_OK):
                return Failed(image, f"its folder cannot be written to, so {name} cannot be made")
            return None
        except OSError as error:
            return Failed(image, f"its caption file {name}: {os_error_reason(error)}")
        if stat.S_ISLNK(mode) and not (self.mode == "skip" and os.path.isfile(target)):
            return Failed(image, f"its caption file {name} is a link: put a plain file there, or remove it")
        if stat.S_ISDIR(mode):
            return Failed(image, f"its caption file {name} is a folder: rename the folder")
        if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
            return Failed(image, f"its caption file {name} is not a plain file")
        if self.mode == "skip" and not _is_blank(target):
            return Skipped(image, "it has a caption already")
        if not mode & 0o222 or not os.access(target, os.W_OK):
            kind = "empty and read-only" if _is_blank(target) else "read-only"
            return Failed(image, f"its caption file {name} is {kind}: change its permissions")
        return None

    def add(self, image: str, caption: Caption) -> Skipped | Failed | None:
        """Writes a caption that is not dropped; None on success."""
        if caption.dropped:
            return None
        obstacle = self.write(image, caption.text)
        if obstacle is None and self._writer:
            record_caption(image, caption.text, self._writer)
        return obstacle

    def note_skipped(self, image: str) -> None:
        """Does nothing: the caption file itself records that the image is done."""

    def commit(self) -> None:
        """Does nothing: every caption file is durable once it is written."""

    def finish(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""

    def write(self, image: str, caption: str) -> Skipped | Failed | None:
        """Writes one caption as UTF-8; None on success."""
        obstacle = self.check(image)  # again: the first check may be hours old
        if obstacle is not None:
            return obstacle
        target = self.path(image)
        try:
            return self._write(image, target, caption)
        except OSError as error:
            return Failed(image, f"its caption file {os.path.basename(target)}: {os_error_reason(error)}")

    def _write(self, image: str, target: str, caption: str) -> Skipped | Failed | None:
        line = caption.encode("utf-8", "backslashreplace")
        if self.mode == "overwrite":
            atomic_write(target, line + b"\n")
            return None
        try:
            if not os.path.lexists(target):
                shared = self.current(image) if self.mode in ("append", "prepend") else None
                if shared is not None and os.path.lexists(shared):
                    return self._add_line(image, shared, target, line)
                # exclusive: never replaces a file that a person made in the meantime
                atomic_write(target, line + b"\n", exclusive=True)
                return None
        except FileExistsError:
            pass
        if self.mode == "skip":
            if not _is_blank(target):
                return Skipped(image, "it was given a caption meanwhile")
            atomic_write(target, line + b"\n")
            return None
        return self._add_line(image, target, target, line)

    def _add_line(self, image: str, source: str, target: str, line: bytes) -> Skipped | Failed | None:
        """Writes the content of `source` with one more line to `target`."""
        try:
            present = read_plain_file(source, MAX_SIDECAR_BYTES)
        except ValueError as error:
            return Failed(image, str(error))
        try:
            present.decode("utf-8")
        except UnicodeDecodeError:
            return Failed(image, f"{os.path.basename(source)} is not UTF-8: convert it first")
        updated = add_line(present, line, first=self.mode == "prepend")
        if updated == present:
            return Skipped(image, "its caption file has this caption already")
        atomic_write(target, updated)
        return None

    def _folder(self, folder: str) -> _Folder:
        if folder not in self._folders:
            names = _list_names(folder or ".")
            stems = _shared_stems(folder, names)
            if stems and self._notify is not None:
                self._notify(
                    "Some images differ only in their ending (like a.jpg and a.png): "
                    "their captions go to a.jpg.txt and a.png.txt."
                )
                self._notify = None
            unusual = unusual_sidecars(os.path.join(folder, name) for name in names)
            self._folders[folder] = _Folder(stems, unusual)
            if os.access(folder or ".", os.W_OK):
                remove_stale_temporaries(folder or ".")
        return self._folders[folder]


def add_line(present: bytes, line: bytes, *, first: bool) -> bytes:
    """Text with one more line.

    Args:
        present: The text so far. It is kept byte for byte, with its byte order mark and line ends; only a missing
            newline at its end is added.
        line: The line, without newline.
        first: Add it as the first line, else as the last.

    Returns:
        The new text, or `present` if its first (last) line is `line` already.
    """
    bom, text = (_BOM, present[len(_BOM) :]) if present.startswith(_BOM) else (b"", present)
    if not text.strip():
        return bom + line + b"\n"
    newline = b"\r\n" if b"\r\n" in text else b"\n"
    body = text.rstrip(b"\r\n")
    last_newline = b"" if text.endswith(b"\n") else newline
    if not first:
        if body == line or body.endswith(b"\n" + line):
            return present
        return bom + text + last_newline + line + newline
    if body == line or text.startswith((line + b"\n", line + b"\r\n")):
        return present
    return bom + line + newline + text + last_newline


def _is_blank(path: str) -> bool:
    """Whether a file is a plain one without any text."""
    try:
        return os.path.getsize(path) <= _MAX_BLANK_BYTES and not (
            read_plain_file(path).removeprefix(_BOM).strip(b" \t\r\n")
        )
    except (OSError, ValueError):
        return False


def _list_names(folder: str) -> list[str]:
    """Names in a folder; none if it cannot be listed: then each image counts as the only one of its stem."""
    try:
        with os.scandir(folder) as listing:
            return [entry.name for entry in listing]
    except OSError:
        return []


def _shared_stems(folder: str, names: Sequence[str]) -> frozenset[str]:
    """Case-folded stems whose `stem.txt` is no unique name: of two images, or the full name of another file.

    Example: for a.jpg, a.png, b, b.jpg the stems are "a" (two images) and "b" (`b` itself would get `b.txt`).
    """
    stems: set[str] = set()
    shared: set[str] = set()
    for name in names:
        if is_image_name(name):
            stem = os.path.splitext(name)[0].casefold()
            (shared if stem in stems else stems).add(stem)
    # Also `photo` (no ending) next to `photo.jpg`, or `a.jpg` next to `a.jpg.png`.
    for name in names:
        if name.casefold() in stems and not os.path.isdir(os.path.join(folder, name)):
            shared.add(name.casefold())
    return frozenset(shared)
