"""Finder of the images that command-line arguments name: files, folders and globs, in a stable order."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Literal

from sightloop.data.datasets.sidecar_files import sidecar_alias
from sightloop.data.image_names import EXTENSIONS, is_image_name, is_video_name, is_visual_name
from sightloop.data.images.headers import image_format, unknown_format_reason
from sightloop.errors import os_error_reason, similar_path
from sightloop.types import Failed, Skipped

_FolderId = tuple[int, int]
_HEAD_BYTES = 4096
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def find_images(
    arguments: Iterable[str | PathLike[str]], kind: Literal["image", "video", "image or video"] = "image"
) -> Iterator[str | Skipped | Failed]:
    """Yields the path of every image that the arguments name, each once, in the order of the arguments.

    * A folder: its images and those of its subfolders, known by their ending, sorted by name; the folder's own come
      first. Hidden folders (".git") are left out unless they are named. Links to folders are followed last, and
      each real folder is visited once, so cycles of links end.
    * A file: taken whatever its ending; only the caption file of an image, which `photos/*` also matches, is
      `Skipped`.
    * A glob that the shell has not expanded, also with `**`: each match is treated as above, but files count only if
      their ending is that of an image, or that of the pattern ("*.dat").

    Yields `Failed` for what cannot be found, listed or read as a file, for a URL, and for a glob without a match.
    Folders without an image come last: `Skipped`, or `Failed` if the whole search found nothing. With another kind the
    same holds of videos, or of both.

    Memory grows with the arguments, the number of folders and the largest single folder, not with the number of images.
    """
    finder = _Finder(kind, {"image": is_image_name, "video": is_video_name}.get(kind, is_visual_name))
    for argument in arguments:
        yield from finder.argument(os.fspath(argument))
    yield from finder.finish()


def is_image_file(path: str) -> bool:
    """Whether a path is that of a file with the ending of an image."""
    return is_image_name(path) and os.path.isfile(path)


def not_an_image(path: str) -> str:
    """Why a file is no image, by its first bytes; "" if it may be one, is named as a video, or cannot be read."""
    if is_video_name(path):
        return ""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
    except (OSError, ValueError):
        return ""  # the decoder says why
    if not head:
        return "an empty file"
    return "" if image_format(head) else unknown_format_reason(head)


class _Finder:
    """State of one search: the folders listed and the files yielded so far, so that nothing comes twice."""

    def __init__(self, kind: str, is_wanted: Callable[[str], bool]) -> None:
        self._kind, self._is_wanted = kind, is_wanted
        self._listed: set[_FolderId] = set()
        self._files: set[tuple[_FolderId, str]] = set()
        self._last_parent: tuple[str, _FolderId] | None = None
        self._has_items = False
        self._is_empty = False  # the current folder, so far
        self._empty_folders: list[str] = []

    def argument(self, path: str) -> Iterator[str | Skipped | Failed]:
        if _URL.match(path):
            self._has_items = True
            yield Failed(path, "a URL is not read: download the image first (curl -O URL), and name the file")
        elif glob.has_magic(path) and not os.path.lexists(path):
            for item in self._glob(path):
                self._has_items = True
                yield item
        else:
            self._is_empty = os.path.isdir(path)
            for item in self._path(path):
                self._is_empty, self._has_items = False, True
                yield item
            if self._is_empty:
                self._empty_folders.append(path)

    def finish(self) -> Iterator[Skipped | Failed]:
        """The folders without an image: `Failed` if the whole search found nothing, else `Skipped`."""
        for folder in self._empty_folders:
            kind = Skipped if self._has_items else Failed
            yield kind(folder, f"the folder and its subfolders have no {self._kind}")

    def _path(self, path: str) -> Iterator[str | Skipped | Failed]:
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            link = os.path.islink(path)
            yield Failed(
                path, "a link that leads nowhere" if link else f"no such file or folder{similar_path(path)}"
            )
            return
        except OSError as error:
            yield Failed(path, os_error_reason(error))
            return
        if stat.S_ISDIR(mode):
            yield from self._walk(path)
        elif not self._is_new(path):
            return
        elif not stat.S_ISREG(mode):
            yield Failed(path, "neither a file nor a folder")
        elif _is_sidecar(path):
            yield Skipped(path, "it is the caption file of an image")
        else:
            yield path

    def _is_new(self, path: str) -> bool:
        """Whether this file was not yielded before, by name or with its folder; records it."""
        parent, name = os.path.split(path)
        if self._last_parent is None or self._last_parent[0] != parent:
            self._last_parent = (parent, _folder_id(parent or "."))
        folder = self._last_parent[1]
        if (folder, name) in self._files or (folder in self._listed and self._is_wanted(name)):
            return False
        self._files.add((folder, name))
        return True

    def _glob(self, pattern: str) -> Iterator[str | Skipped | Failed]:
        base, relative_pattern = _split_pattern(pattern)
        with_hidden = any(part.startswith(".") for part in Path(relative_pattern).parts)
        ending = os.path.splitext(pattern)[1]
        any_ending = bool(ending) and not glob.has_magic(ending)
        has_match = False
        try:
            # pathlib does not follow links under `**`, so cycles of links end; glob.glob would not stop.
            matches = sorted(str(match) for match in Path(base).glob(relative_pattern))
        except (OSError, ValueError, NotImplementedError) as error:
            yield Failed(pattern, f"not a usable glob: {error}")
            return
        for match in matches:
            relative = Path(os.path.relpath(match, base)).parts
            is_folder = os.path.isdir(match)
            folders = relative if is_folder else relative[:-1]
            if not with_hidden and any(part.startswith(".") and part not in (".", "..") for part in folders):
                continue
            if is_folder or any_ending or self._is_wanted(match):
                has_match = True
                yield from self._path(match)
        if not has_match:
            yield Failed(
                pattern, f"the pattern matches no {self._kind}" if matches else "the pattern matches nothing"
            )

    def _walk(self, top: str) -> Iterator[str | Failed]:
        folders, links = [top], deque[str]()
        while folders or links:
            folder = folders.pop() if folders else links.popleft()
            try:
                identity = _folder_id(folder)
                if identity in self._listed:
                    self._is_empty = False
                    continue
                with os.scandir(folder) as listing:
                    entries = sorted(listing, key=lambda entry: entry.name)
            except OSError as error:
                yield Failed(folder, f"the folder cannot be listed: {os_error_reason(error)}")
                continue
            self._listed.add(identity)
            below: list[str] = []
            for entry in entries:
                kind = _kind(entry)
                if kind == "folder":
                    if not entry.name.startswith("."):
                        (links if entry.is_symlink() else below).append(entry.path)
                elif not self._is_wanted(entry.name):
                    continue
                elif (identity, entry.name) in self._files:
                    self._is_empty = False
                elif kind == "file":
                    yield entry.path
                else:
                    yield Failed(entry.path, kind)
            folders.extend(reversed(below))


def _kind(entry: os.DirEntry[str]) -> str:
    """Returns "folder", "file", or the reason why it is neither."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        is_broken = entry.is_symlink() and not os.path.exists(entry.path)
        return "a link that leads nowhere" if is_broken else "neither a file nor a folder"
    except OSError as error:  # for example a link to itself
        return os_error_reason(error)


def _folder_id(folder: str) -> _FolderId:
    status = os.stat(folder)
    return (status.st_dev, status.st_ino)


def _is_sidecar(path: str) -> bool:
    """Whether this is `a.txt`, `a.caption` or `a.json` next to an image `a.*`, or `a.jpg.txt` next to `a.jpg`."""
    if sidecar_alias(path) is None:
        return False
    stem = os.path.splitext(path)[0]
    images = (stem + form for extension in EXTENSIONS for form in (extension, extension.upper()))
    return (is_image_name(stem) and os.path.isfile(stem)) or any(os.path.isfile(name) for name in images)


def _split_pattern(pattern: str) -> tuple[str, str]:
    """Splits a glob at its first wildcard: "a/b/*/c.jpg" -> ("a/b", "*/c.jpg")."""
    parts = Path(pattern).parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return str(Path(*parts[:first])), str(Path(*parts[first:]))
