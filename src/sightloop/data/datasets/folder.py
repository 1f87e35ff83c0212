"""Images in a folder and its subfolders, with sidecars: photo.txt, photo.json. Escaping of keys as file names."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence, Set
from pathlib import Path

from sightloop.data.datasets import schema
from sightloop.data.datasets.annotation_files import has_annotation_files, is_annotation_file, notes_on_files
from sightloop.data.datasets.class_folders import CLASS_NAMES_FILE, ClassFolders
from sightloop.data.datasets.sidecar_files import (
    BOX_EXTENSIONS,
    CAPTION_EXTENSIONS,
    FIELD_EXTENSIONS,
    SIDECAR_EXTENSIONS,
    fields_of_sidecars,
    find_sidecar,
    read_plain_file,
    sidecar_alias,
    unusual_sidecars,
)
from sightloop.data.datasets.tables import TableSource
from sightloop.data.image_names import EXTENSIONS, is_image_name
from sightloop.errors import UsageError
from sightloop.types import Sample

MARKER_NAME = ".sightloop.json"  # file in a folder written by `convert`, whose labels are in sidecars
# Tables with a row per image of their folder, as Hugging Face's ImageFolder has them.
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_ANNOTATION_EXTENSIONS = (".json", ".xml", ".jsonl", ".csv", ".tsv", ".parquet")
_IGNORED_NAMES = frozenset(("thumbs.db", "desktop.ini", CLASS_NAMES_FILE, "license", "readme"))


class FolderSource:
    """Source of the images of a folder and its subfolders, sorted by path.

    The key is the path without its extension, or with it where two images differ in nothing else.

    The caption file of an image holds one caption per line, its .json file holds fields (see `sidecar_files` and
    `schema`), and so does its row in a table `METADATA_NAMES` of its folder. Captions of the .json count only if the
    caption file has none, because people and `sightloop caption` edit that; captions of the table only if neither has.
    """

    def __init__(
        self,
        root: Path,
        classes: bool | None = None,
        *,
        has_captions: bool = True,
        listed: Collection[str] | None = None,
    ) -> None:
        """Lists the folder.

        Args:
            root: the folder.
            classes: whether folders are labels (see `ClassFolders`).
            has_captions: whether .txt files are captions.
            listed: paths from the folder of those images that count; None for all.
        """
        self._root, self.name, self._has_captions = str(root), root.name, has_captions
        self._unlistable: list[tuple[str, str]] = []  # folders that cannot be listed: path, reason
        self._names: list[str] = []
        self._unusual: dict[str, str] = {}  # of `find_sidecar`, with whole paths
        self._tables: list[TableSource] = []
        # Numbers of tables and of records in them, by path of the image.
        self._rows: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        notes: list[str] = []
        self._has_fields = False  # whether there is a .json or .xml file that is no table
        others: list[str] = []  # names of files that are neither images nor their sidecars
        strangers: list[str] = []  # names of .xml files that are no annotation files
        tables: list[tuple[str, str]] = []  # folder and name of each metadata table
        for prefix, images, files in self._walk():
            foreign = {name for name in files if name.lower().endswith(BOX_EXTENSIONS)}
            foreign = {
                name for name in foreign if not is_annotation_file(os.path.join(self._root, prefix + name))
            }
            files = [name for name in files if name not in foreign]
            strangers += foreign
            self._has_fields |= any(
                name.lower().endswith((*FIELD_EXTENSIONS, *BOX_EXTENSIONS)) for name in files
            )
            self._names += [name for name in images if listed is None or name in listed]
            self._unusual |= unusual_sidecars(os.path.join(self._root, prefix + name) for name in files)
            tables += [(prefix, name) for name in METADATA_NAMES if name in files]
            others += _unclaimed(prefix, images, [name for name in files if name not in METADATA_NAMES])
        present = {unicodedata.normalize("NFC", name) for name in self._names} if tables else set[str]()
        for prefix, name in tables:
            self._read_metadata(prefix, name, present, notes)
        is_written = os.path.lexists(os.path.join(self._root, MARKER_NAME))
        self._classes = ClassFolders(self._root, self._names, classes, self._has_sidecar, is_written)
        stems = Counter(os.path.splitext(name)[0] for name in self._names)
        self._ambiguous_stems = frozenset(stem for stem, count in stems.items() if count > 1)
        if others or strangers:
            notes.append(f"{self.name}: {_count_kinds(others, strangers)}")
        self.notes = (*self._classes.notes, *notes, *self._shared_captions(), *self._notes_on_annotations())

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
            raise ValueError(_why_no_file(path))
        fields = fields_of_sidecars(*self._sidecars(path))
        label = self._classes.label(name)
        if label is not None:
            fields.setdefault("label", label)
        sample = schema.sample_from_fields(key, Path(path), fields)
        has_captions = bool(sample.captions)
        for table, row in self._rows.get(unicodedata.normalize("NFC", name), ()):
            metadata = self._tables[table].sample(row, key, keep_captions=not has_captions)
            sample = schema.merge_samples(sample, metadata)
        return sample

    def digest(self) -> str:
        """SHA-256 of the names and sizes of the images and the contents of their sidecars and tables."""
        digest = hashlib.sha256()
        for name in self._names:
            path = os.path.join(self._root, name)
            size = os.path.getsize(path) if os.path.isfile(path) else -1
            sidecars = [_content(sidecar) for sidecar in self._sidecars(path)]
            digest.update(repr((os.fsencode(name), size, sidecars)).encode("utf-8", "surrogateescape"))
        for table in self._tables:
            digest.update(table.digest().encode())
        return digest.hexdigest()

    def image_names(self) -> Sequence[str]:
        """Paths of the images, from the folder."""
        return self._names

    def caption_files(self) -> Iterator[str]:
        """Paths of the caption files of the images, in their order."""
        for name in self._names:
            text = self._sidecars(os.path.join(self._root, name))[0]
            if text is not None:
                yield text

    def _sidecars(self, path: str) -> tuple[str | None, str | None, str | None]:
        """Paths of the caption file, the .json file and the .xml file of an image."""
        text = find_sidecar(path, CAPTION_EXTENSIONS, self._unusual) if self._has_captions else None
        boxes = find_sidecar(path, BOX_EXTENSIONS, self._unusual) if self._unusual else None
        return text, find_sidecar(path, FIELD_EXTENSIONS, self._unusual), boxes

    def _notes_on_annotations(self) -> Iterator[str]:
        """Notes on what LabelMe's and Pascal VOC's files beside the images hold that is no region."""
        if self._has_fields and has_annotation_files(self._field_files()):
            yield from notes_on_files(self._field_files(), self.name)

    def _field_files(self) -> Iterator[str]:
        """Paths of the .json and .xml files of the images, in their order."""
        for name in self._names:
            _, *files = self._sidecars(os.path.join(self._root, name))
            yield from (file for file in files if file is not None)

    def _has_sidecar(self, name: str) -> bool:
        row = unicodedata.normalize("NFC", name) in self._rows
        return row or any(self._sidecars(os.path.join(self._root, name)))

    def _shared_captions(self) -> Iterator[str]:
        """A note on caption files that are those of several images."""
        owners = Counter[str]()
        for name in self._names:
            if os.path.splitext(name)[0] in self._ambiguous_stems:
                text = self._sidecars(os.path.join(self._root, name))[0]
                owners[text or ""] += text is not None
        if shared := [os.path.relpath(text, self._root) for text, count in owners.items() if count > 1]:
            yield f"{len(shared):,} caption files belong to several images each: {', '.join(shared[:3])}" + (
                ", ..." if len(shared) > 3 else ""
            )

    def _read_metadata(self, prefix: str, name: str, present: Set[str], notes: list[str]) -> None:
        """Takes over a table of a folder; one that cannot be read is noted. present: paths of the images in NFC."""
        path = Path(self._root, prefix, name)
        try:
            table = TableSource(path)
        except UsageError as error:
            notes.append(f"{prefix}{name} is left out: {error}")
            return
        missing = 0
        for index, image in enumerate(table.image_names()):
            image_path = None if image is None else os.path.normpath(prefix + image.replace("\\", "/"))
            image_path = image_path and unicodedata.normalize("NFC", image_path.replace(os.sep, "/"))
            if image_path is not None and image_path in present:
                self._rows[image_path].append((len(self._tables), index))
            else:
                missing += 1
        if missing:
            notes.append(f"{prefix}{name}: {missing:,} rows name no image of the folder and are left out")
        self._tables.append(table)

    def _walk(self) -> Iterator[tuple[str, list[str], list[str]]]:
        """Of each folder: its path from the root, with a slash; paths of its images; names of its other files.

        Links are followed, each folder once.
        """
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
            sidecar_folders = [name for name in subfolders if sidecar_alias(name) is not None]
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            relative = os.path.relpath(folder, self._root).replace(os.sep, "/")
            prefix = "" if relative == "." else f"{relative}/"
            images = [prefix + name for name in sorted(files) if is_image_name(name)]
            yield prefix, images, [name for name in files if not is_image_name(name)] + sidecar_folders


def _unclaimed(prefix: str, images: list[str], files: list[str]) -> Iterator[str]:
    """Names of the files of a folder that belong to no image."""
    names = {unicodedata.normalize("NFC", image[len(prefix) :]) for image in images}
    names |= {os.path.splitext(name)[0] for name in names}
    for name in files:
        alias = sidecar_alias(name)
        stem = os.path.splitext(name)[0].lower()
        if alias is not None and os.path.splitext(alias)[0] in names:
            continue
        if not name.startswith(".") and name.lower() not in _IGNORED_NAMES and stem not in _IGNORED_NAMES:
            yield name


def _why_no_file(path: str) -> str:
    """Why a listed image is no file to read."""
    if os.path.exists(path):
        return f"{path} is a pipe, a device or a socket, not a file"
    return f"{path} is a broken link" if os.path.islink(path) else f"there is no file {path}"


def _count_kinds(names: list[str], strangers: list[str]) -> str:
    """What is left out, by extension, and what to do about annotation files, of which none is among the strangers."""
    kinds = Counter(os.path.splitext(name)[1].lower() or "without an extension" for name in names + strangers)
    text = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    annotations = [name for name in names if os.path.splitext(name)[1].lower() in _ANNOTATION_EXTENSIONS]
    remedy = "; annotations are read where their file is named, not its folder: " if annotations else ""
    return f"files that belong to no image are left out: {text}{remedy}{''.join(annotations[:1])}"


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


def _content(path: str | None) -> bytes | str | None:
    """Content of a sidecar, or why it cannot be read."""
    try:
        return None if path is None else read_plain_file(path)
    except ValueError as error:
        return str(error)
