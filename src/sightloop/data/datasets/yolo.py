"""YOLO's labels: `images/a/b.jpg` and `labels/a/b.txt`, and the names of the classes in data.yaml or classes.txt.

A line is `class x y width height` (the middle and the sides of a box), perhaps with a score behind, or
`class x y x y ...` (an outline); all as shares of the upright image's sides (https://docs.ultralytics.com/datasets/detect/).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from sightloop.data.datasets.folder import FolderSource
from sightloop.data.images.decode import upright_size
from sightloop.errors import UsageError
from sightloop.types import Region, Sample

_NAMES = ("data.yaml", "data.yml", "dataset.yaml")


class YoloSource:
    """A source: one sample an image, sorted by path; what stands beside the images counts too (see `Folder`)."""

    def __init__(self, root: Path, pictures: Path | None = None) -> None:
        """images: their folder where it is not `images`. Raises `UsageError` where it, or the names, are missing."""
        self._root = pictures or root / "images"
        if not self._root.is_dir():
            raise UsageError(f"{root}: has labels and no folder images; name that of the images (--images).")
        self._labels, self._classes = root / "labels", _class_names(root)
        self._folder = FolderSource(self._root, classes=False)
        self.name, self.notes = root.name, self._folder.notes

    @staticmethod
    def is_there(root: Path) -> bool:
        """Whether a folder is of this kind: labels in it, and names of classes in it or above it."""
        return (root / "labels").is_dir() and _names_file(root) is not None

    def __len__(self) -> int:
        return len(self._folder)

    def hashes(self) -> Iterator[int]:
        """key_hash() of every key."""
        return self._folder.hashes()

    def key(self, index: int) -> str:
        """The key of a record."""
        return self._folder.key(index)

    def sample(self, index: int, key: str) -> Sample:
        """The record under its key. Raises ValueError or OSError where it is broken."""
        sample = self._folder.sample(index, key)
        file = self._labels / Path(str(sample.image)).relative_to(self._root).with_suffix(".txt")
        if not file.is_file():
            return sample  # an image without things
        lines = [line.split() for line in file.read_text("utf-8-sig").splitlines()]
        size = upright_size(str(sample.image)) if any(lines) else (1, 1)
        found = [
            self._region(line, size, f"{file.name}, line {i}") for i, line in enumerate(lines, 1) if line
        ]
        return replace(sample, regions=(*sample.regions, *found))

    def digest(self) -> str:
        """Of the images' names and sizes, what stands beside them, the labels and the names of their classes."""
        whole = hashlib.sha256(f"{self._folder.digest()}{self._classes!r}".encode())
        for file in sorted(self._labels.rglob("*.txt")):
            whole.update(repr((file.relative_to(self._labels).as_posix(), file.read_bytes())).encode())
        return whole.hexdigest()

    def _region(self, words: list[str], size: tuple[int, int], where: str) -> Region:
        height, width = size
        try:
            number, values = int(words[0]), [float(word) for word in words[1:]]
            label = self._classes[number]
        except (ValueError, KeyError):
            raise ValueError(f"{where}: is no class and numbers, or its class has no name") from None
        if len(values) in (4, 5):
            x, y, wide, high = values[:4]
            box = (
                (x - wide / 2) * width,
                (y - high / 2) * height,
                (x + wide / 2) * width,
                (y + high / 2) * height,
            )
            return Region(label, box, score=values[4] if len(values) == 5 else None)
        if len(values) < 6 or len(values) % 2:
            raise ValueError(
                f"{where}: has {len(values)} numbers; a box has 4, an outline an even number from 6"
            )
        points = tuple(v * (height if i % 2 else width) for i, v in enumerate(values))
        across, down = points[0::2], points[1::2]
        return Region(label, (min(across), min(down), max(across), max(down)), (points,))


def _names_file(root: Path) -> Path | None:
    places = [folder / name for folder in (root, root.parent) for name in ("classes.txt", *_NAMES)]
    return next((place for place in places if place.is_file()), None)


def _class_names(root: Path) -> dict[int, str]:
    """Number -> name: the lines of classes.txt, or what stands under `names:` in data.yaml, as a list or by number."""
    file = _names_file(root)
    if file is None:
        raise UsageError(f"{root}: neither classes.txt nor data.yaml says what its classes are called.")
    text = file.read_text("utf-8-sig")
    if file.suffix == ".txt":
        return dict(enumerate(filter(None, map(str.strip, text.splitlines()))))
    below = re.search(r"^names:[ \t]*(.*(?:\n(?:[ \t]+|[-\]}]).*|\n[ \t]*(?=\n))*)", text, re.M)
    inline = re.match(r"[\[{](.*?)[\]}]", below[1], re.S) if below else None
    entries = re.split(r",|\n", inline[1]) if inline else below[1].splitlines() if below else []
    found: dict[int, str] = {}
    for entry in filter(None, (re.sub(r"\s#.*", "", line).strip() for line in entries)):
        match = re.fullmatch(r"(?:-\s+|['\"]?(\d+)['\"]?\s*:\s*)?(.+)", entry)
        if match is not None:
            found[int(match[1]) if match[1] else len(found)] = _unquoted(match[2].strip())
    if not found:
        raise UsageError(
            f"{file}: names no classes; write them under `names:`, one a line (`- cat` or `0: cat`)."
        )
    return found


def _unquoted(name: str) -> str:
    if name[:1] == '"' and name[-1:] == '"':
        try:
            return str(json.loads(name))
        except ValueError:
            return name[1:-1]
    return name[1:-1].replace("''", "'") if name[:1] == "'" == name[-1:] else name
