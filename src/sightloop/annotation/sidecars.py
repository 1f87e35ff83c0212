"""Captions beside their images: `photo.txt` for `photo.jpg`, written whole or not at all."""

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
_LARGEST = 16 * 1024 * 1024  # bytes; a caption file beyond this is something else


class SidecarSink:
    """Where the caption of an image goes, and how.

    skip: a caption file that exists is never touched. overwrite: it is replaced. append, prepend: the caption becomes a
    line of its own after or before what is there, unless it stands there already, so that a run can be repeated.

    Images of one folder that differ only in their ending (a.jpg, a.png) get `a.jpg.txt` and `a.png.txt`; `notify`
    is then told so, once.
    """

    def __init__(self, mode: WriteMode = "skip", notify: Callable[[str], None] | None = None) -> None:
        self.mode = mode
        self._notify = notify
        self._crowded: dict[
            str, frozenset[str]
        ] = {}  # folder -> stems (case folded) that more than one file claims

    def path(self, picture: str) -> str:
        """The caption file of an image: no two images of a folder ever share one."""
        folder, name = os.path.split(picture)
        stem, _ = os.path.splitext(name)
        if not is_image_name(name) or stem.casefold() in self._stems_to_avoid(folder):
            return picture + ".txt"
        return os.path.join(folder, stem + ".txt")

    def check(self, picture: str) -> Skipped | Failed | None:
        """Before the image is read: None where its caption is wanted and can be written."""
        target = self.path(picture)
        name = os.path.basename(target)
        try:
            mode = os.lstat(target).st_mode
        except FileNotFoundError:
            folder = os.path.dirname(target) or "."
            if not os.access(folder, os.W_OK | os.X_OK):
                return Failed(picture, f"its folder cannot be written to, so {name} cannot be made")
            return None
        except OSError as error:
            return Failed(picture, f"its caption file {name}: {os_error_reason(error)}")
        if stat.S_ISLNK(mode) and not (self.mode == "skip" and os.path.isfile(target)):
            return Failed(picture, f"its caption file {name} is a link: put a plain file there, or remove it")
        if stat.S_ISDIR(mode):
            return Failed(picture, f"its caption file {name} is a folder: rename the folder")
        if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
            return Failed(picture, f"its caption file {name} is not a plain file")
        if self.mode == "skip":
            return Skipped(picture, "it has a caption already")
        if not mode & 0o222 or not os.access(target, os.W_OK):
            return Failed(picture, f"its caption file {name} is read-only")
        return None

    def keep(self, picture: str, caption: Caption) -> Skipped | Failed | None:
        """Writes one caption that is not dropped; None where all went well."""
        return None if caption.dropped else self.write(picture, caption.text)

    def skipped(self, picture: str) -> None:
        """Nothing to remember: the caption file itself says that the image is done."""

    def commit(self) -> None:
        """Nothing to do: every caption file is whole as soon as it is there."""

    def finish(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do either."""

    def write(self, picture: str, caption: str) -> Skipped | Failed | None:
        """Writes one caption, UTF-8; None where that was done."""
        obstacle = self.check(picture)  # again: hours may have passed since the first look
        if obstacle is not None:
            return obstacle
        target = self.path(picture)
        try:
            return self._write(picture, target, caption)
        except OSError as error:
            return Failed(picture, f"its caption file {os.path.basename(target)}: {os_error_reason(error)}")

    def _write(self, picture: str, target: str, caption: str) -> Skipped | Failed | None:
        line = caption.encode("utf-8", "backslashreplace")
        if self.mode == "overwrite":
            atomic_write(target, line + b"\n")
            return None
        try:
            if not os.path.lexists(target):
                atomic_write(
                    target, line + b"\n", exclusive=True
                )  # never replaces what a person made meanwhile
                return None
        except FileExistsError:
            pass
        if self.mode == "skip":
            return Skipped(picture, "it was given a caption meanwhile")
        if os.path.getsize(target) > _LARGEST:
            return Failed(picture, f"{os.path.basename(target)} is too large for a caption file")
        with open(target, "rb") as file:
            present = file.read()
        try:
            present.decode("utf-8")
        except UnicodeDecodeError:
            return Failed(picture, f"{os.path.basename(target)} is not UTF-8: convert it first")
        joined = joined_lines(present, line, first=self.mode == "prepend")
        if joined == present:
            return Skipped(picture, "its caption file has this caption already")
        atomic_write(target, joined)
        return None

    def _stems_to_avoid(self, folder: str) -> frozenset[str]:
        if folder not in self._crowded:
            crowded = _crowded_stems(folder or ".")
            if crowded and self._notify is not None:
                self._notify(
                    "Some images differ only in their ending (like a.jpg and a.png): "
                    "their captions go to a.jpg.txt and a.png.txt."
                )
                self._notify = None
            self._crowded[folder] = crowded
            if os.access(folder or ".", os.W_OK):
                remove_stale_temporaries(folder or ".")
        return self._crowded[folder]


def joined_lines(present: bytes, line: bytes, *, first: bool) -> bytes:
    """`present` with `line` as its last line, or its `first`; equal to `present` where it is that already.

    What is there is kept byte for byte, its byte order mark and its line ends too; only a missing end of the last
    line is added.
    """
    bom, text = (_BOM, present[len(_BOM) :]) if present.startswith(_BOM) else (b"", present)
    if not text.strip():
        return bom + line + b"\n"
    end = b"\r\n" if b"\r\n" in text else b"\n"
    body = text.rstrip(b"\r\n")
    if not first:
        if body == line or body.endswith(b"\n" + line):
            return present
        return bom + text + (b"" if text.endswith(b"\n") else end) + line + end
    if body == line or text.startswith((line + b"\n", line + b"\r\n")):
        return present
    return bom + line + end + text + (b"" if text.endswith(b"\n") else end)


def _crowded_stems(folder: str) -> frozenset[str]:
    """The stems of which a plain `stem.txt` would serve two images, or would be the full name of another's file."""
    try:
        with os.scandir(folder) as listing:
            names = [entry.name for entry in listing]
    except OSError:  # it may be entered but not listed: then each named file is taken to be alone
        return frozenset()
    seen: set[str] = set()
    twice: set[str] = set()
    for name in names:
        if is_image_name(name):
            stem = os.path.splitext(name)[0].casefold()
            (twice if stem in seen else seen).add(stem)
    # `photo` (no ending) beside `photo.jpg`, or `a.jpg` beside `a.jpg.png`: the full name plus .txt is taken.
    for name in names:
        if name.casefold() in seen and not os.path.isdir(os.path.join(folder, name)):
            twice.add(name.casefold())
    return frozenset(twice)
