"""YOLO data sets: `images/a/b.jpg`, `labels/a/b.txt`, and class names in a .yaml file or classes.txt.

The labels may also be beside the images. A label line is `class x y width height` (center and sides of a box),
optionally followed by a score, or `class x y x y ...` (an outline). Coordinates are shares of the sides of the upright
image (https://docs.ultralytics.com/datasets/detect/).
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

from sightloop.data.datasets.folder import FolderSource
from sightloop.data.datasets.sidecar_files import read_plain_file
from sightloop.data.datasets.values import check_corners
from sightloop.data.datasets.yolo_names import (
    class_names_file,
    has_keypoints,
    label_numbers,
    read_class_names,
)
from sightloop.data.images.decode import upright_size
from sightloop.errors import UsageError
from sightloop.types import Region, Sample, Size

_TEXT_FILES_TO_LOOK_AT = 20  # to tell labels from captions


class YoloSource:
    """Source of the images of a YOLO folder, sorted by path; .json sidecars beside the images count too."""

    def __init__(
        self, images: Path, labels: Path, names_file: Path, listed: Collection[str] | None = None
    ) -> None:
        """Lists the images and reads the class names.

        Args:
            images: folder of the images.
            labels: folder of the label files; the same one if they are beside the images.
            names_file: .yaml file or classes.txt.
            listed: paths from `images` of those images that count; None for all.

        Raises:
            UsageError: the class names are missing.
        """
        self._root, self._labels = images, labels
        self._class_names, self._has_keypoints = read_class_names(names_file), has_keypoints(names_file)
        is_together = images == labels
        self._folder = FolderSource(images, classes=False, has_captions=not is_together, listed=listed)
        self.name = name = (images.parent if images.name == "images" else images).name
        keypoints = (f"{name}: keypoints are left out",) if self._has_keypoints else ()
        unclaimed = () if is_together or listed is not None else self._unclaimed_labels()
        self.notes = (*self._folder.notes, *keypoints, *unclaimed)

    @classmethod
    def open_folder(cls, root: Path, images: Path | None = None) -> YoloSource:
        """Opens a folder with `labels`, or with images and labels together.

        Args:
            root: the folder; the class names are in it or in its parent.
            images: folder of the images; `root/images` by default.

        Raises:
            UsageError: the images or the class names are missing.
        """
        is_together = not (root / "labels").is_dir()
        folder = images or (root if is_together else root / "images")
        if not folder.is_dir():
            raise UsageError(
                f"{root}: has labels but no folder `images`; name the folder of the images (--images)."
            )
        file = class_names_file(root)
        if file is None:
            raise UsageError(f"{root}: no class names; add a classes.txt or data.yaml.")
        return cls(folder, folder if is_together else root / "labels", file)

    @staticmethod
    def find(root: Path) -> list[Path]:
        """The YOLO data sets in a folder: itself, or its subfolders (`train`, `valid`) with `images` and `labels`."""
        has_names = class_names_file(root) is not None
        if (root / "labels").is_dir():
            return [root] if has_names else []
        subfolders: list[Path] = []
        with suppress(OSError), os.scandir(root) as entries:
            folders = sorted(Path(entry.path) for entry in entries if entry.is_dir())
            subfolders = [f for f in folders if (f / "labels").is_dir() and (f / "images").is_dir()]
        if subfolders:
            return subfolders if all(class_names_file(folder) for folder in subfolders) else []
        if not _holds_labels(_text_files(root, nested=has_names)):
            return []
        if not has_names:
            raise UsageError(
                f"{root}: its .txt files are YOLO labels, not captions; add a classes.txt with the class names."
            )
        return [root]

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
        path = Path(str(sample.image))
        file = str((self._labels / path.relative_to(self._root)).with_suffix(".txt"))
        if not os.path.lexists(file):
            return sample  # an image without objects
        name = os.path.basename(file)
        try:
            lines = read_plain_file(file).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"{name} is not UTF-8") from None
        words = [line.split() for line in lines]
        size = upright_size(str(sample.image)) if any(words) else (1, 1)
        regions = [self._region(line, size, f"{name}, line {i}") for i, line in enumerate(words, 1) if line]
        return replace(sample, regions=(*sample.regions, *regions))

    def digest(self) -> str:
        """SHA-256 of the names and sizes of the images, their sidecars, the labels and the class names."""
        digest = hashlib.sha256(f"{self._folder.digest()}{self._class_names!r}".encode())
        for file in sorted(self._labels.rglob("*.txt")):
            try:
                content: bytes | str = read_plain_file(str(file))
            except ValueError as error:
                content = str(error)
            name = file.relative_to(self._labels).as_posix()
            digest.update(repr((name, content)).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def _unclaimed_labels(self) -> Iterator[str]:
        """A note on label files without an image."""
        stems = {os.path.splitext(name)[0] for name in self._folder.image_names()}
        files = (file.relative_to(self._labels).with_suffix("") for file in self._labels.rglob("*.txt"))
        if count := sum(file.as_posix() not in stems and file.name != "classes" for file in files):
            yield f"{self.name}: {count:,} label files belong to no image and are left out"

    def _region(self, words: list[str], size: Size, where: str) -> Region:
        """The region of a label line. words: of the line; size: of the image; where: for messages."""
        height, width = size
        try:
            number, *values = (float(word) for word in words)
        except ValueError:
            raise ValueError(f"{where}: not a class and numbers, or a class without a name") from None
        # Some programs write the class as 1.0e+00.
        label = self._class_names.get(int(number)) if math.isfinite(number) and number.is_integer() else None
        if label is None:
            raise ValueError(f"{where}: not a class and numbers, or a class without a name")
        if not all(map(math.isfinite, values)):
            raise ValueError(f"{where}: a number is not finite")
        if self._has_keypoints:  # after the box
            values = values[:4]
        if len(values) in (4, 5):
            x, y, box_width, box_height = values[:4]
            box = (
                (x - box_width / 2) * width,
                (y - box_height / 2) * height,
                (x + box_width / 2) * width,
                (y + box_height / 2) * height,
            )
            check_corners(box, f"{where}: its box")
            return Region(label, box, score=values[4] if len(values) == 5 else None)
        if len(values) < 6 or len(values) % 2:
            raise ValueError(
                f"{where}: {len(values)} numbers; a box has 4 or 5, an outline an even number from 6"
            )
        points = tuple(v * (height if i % 2 else width) for i, v in enumerate(values))  # x, y, x, y, ...
        xs, ys = points[0::2], points[1::2]
        return Region(label, (min(xs), min(ys), max(xs), max(ys)), (points,))


def _text_files(root: Path, *, nested: bool) -> Iterator[str]:
    """Paths of .txt files beside images; nested: of subfolders too."""
    if nested:
        yield from FolderSource(root, classes=False).caption_files()
        return
    with suppress(OSError), os.scandir(root) as entries:
        for entry in entries:
            if entry.name.endswith(".txt") and entry.name != "classes.txt":
                yield entry.path


def _holds_labels(files: Iterator[str]) -> bool:
    """Whether .txt files are labels: all lines of the first ones are."""
    has_labels = False
    for file in islice(files, _TEXT_FILES_TO_LOOK_AT):
        try:
            lines = read_plain_file(file).decode("utf-8-sig").splitlines()
        except ValueError:
            continue
        if any(line.strip() and label_numbers(line) is None for line in lines):
            return False
        has_labels = has_labels or any(map(str.strip, lines))
    return has_labels
