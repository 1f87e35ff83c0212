"""Folders with images and annotation files apart: Pascal VOC's `JPEGImages` and `Annotations`, and others like it."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sightloop.data.datasets import schema
from sightloop.data.datasets.annotation_files import (
    annotation_files,
    content_digest,
    has_annotation_files,
    notes_on_files,
    read_annotation,
)
from sightloop.data.datasets.folder import FolderSource
from sightloop.data.datasets.sidecar_files import read_plain_file
from sightloop.data.image_names import is_image_name
from sightloop.errors import UsageError
from sightloop.types import Sample

_IMAGE_FOLDERS = frozenset("jpegimages images imgs img image jpg jpgs".split())
_ANNOTATION_FOLDERS = frozenset(
    "annotations annotation labels label xmls xml jsons json labelme anns ann".split()
)
_SPLITS_FOLDER = "ImageSets"
_SPLIT_NAMES = ("train", "val", "trainval", "test")


class AnnotatedFolder(NamedTuple):
    """A folder `root` with a folder of images and one of annotation files."""

    root: Path
    images: Path
    annotations: Path


class AnnotatedFolderSource:
    """Source of the images of a folder, sorted by path, with the annotation files of the same names in another one."""

    def __init__(
        self, folder: AnnotatedFolder, images: Path | None = None, split: Path | None = None
    ) -> None:
        """Lists the images, and reads the annotation files once, to count what is left out.

        Args:
            folder: the folders.
            images: folder of the images; `folder.images` by default.
            split: a file of `ImageSets` with an image per line, which alone count; None for all images.

        Raises:
            UsageError: the split cannot be read, or lists no image that is there.
        """
        root = images or folder.images
        listed, notes = (None, []) if split is None else _listed_images(split, root)
        self._folder = FolderSource(root, classes=False, listed=listed)
        self.name = folder.root.name if split is None else f"{folder.root.name} {split.stem}"
        files = annotation_files(folder.annotations)
        # By path from the folder and by bare stem: Annotations/a/1.xml is that of JPEGImages/a/1.jpg.
        self._files = {_stem(str(file.relative_to(folder.annotations))): str(file) for file in files}
        bare = Counter(file.stem for file in files)
        self._files |= {file.stem: str(file) for file in files if bare[file.stem] == 1}
        names = self._folder.image_names()
        used = [file for name in names if (file := self._file(name)) is not None]
        unused = len(files) - len(set(used))
        if unused and split is None:
            notes.append(f"{self.name}: {unused:,} annotation files belong to no image and are left out")
        if split is None:
            notes += _notes_on_others(folder)
        self.notes = (*self._folder.notes, *notes, *notes_on_files(used, self.name))

    def __len__(self) -> int:
        return len(self._folder)

    def key_hashes(self) -> Iterator[int]:
        """`schema.key_hash` of every key."""
        return self._folder.key_hashes()

    def key(self, index: int) -> str:
        """The key of a record."""
        return self._folder.key(index)

    def sample(self, index: int, key: str) -> Sample:
        """The record under its key. Raises ValueError or OSError if it is broken."""
        sample = self._folder.sample(index, key)
        names = self._folder.image_names()
        file = self._file(names[index]) if index < len(names) else None
        if file is None:
            return sample  # an image without objects
        fields = read_annotation(file)
        fields.pop("image", None)
        annotated = schema.sample_from_fields(key, sample.image, fields)
        return replace(schema.merge_samples(sample, annotated), key=key)

    def digest(self) -> str:
        """SHA-256 of the names and sizes of the images, their sidecars and their annotation files."""
        digest = hashlib.sha256(self._folder.digest().encode())
        for name in self._folder.image_names():
            file = self._file(name)
            content = None if file is None else content_digest(file)
            digest.update(repr((os.fsencode(name), content)).encode())
        return digest.hexdigest()

    def _file(self, name: str) -> str | None:
        """The annotation file of an image, by its path from the folder of the images."""
        stem = _stem(name)
        return self._files.get(stem) or self._files.get(stem.rpartition("/")[2])


def find_annotated_folders(root: Path) -> list[AnnotatedFolder]:
    """The folder itself, if it holds images and annotation files apart, or those of its subfolders that do."""
    whole = _find(root)
    if whole is not None:
        return [whole]
    return [folder for path in _subfolders(root) if (folder := _find(path)) is not None]


def find_split(file: Path) -> AnnotatedFolder | None:
    """The folder that a list of images belongs to: VOC/ImageSets/Main/val.txt is one of VOC; None if it is no list."""
    path = file.absolute()
    if path.suffix.lower() != ".txt":
        return None
    return next((_find(parent.parent) for parent in path.parents if parent.name == _SPLITS_FOLDER), None)


def _find(root: Path) -> AnnotatedFolder | None:
    folders = _subfolders(root)
    images = next((folder for folder in folders if folder.name.lower() in _IMAGE_FOLDERS), None)
    if images is None:
        return None
    for folder in folders:
        if folder.name.lower() in _ANNOTATION_FOLDERS and has_annotation_files(_files_below(folder)):
            return AnnotatedFolder(root, images, folder)
    return None


def _subfolders(root: Path) -> list[Path]:
    folders: list[Path] = []
    with suppress(OSError), os.scandir(root) as entries:
        folders = sorted(Path(entry.path) for entry in entries if entry.is_dir())
    return folders


def _files_below(folder: Path) -> Iterator[str]:
    for root, _, names in os.walk(folder):
        yield from (os.path.join(root, name) for name in sorted(names))


def _notes_on_others(folder: AnnotatedFolder) -> Iterator[str]:
    """Notes on the splits, and on folders that are not read."""
    splits = folder.root / _SPLITS_FOLDER / "Main"
    names = [name for name in _SPLIT_NAMES if (splits / f"{name}.txt").is_file()]
    if names:
        file = splits.relative_to(folder.root) / f"{names[0]}.txt"
        yield f"{folder.root.name}: {', '.join(names)} are all read; name {file.as_posix()} for one"
    known = {folder.images, folder.annotations, folder.root / _SPLITS_FOLDER}
    others = [path.name for path in _subfolders(folder.root) if path not in known and path.name[0] != "."]
    if others:
        yield f"{folder.root.name}: not read are the folders {', '.join(others[:5])}" + ", ..." * (
            len(others) > 5
        )


def _listed_images(split: Path, images: Path) -> tuple[set[str], list[str]]:
    """Names of the images that a split lists, and notes. A line is an image's stem; VOC adds 1, 0 or -1 for a class."""
    try:
        text = read_plain_file(str(split)).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{split}: its text is not UTF-8; save it as UTF-8.") from None
    except ValueError as error:
        raise UsageError(f"{split}: {error}.") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    stems = {
        line.rpartition(" ")[0].strip() if line.endswith((" 1", " 0", " -1")) else line for line in lines
    }
    stems = {_stem(stem) if is_image_name(stem) else stem for stem in stems}
    paths = (os.path.relpath(path, images).replace(os.sep, "/") for path in _files_below(images))
    names = {path for path in paths if is_image_name(path) and _stem(path) in stems}
    if not names:
        raise UsageError(f"{split}: none of its {len(stems):,} images is in {images}.")
    missing = len(stems) - len({_stem(name) for name in names})
    note = f"{split.name}: {missing:,} of {len(stems):,} images are not found, and left out"
    return names, [note] if missing else []


def _stem(name: str) -> str:
    return os.path.splitext(name)[0].replace(os.sep, "/")
