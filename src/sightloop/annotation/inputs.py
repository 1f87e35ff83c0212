"""Finding the images that a command line names: files, folders, globs; each once, in a stable order."""

from __future__ import annotations

import glob
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path

from sightloop.data.datasets.folder import is_image_name
from sightloop.data.images.decode import EXTENSIONS
from sightloop.errors import os_error_reason
from sightloop.types import Failed, Skipped

_FolderId = tuple[int, int]


def find_images(arguments: Iterable[str | PathLike[str]]) -> Iterator[str | Skipped | Failed]:
    """Yields the path of every image that the arguments name, in the order of the arguments.

    * A folder gives the images in it and below it, known by their ending: first its own, then those of its folders,
      each sorted by name. Hidden folders (".git") are left out unless they are named; links to folders are followed
      last, and each real folder is visited once, so circles of links end.
    * A file is taken whatever its ending. Only a caption file beside its image, as `photos/*` brings it along, is
      `Skipped`.
    * A glob that the shell has not expanded is expanded here, `**` too; each match is then treated as above, except
      that files count only if their ending, or that of the pattern itself ("*.dat"), says that they are wanted.

    What cannot be found, listed or read as a file, and a glob that matches nothing, comes as `Failed`, in its place.
    A file that is named twice comes once. Memory grows with the arguments, the number of folders and the largest single
    folder, not with the number of images.
    """
    finder = _Finder()
    for argument in arguments:
        yield from finder.argument(os.fspath(argument))


class _Finder:
    """Remembers which folders were listed and which files were named, so that nothing comes twice."""

    def __init__(self) -> None:
        self._folders: set[_FolderId] = set()
        self._files: set[tuple[_FolderId, str]] = set()
        self._last_parent: tuple[str, _FolderId] | None = None

    def argument(self, path: str) -> Iterator[str | Skipped | Failed]:
        if glob.has_magic(path) and not os.path.lexists(path):
            yield from self._glob(path)
        else:
            yield from self._path(path)

    def _path(self, path: str) -> Iterator[str | Skipped | Failed]:
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            link = os.path.islink(path)
            yield Failed(path, "a link that leads nowhere" if link else "no such file or folder")
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
        elif _is_caption_file(path):
            yield Skipped(path, "it is the caption file of an image")
        else:
            yield path

    def _is_new(self, path: str) -> bool:
        """Whether this file has not come yet, neither by its name nor with its folder; marks it as come."""
        parent, name = os.path.split(path)
        if self._last_parent is None or self._last_parent[0] != parent:
            self._last_parent = (parent, _folder_id(parent or "."))
        folder = self._last_parent[1]
        if (folder, name) in self._files or (folder in self._folders and is_image_name(name)):
            return False
        self._files.add((folder, name))
        return True

    def _glob(self, pattern: str) -> Iterator[str | Skipped | Failed]:
        base, rest = _split_pattern(pattern)
        wants_hidden = any(part.startswith(".") for part in Path(rest).parts)
        ending = os.path.splitext(pattern)[1]
        wants_any = bool(ending) and not glob.has_magic(ending)
        found = False
        try:
            # pathlib does not follow links under `**`, so circles of links end; glob.glob would go round and round.
            matches = sorted(str(match) for match in Path(base).glob(rest))
        except (OSError, ValueError, NotImplementedError) as error:
            yield Failed(pattern, f"not a usable glob: {error}")
            return
        for match in matches:
            relative = Path(os.path.relpath(match, base)).parts
            is_folder = os.path.isdir(match)
            folders = relative if is_folder else relative[:-1]
            if not wants_hidden and any(part.startswith(".") and part not in (".", "..") for part in folders):
                continue
            if is_folder or wants_any or is_image_name(match):
                found = True
                yield from self._path(match)
        if not found:
            yield Failed(
                pattern, "the pattern matches no image" if matches else "the pattern matches nothing"
            )

    def _walk(self, top: str) -> Iterator[str | Failed]:
        folders, links = [top], deque[str]()
        while folders or links:
            folder = folders.pop() if folders else links.popleft()
            try:
                identity = _folder_id(folder)
                if identity in self._folders:
                    continue
                with os.scandir(folder) as listing:
                    entries = sorted(listing, key=lambda entry: entry.name)
            except OSError as error:
                yield Failed(folder, f"the folder cannot be listed: {os_error_reason(error)}")
                continue
            self._folders.add(identity)
            below: list[str] = []
            for entry in entries:
                kind = _kind(entry)
                if kind == "folder":
                    if not entry.name.startswith("."):
                        (links if entry.is_symlink() else below).append(entry.path)
                elif not is_image_name(entry.name) or (identity, entry.name) in self._files:
                    continue
                elif kind == "file":
                    yield entry.path
                else:
                    yield Failed(entry.path, kind)
            folders.extend(reversed(below))


def _kind(entry: os.DirEntry[str]) -> str:
    """ "folder", "file", or why it is neither."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "a link that leads nowhere" if entry.is_symlink() else "neither a file nor a folder"
    except OSError as error:  # a link to itself
        return os_error_reason(error)


def _folder_id(folder: str) -> _FolderId:
    status = os.stat(folder)
    return (status.st_dev, status.st_ino)


def _is_caption_file(path: str) -> bool:
    """Whether this is `a.txt` beside an image `a.*`, or `a.jpg.txt` beside `a.jpg`."""
    stem, ending = os.path.splitext(path)
    if ending != ".txt":
        return False
    beside = (stem + form for known in EXTENSIONS for form in (known, known.upper()))
    return (is_image_name(stem) and os.path.isfile(stem)) or any(os.path.isfile(name) for name in beside)


def _split_pattern(pattern: str) -> tuple[str, str]:
    """Cuts a glob into the folder that it starts from and the pattern from its first wildcard on."""
    parts = Path(pattern).parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return str(Path(*parts[:first])), str(Path(*parts[first:]))
