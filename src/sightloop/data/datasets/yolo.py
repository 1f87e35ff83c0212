"""YOLO data sets: `images/a/b.jpg`, `labels/a/b.txt`, and class names in data.yaml or classes.txt.

A label line is `class x y width height` (center and sides of a box), optionally followed by a score, or
`class x y x y ...` (an outline). Coordinates are shares of the sides of the upright image
(https://docs.ultralytics.com/datasets/detect/).
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
from sightloop.types import Region, Sample, Size

_YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml")


class YoloSource:
    """Source of the images of a YOLO folder, sorted by path; sidecars beside the images count too (`FolderSource`)."""

    def __init__(self, root: Path, images: Path | None = None) -> None:
        """Lists the images and reads the class names.

        Args:
            root: folder with `labels`, and with the class names in it or in its parent.
            images: folder of the images; `root/images` by default.

        Raises:
            UsageError: the images or the class names are missing.
        """
        self._root = images or root / "images"
        if not self._root.is_dir():
            raise UsageError(
                f"{root}: has labels but no folder `images`; name the folder of the images (--images)."
            )
        self._labels, self._class_names = root / "labels", _read_class_names(root)
        self._folder = FolderSource(self._root, classes=False)
        self.name, self.notes = root.name, self._folder.notes

    @staticmethod
    def matches(root: Path) -> bool:
        """Whether a folder is a YOLO data set: it has `labels`, and class names in it or in its parent."""
        return (root / "labels").is_dir() and _class_names_file(root) is not None

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
        file = self._labels / Path(str(sample.image)).relative_to(self._root).with_suffix(".txt")
        if not file.is_file():
            return sample  # an image without objects
        lines = [line.split() for line in file.read_text("utf-8-sig").splitlines()]
        size = upright_size(str(sample.image)) if any(lines) else (1, 1)
        regions = [
            self._region(line, size, f"{file.name}, line {i}") for i, line in enumerate(lines, 1) if line
        ]
        return replace(sample, regions=(*sample.regions, *regions))

    def digest(self) -> str:
        """SHA-256 of the names and sizes of the images, their sidecars, the labels and the class names."""
        digest = hashlib.sha256(f"{self._folder.digest()}{self._class_names!r}".encode())
        for file in sorted(self._labels.rglob("*.txt")):
            digest.update(repr((file.relative_to(self._labels).as_posix(), file.read_bytes())).encode())
        return digest.hexdigest()

    def _region(self, words: list[str], size: Size, where: str) -> Region:
        """The region of a label line. words: of the line; size: of the image; where: for messages."""
        height, width = size
        try:
            number, values = int(words[0]), [float(word) for word in words[1:]]
            label = self._class_names[number]
        except (ValueError, KeyError):
            raise ValueError(f"{where}: not a class and numbers, or a class without a name") from None
        if len(values) in (4, 5):
            x, y, box_width, box_height = values[:4]
            box = (
                (x - box_width / 2) * width,
                (y - box_height / 2) * height,
                (x + box_width / 2) * width,
                (y + box_height / 2) * height,
            )
            return Region(label, box, score=values[4] if len(values) == 5 else None)
        if len(values) < 6 or len(values) % 2:
            raise ValueError(
                f"{where}: {len(values)} numbers; a box has 4 or 5, an outline an even number from 6"
            )
        points = tuple(v * (height if i % 2 else width) for i, v in enumerate(values))  # x, y, x, y, ...
        xs, ys = points[0::2], points[1::2]
        return Region(label, (min(xs), min(ys), max(xs), max(ys)), (points,))


def _class_names_file(root: Path) -> Path | None:
    files = [folder / name for folder in (root, root.parent) for name in ("classes.txt", *_YAML_NAMES)]
    return next((file for file in files if file.is_file()), None)


def _read_class_names(root: Path) -> dict[int, str]:
    """Class number -> name: the lines of classes.txt, or the entries of `names:` in data.yaml.

    YAML is read by pattern, in the forms that exporters write:

        names:            names: [cat, dog]      names: {0: cat, 1: dog}      names:
          0: cat                                                              - cat
          1: dog                                                              - dog
    """
    file = _class_names_file(root)
    if file is None:
        raise UsageError(f"{root}: no class names; add a classes.txt or data.yaml.")
    text = file.read_text("utf-8-sig")
    if file.suffix == ".txt":
        return dict(enumerate(filter(None, map(str.strip, text.splitlines()))))
    # The rest of the line after `names:`, and all lines after it that are indented, begin with "-" or close a bracket.
    block = re.search(r"^names:[ \t]*(.*(?:\n(?:[ \t]+|[-\]}]).*|\n[ \t]*(?=\n))*)", text, re.M)
    inline = re.match(r"[\[{](.*?)[\]}]", block[1], re.S) if block else None  # [...] or {...}
    entries = re.split(r",|\n", inline[1]) if inline else block[1].splitlines() if block else []
    names: dict[int, str] = {}
    for entry in filter(None, (re.sub(r"\s#.*", "", line).strip() for line in entries)):
        match = re.fullmatch(r"(?:-\s+|['\"]?(\d+)['\"]?\s*:\s*)?(.+)", entry)  # "- cat", "0: cat" or "cat"
        if match is not None:
            names[int(match[1]) if match[1] else len(names)] = _unquote(match[2].strip())
    if not names:
        raise UsageError(
            f"{file}: no class names; write them under `names:`, one per line (`- cat` or `0: cat`)."
        )
    return names


def _unquote(name: str) -> str:
    """A YAML scalar without its quotes: "b\\u00e9" -> bé, 'a dog''s' -> a dog's."""
    if name[:1] == '"' and name[-1:] == '"':
        try:
            return str(json.loads(name))
        except ValueError:
            return name[1:-1]
    return name[1:-1].replace("''", "'") if name[:1] == "'" == name[-1:] else name
