"""Caption sidecars: `photo.txt` for `photo.jpg`, written by atomic rename."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Literal, TypeAlias

from sightloop.annotation.captioning import Caption
from sightloop.annotation.inputs import is_image_name
from sightloop.data.atomic import atomic_write, remove_stale_temporaries
from sightloop.errors import os_error_reason
from sightloop.types import Failed, Skipped

WriteMode: TypeAlias = Literal["skip", "overwrite", "append", "prepend"]

_BOM = b"\xef\xbb\xbf"
_MAX_BYTES = 16 * 1024 * 1024  # a larger file is no caption file


class SidecarSink:
    """Sink that writes each caption to a text file next to its image.

    Images of one folder that differ only in their ending (a.jpg, a.png) get `a.jpg.txt` and `a.png.txt`.

    Args:
        mode: What happens to a caption file that exists. "skip" leaves it as it is; "overwrite" replaces it; "append"
            and "prepend" add the caption as the last or first line, unless it is that line already, so a run can be
            repeated.
        notify: Called once with a message when images of a folder differ only in their ending.
    """

    def __init__(self, mode: WriteMode = "skip", notify: Callable[[str], None] | None = None) -> None:
        self.mode = mode
        self._notify = notify
        self._shared_stems: dict[str, frozenset[str]] = {}  # folder -> case-folded stems of several files

    def path(self, image: str) -> str:
        """Path of an image's caption file; no two images of a folder share one."""
        folder, name = os.path.split(image)
        stem, _ = os.path.splitext(name)
        if not is_image_name(name) or stem.casefold() in self._stems_to_avoid(folder):
            return image + ".txt"
        return os.path.join(folder, stem + ".txt")

    def check(self, image: str) -> Skipped | Failed | None:
        """None if the caption is needed and its file can be written; called before the image is read."""
        target = self.path(image)
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
        if self.mode == "skip":
            return Skipped(image, "it has a caption already")
        if not mode & 0o222 or not os.access(target, os.W_OK):
            return Failed(image, f"its caption file {name} is read-only")
        return None

    def add(self, image: str, caption: Caption) -> Skipped | Failed | None:
        """Writes a caption that is not dropped; None on success."""
        return None if caption.dropped else self.write(image, caption.text)

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
                # exclusive: never replaces a file that a person made in the meantime
                atomic_write(target, line + b"\n", exclusive=True)
                return None
        except FileExistsError:
            pass
        if self.mode == "skip":
            return Skipped(image, "it was given a caption meanwhile")
        if os.path.getsize(target) > _MAX_BYTES:
            return Failed(image, f"{os.path.basename(target)} is too large for a caption file")
        with open(target, "rb") as file:
            present = file.read()
        try:
            present.decode("utf-8")
        except UnicodeDecodeError:
            return Failed(image, f"{os.path.basename(target)} is not UTF-8: convert it first")
        updated = add_line(present, line, first=self.mode == "prepend")
        if updated == present:
            return Skipped(image, "its caption file has this caption already")
        atomic_write(target, updated)
        return None

    def _stems_to_avoid(self, folder: str) -> frozenset[str]:
        if folder not in self._shared_stems:
            stems = _shared_stems(folder or ".")
            if stems and self._notify is not None:
                self._notify(
                    "Some images differ only in their ending (like a.jpg and a.png): "
                    "their captions go to a.jpg.txt and a.png.txt."
                )
                self._notify = None
            self._shared_stems[folder] = stems
            if os.access(folder or ".", os.W_OK):
                remove_stale_temporaries(folder or ".")
        return self._shared_stems[folder]


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


def _shared_stems(folder: str) -> frozenset[str]:
    """Case-folded stems whose `stem.txt` is no unique name: of two images, or the full name of another file.

    Example: for a.jpg, a.png, b, b.jpg the stems are "a" (two images) and "b" (`b` itself would get `b.txt`).
    """
    try:
        with os.scandir(folder) as listing:
            names = [entry.name for entry in listing]
    except OSError:  # a folder that cannot be listed: each image counts as the only one of its stem
        return frozenset()
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
