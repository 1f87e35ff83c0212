"""Annotation files that are about an image each: LabelMe's .json and Pascal VOC's .xml, wherever the image is."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from sightloop.data.datasets import schema
from sightloop.data.datasets.foreign_fields import own_fields
from sightloop.data.datasets.image_paths import find_image
from sightloop.data.datasets.sidecar_files import read_fields, read_plain_file
from sightloop.data.datasets.voc import is_voc, voc_fields
from sightloop.data.image_names import EXTENSIONS
from sightloop.types import JsonDict, Sample

ANNOTATION_EXTENSIONS = (".xml", ".json")
_HEAD_BYTES = 4096
_LABELME_NAMES = re.compile(rb'"(shapes|imagePath|imageData)"\s*:')
_FILES_TO_LOOK_AT = 20
_IMAGE_FOLDERS = ("", "JPEGImages", "images", "imgs", "img", "image")


class AnnotationFilesSource:
    """Source of the images that annotation files are about, in the order of the files; keys are the files' stems."""

    def __init__(self, files: Sequence[Path], images: Path | None = None) -> None:
        """Reads the files once, to count what is left out.

        Args:
            files: .json files of LabelMe and .xml files of Pascal VOC.
            images: folder of the images; by default they are searched beside the files, in the parent of their folder,
                and there in `JPEGImages` and `images`.
        """
        self._files = [str(file) for file in files]
        self._images = images
        self.name = files[0].name if len(files) == 1 else files[0].parent.name
        self.notes = tuple(notes_on_files(self._files, self.name))

    def __len__(self) -> int:
        return len(self._files)

    def key_hashes(self) -> Iterator[int]:
        """`schema.key_hash` of every key."""
        return (schema.key_hash(self.key(index)) for index in range(len(self)))

    def key(self, index: int) -> str:
        """The key of a record."""
        return schema.valid_key(os.path.splitext(os.path.basename(self._files[index]))[0])

    def sample(self, index: int, key: str) -> Sample:
        """The record under its key. Raises ValueError or OSError if it is broken."""
        file = self._files[index]
        fields = read_annotation(file)
        column = schema.first_field(fields, schema.IMAGE_FIELDS)
        name = None if column is None else fields.pop(column)
        return schema.sample_from_fields(key, self._image(file, name), fields)

    def digest(self) -> str:
        """SHA-256 of the names and contents of the files."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(repr((os.fsencode(os.path.basename(file)), content_digest(file))).encode())
        return digest.hexdigest()

    def _image(self, file: str, name: object) -> Path:
        """The image of a file: the one that it names, or one with its stem."""
        folder = Path(file).parent
        bases = [folder, folder.parent, folder.parent.parent]
        folders = [base / name for base in bases for name in _IMAGE_FOLDERS]
        folders = [self._images] if self._images else folders
        if isinstance(name, str) and name:
            names = dict.fromkeys((name, name.replace("\\", "/").rpartition("/")[2]))
            for spelling in names:
                if spelling and (path := find_image(spelling, folders)) is not None:
                    return Path(os.path.normpath(path))
        stem = os.path.splitext(os.path.basename(file))[0]
        for base in folders:
            for ending in sorted(EXTENSIONS):
                for form in (ending, ending.upper()):
                    if os.path.isfile(path := base / f"{stem}{form}"):
                        return path
        named = name if isinstance(name, str) and name else f"an image {stem}"
        raise ValueError(
            f"{schema.valid_key(str(named))} is not found; name the folder of the images (--images)"
        )


def read_annotation(file: str, left_out: Counter[str] | None = None) -> JsonDict:
    """Fields of an annotation file, with its image. Raises ValueError with the reason."""
    if file.lower().endswith(".xml"):
        return voc_fields(read_plain_file(file), os.path.basename(file), left_out)
    fields = read_fields(file)
    name = fields.get("imagePath")
    try:
        return ({"image": name} if isinstance(name, str) else {}) | own_fields(fields, left_out)
    except ValueError as error:
        raise ValueError(f"{os.path.basename(file)}: {error}") from None


def is_annotation_file(file: str) -> bool:
    """Whether a file is one of LabelMe or Pascal VOC, by its ending and its first bytes."""
    if not file.lower().endswith(ANNOTATION_EXTENSIONS) or not os.path.isfile(file):
        return False
    try:
        with open(file, "rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except OSError:
        return False
    if file.lower().endswith(".xml"):
        return is_voc(head)
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    return start.startswith(b"{") and _LABELME_NAMES.search(start) is not None


def has_annotation_files(files: Iterable[str]) -> bool:
    """Whether one of the first files with a suited ending is an annotation file."""
    suited = (file for file in files if file.lower().endswith(ANNOTATION_EXTENSIONS))
    return any(map(is_annotation_file, islice(suited, _FILES_TO_LOOK_AT)))


def annotation_files(folder: Path) -> list[Path]:
    """The annotation files in a folder and its subfolders, sorted by path."""
    paths: list[Path] = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        suited = (os.path.join(root, name) for name in sorted(names) if not name.startswith("."))
        paths += [Path(path) for path in suited if is_annotation_file(path)]
    return paths


def notes_on_files(files: Iterable[str], name: str) -> Iterator[str]:
    """Notes on what annotation files hold that is no region; broken ones are named when their image is read."""
    left_out = Counter[str]()
    for file in files:
        with suppress(ValueError, OSError, RecursionError):
            read_annotation(file, left_out)
    yield from (f"{name}: {count:,} {what}" for what, count in left_out.items() if count)


def content_digest(file: str) -> str:
    """SHA-256 of an annotation file, or why it cannot be read."""
    try:
        return hashlib.sha256(read_plain_file(file, max_bytes=1 << 30)).hexdigest()
    except ValueError as error:
        return str(error)
