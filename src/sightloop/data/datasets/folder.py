"""Images in a folder and its subfolders, with sidecars: photo.txt, photo.json. Escaping of keys as file names."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sightloop.data.datasets import schema
from sightloop.data.image_names import EXTENSIONS, is_image_name
from sightloop.types import JsonDict, Sample

SIDECAR_EXTENSIONS = (".txt", ".json")
MARKER_NAME = ".sightloop.json"  # file in a folder written by `convert`, whose labels are in sidecars
MAX_SIDECAR_BYTES = 16 * 1024 * 1024


class FolderSource:
    """Source of the images of a folder and its subfolders, sorted by path.

    The key is the path without its extension, or with it where two images differ in nothing else.

    photo.txt (or photo.jpg.txt, which has precedence) holds one caption per line. photo.json holds fields (see
    `schema`); its captions count only if the .txt has none, because people and `sightloop caption` edit the .txt.
    """

    def __init__(self, root: Path, classes: bool | None = None) -> None:
        """Lists the folder.

        Args:
            root: the folder.
            classes: whether the first subfolder of a path is the label. None: yes, if every image is in a subfolder of
                `root`, there are two of them or more, no image has a sidecar, and `convert` did not write the folder.
        """
        self._root, self.name = str(root), root.name
        self._unlistable: list[tuple[str, str]] = []  # folders that cannot be listed: path, reason
        self._names: list[str] = []
        has_sidecars = False
        for images, sidecars in self._walk():
            self._names += images
            # photo.txt belongs to photo.jpg, and so does photo.jpg.txt.
            has_sidecars = has_sidecars or not {os.path.splitext(name)[0] for name in sidecars}.isdisjoint(
                (*images, *(os.path.splitext(name)[0] for name in images))
            )
        folders = {name.partition("/")[0] for name in self._names}
        is_flat = len(folders) > 1 and not has_sidecars and all(name.count("/") == 1 for name in self._names)
        is_flat = is_flat and not os.path.lexists(os.path.join(self._root, MARKER_NAME))
        self._classes = is_flat if classes is None else classes
        listed = ", ".join(sorted(folders)[:5]) + (", ..." if len(folders) > 5 else "")
        self.notes = (f"{len(folders):,} folders are taken as classes: {listed}",) if self._classes else ()
        stems = Counter(os.path.splitext(name)[0] for name in self._names)
        self._ambiguous_stems = frozenset(stem for stem, count in stems.items() if count > 1)

    def __len__(self) -> int:
        return len(self._names) + len(self._unlistable)

    def key_hashes(self) -> Iterator[int]:
        """`schema.key_hash` of every key."""
        return (schema.key_hash(self.key(index)) for index in range(len(self)))

    def key(self, index: int) -> str:
        """The key of a record."""
        if index >= len(self._names):
            return self._unlistable[index - len(self._names)][0]
        stem = os.path.splitext(self._names[index])[0]
        return self._names[index] if stem in self._ambiguous_stems else unescape_key(stem)

    def sample(self, index: int, key: str) -> Sample:
        """The record under its key. Raises ValueError or OSError if it is broken."""
        if index >= len(self._names):
            raise ValueError(self._unlistable[index - len(self._names)][1])
        name = self._names[index]
        path = os.path.join(self._root, name)
        if not os.path.isfile(path):
            raise ValueError(f"there is no file {path}")
        text, json_file = (_read_sidecar(path, extension) for extension in SIDECAR_EXTENSIONS)
        fields: JsonDict = {} if json_file is None else schema.json_object(json_file[1], json_file[0])
        captions = () if text is None else schema.split_captions(text[1], text[0])
        if captions:
            fields = {k: v for k, v in fields.items() if k.lower() not in schema.CAPTION_FIELDS}
            fields["captions"] = captions
        if self._classes and "/" in name:
            fields.setdefault("label", name.partition("/")[0])
        return schema.sample_from_fields(key, Path(path), fields)

    def digest(self) -> str:
        """SHA-256 of the names and sizes of the images and the contents of their sidecars."""
        digest = hashlib.sha256()
        for name in self._names:
            path = os.path.join(self._root, name)
            size = os.path.getsize(path) if os.path.isfile(path) else -1
            sidecars = [_read_sidecar(path, extension) for extension in SIDECAR_EXTENSIONS]
            digest.update(repr((os.fsencode(name), size, sidecars)).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def _walk(self) -> Iterator[tuple[list[str], list[str]]]:
        """The images and the sidecars of each folder, as paths from the root. Links are followed, each folder once."""
        visited: set[tuple[int, int]] = set()  # device, inode

        def note_error(error: OSError) -> None:
            reason = (error.strerror or str(error)).lower()
            self._unlistable.append((str(error.filename), f"the folder cannot be listed: {reason}"))

        for folder, subfolders, files in os.walk(self._root, onerror=note_error, followlinks=True):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in visited:
                subfolders.clear()
                continue
            visited.add((status.st_dev, status.st_ino))
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            relative = os.path.relpath(folder, self._root).replace(os.sep, "/")
            prefix = "" if relative == "." else f"{relative}/"
            images = [prefix + name for name in sorted(files) if is_image_name(name)]
            yield images, [prefix + name for name in files if os.path.splitext(name)[1] in SIDECAR_EXTENSIONS]


# Characters that a file name cannot hold on every system; "." and "_" are escaped in some places.
_UNSAFE = frozenset('%\\:*?"<>|\x7f') | {chr(code) for code in range(32)}
_ESCAPES = {f"%{ord(character):02X}": character for character in _UNSAFE | set("._")}


def escape_key(key: str, dots: bool = False) -> str:
    """A key as a relative path that is valid on every system. Different keys give different paths.

        "a:b" -> "a%3Ab"      "x.jpg" -> "x%2Ejpg"      "../up" -> "%2E./up"      "a//b" -> "a/%2F/b"

    Args:
        key: any text; "/" separates folders.
        dots: escape all dots of the last part too, as in archives, where the first dot ends the key.
    """
    parts = key.split("/")
    for i, part in enumerate(parts):
        safe = "".join(f"%{ord(c):02X}" if c in _UNSAFE else c for c in part)
        if (dots and i == len(parts) - 1) or os.path.splitext(safe)[1].lower() in EXTENSIONS.union(
            SIDECAR_EXTENSIONS
        ):
            safe = safe.replace(".", "%2E")
        if safe.startswith((".", "__")):  # ignored by readers: hidden files, __MACOSX
            safe = f"%{ord(safe[0]):02X}{safe[1:]}"
        parts[i] = safe or "%2F"
    return "/".join(parts)


def unescape_key(name: str) -> str:
    """The inverse of `escape_key`. Names that were not escaped stay as they are."""
    if "%" not in name:
        return name
    parts = ["" if part == "%2F" else part for part in name.split("/")]
    pieces = "/".join(parts).split("%")
    text = pieces[0]
    for piece in pieces[1:]:
        known = _ESCAPES.get(f"%{piece[:2]}")
        text += f"%{piece}" if known is None else known + piece[2:]
    return text


def _read_sidecar(image: str, extension: str) -> tuple[str, bytes] | None:
    """Name and content of the sidecar of an image file; None where it has none."""
    for path in (image + extension, os.path.splitext(image)[0] + extension):
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_SIDECAR_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ValueError(f"{os.path.basename(path)}: {(error.strerror or str(error)).lower()}") from error
        if len(data) > MAX_SIDECAR_BYTES:
            raise ValueError(f"{os.path.basename(path)} is larger than {MAX_SIDECAR_BYTES:,} bytes")
        return os.path.basename(path), data
    return None
