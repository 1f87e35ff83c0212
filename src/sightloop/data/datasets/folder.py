"""Images in a folder and all folders in it, with what stands beside them: photo.txt, photo.json."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sightloop.data.datasets import schema
from sightloop.data.images.decode import EXTENSIONS
from sightloop.types import JsonDict, Sample

SIDECARS = (".txt", ".json")
MARKER = ".sightloop.json"  # in a folder that `convert` has written: its labels stand in sidecars
LARGEST = 16 * 1024 * 1024  # bytes of a sidecar


class FolderSource:
    """A source: one sample an image, sorted by path. The key is the path without its ending, or with it where two
    images differ in nothing else.

    photo.txt (photo.jpg.txt goes first) holds one caption a line. photo.json holds fields (see `records`); its
    captions count only where the .txt has none, because the .txt is what people and `sightloop caption` edit.

    classes: whether the first folder of the path is the label. None: it is where every image lies in a folder of
    the top one, there are two such folders or more, no image has a sidecar, and `convert` did not write it.
    """

    def __init__(self, root: Path, classes: bool | None = None) -> None:
        self._root, self.name = str(root), root.name
        self._lost: list[tuple[str, str]] = []  # folders that cannot be listed
        self._names: list[str] = []
        has_sidecars = False
        for names, others in self._walk():
            self._names += names
            has_sidecars = has_sidecars or not {os.path.splitext(n)[0] for n in others}.isdisjoint(
                (*names, *(os.path.splitext(n)[0] for n in names))
            )
        folders = {name.partition("/")[0] for name in self._names}
        flat = len(folders) > 1 and not has_sidecars and all(name.count("/") == 1 for name in self._names)
        flat = flat and not os.path.lexists(os.path.join(self._root, MARKER))
        self._classes = flat if classes is None else classes
        shown = ", ".join(sorted(folders)[:5]) + (", ..." if len(folders) > 5 else "")
        self.notes = (f"{len(folders):,} folders are taken as classes: {shown}",) if self._classes else ()
        stems = Counter(os.path.splitext(name)[0] for name in self._names)
        self._crowded = frozenset(stem for stem, count in stems.items() if count > 1)

    def __len__(self) -> int:
        return len(self._names) + len(self._lost)

    def hashes(self) -> Iterator[int]:
        """key_hash() of every key."""
        return (schema.key_hash(self.key(index)) for index in range(len(self)))

    def key(self, index: int) -> str:
        """The key of a record."""
        if index >= len(self._names):
            return self._lost[index - len(self._names)][0]
        stem = os.path.splitext(self._names[index])[0]
        return self._names[index] if stem in self._crowded else unescape_key(stem)

    def sample(self, index: int, key: str) -> Sample:
        """The record under its key. Raises ValueError or OSError where it is broken."""
        if index >= len(self._names):
            raise ValueError(self._lost[index - len(self._names)][1])
        name = self._names[index]
        path = os.path.join(self._root, name)
        if not os.path.isfile(path):
            raise ValueError(f"there is no file {path}")
        text, record = (_sidecar(path, ending) for ending in SIDECARS)
        fields: JsonDict = {} if record is None else schema.json_object(record[1], record[0])
        captions = () if text is None else schema.lines(text[1], text[0])
        if captions:
            fields = {k: v for k, v in fields.items() if k.lower() not in schema.CAPTION_FIELDS}
            fields["captions"] = captions
        if self._classes and "/" in name:
            fields.setdefault("label", name.partition("/")[0])
        return schema.sample_from_fields(key, Path(path), fields)

    def digest(self) -> str:
        """Of the names and sizes of the images and the contents of their sidecars."""
        whole = hashlib.sha256()
        for name in self._names:
            path = os.path.join(self._root, name)
            size = os.path.getsize(path) if os.path.isfile(path) else -1
            beside = [_sidecar(path, ending) for ending in SIDECARS]
            whole.update(repr((os.fsencode(name), size, beside)).encode("utf-8", "surrogateescape"))
        return whole.hexdigest()

    def _walk(self) -> Iterator[tuple[list[str], list[str]]]:
        """The images and the sidecars of each folder, as paths from the root; each real folder once."""
        seen: set[tuple[int, int]] = set()

        def lose(error: OSError) -> None:
            reason = (error.strerror or str(error)).lower()
            self._lost.append((str(error.filename), f"the folder cannot be listed: {reason}"))

        for folder, below, files in os.walk(self._root, onerror=lose, followlinks=True):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                below.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            below[:] = sorted(name for name in below if not name.startswith("."))
            relative = os.path.relpath(folder, self._root).replace(os.sep, "/")
            start = "" if relative == "." else f"{relative}/"
            pictures = [start + name for name in sorted(files) if is_image_name(name)]
            yield pictures, [start + name for name in files if os.path.splitext(name)[1] in SIDECARS]


def is_image_name(name: str) -> bool:
    """Whether the ending of a file name is one of an image; the companion files `._*` of macOS are none."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not os.path.basename(name).startswith("._")


_UNSAFE = frozenset('%\\:*?"<>|\x7f') | {chr(code) for code in range(32)}
_ESCAPES = {f"%{ord(character):02X}": character for character in _UNSAFE | set("._")}


def escape_key(key: str, dots: bool = False) -> str:
    """A key as a path that no system takes amiss: %XX for what names cannot hold; different keys stay different.

    dots: escape dots in the last part too, as in archives where the first one ends the key.
    """
    parts = key.split("/")
    for i, part in enumerate(parts):
        safe = "".join(f"%{ord(c):02X}" if c in _UNSAFE else c for c in part)
        if (dots and i == len(parts) - 1) or os.path.splitext(safe)[1].lower() in EXTENSIONS.union(SIDECARS):
            safe = safe.replace(".", "%2E")
        if safe.startswith((".", "__")):  # hidden in folders; in archives so is what begins like __MACOSX
            safe = f"%{ord(safe[0]):02X}{safe[1:]}"
        parts[i] = safe or "%2F"
    return "/".join(parts)


def unescape_key(name: str) -> str:
    """The key from which `escaped` made this name."""
    if "%" not in name:
        return name
    parts = ["" if part == "%2F" else part for part in name.split("/")]
    pieces = "/".join(parts).split("%")
    text = pieces[0]
    for piece in pieces[1:]:
        known = _ESCAPES.get(f"%{piece[:2]}")
        text += f"%{piece}" if known is None else known + piece[2:]
    return text


def _sidecar(picture: str, ending: str) -> tuple[str, bytes] | None:
    """The name and the contents of what stands beside an image."""
    for path in (picture + ending, os.path.splitext(picture)[0] + ending):
        try:
            with open(path, "rb") as file:
                data = file.read(LARGEST + 1)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ValueError(f"{os.path.basename(path)}: {(error.strerror or str(error)).lower()}") from error
        if len(data) > LARGEST:
            raise ValueError(f"{os.path.basename(path)} is too large to stand beside an image")
        return os.path.basename(path), data
    return None
