"""Writers of folders for other programs: YOLO's (Ultralytics) and Hugging Face's ImageFolder.

yolo           images/a.jpg  labels/a.txt  data.yaml      captions and other fields: images/a.txt, images/a.json
imagefolder    a.jpg  metadata.jsonl                      a line per image: {"file_name": "a.jpg", "captions": [...]}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from sightloop.data.datasets import schema
from sightloop.data.datasets.folder import escape_key
from sightloop.data.datasets.writers import FolderWriter, check_name
from sightloop.data.datasets.yolo_names import yaml_text
from sightloop.data.images.decode import upright_size
from sightloop.errors import ImageError, UsageError
from sightloop.types import JsonDict, Region, Sample, Size

# The loader of Ultralytics finds the labels of an image by replacing the last folder `images` of its path by `labels`.
_IMAGES, _LABELS = "images", "labels"
_BOXES_AS_OUTLINES = "boxes beside outlines (they are written as outlines)"
_UNREAD_EXTENSIONS = (".gif",)  # by the loader of Ultralytics


class YoloWriter:
    """A YOLO folder. Boxes outside of the image are cut at its edge, because the loader refuses such images.

    The label files hold boxes, or outlines if any region has one; boxes then become outlines. The outlines of a region
    become one, whose parts are joined by lines without width.
    """

    embeds_images = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._images = FolderWriter(folder / _IMAGES)
        self._classes: dict[str, int] = {}  # number by label
        self._box_files: list[Path] = []  # label files without an outline
        self._has_outlines = False
        self._size: Size = (1, 1)  # of the image that was checked last
        self.dropped = Counter[str]()

    def check(self, sample: Sample) -> None:
        """The key must fit into a path, and the header of the image be readable: labels are shares of its sides."""
        check_name(sample)
        if _IMAGES in sample.key.split("/")[:-1]:
            raise ImageError(
                sample.key, f"a folder of its key is named {_IMAGES}, where YOLO searches other labels"
            )
        self._size = upright_size(sample.image, sample.key)

    def add(self, sample: Sample, data: bytes | None, extension: str) -> None:
        """The image, its sidecars, and a label file if it has regions."""
        self._images.add(replace(sample, regions=()), data, extension)
        self.dropped[f"{extension} images (YOLO's loader skips them)"] += extension in _UNREAD_EXTENSIONS
        is_outlined = any(region.polygons for region in sample.regions)
        lines = [self._line(region, is_outlined) for region in sample.regions]
        if lines := [line for line in lines if line]:
            path = self._folder / _LABELS / f"{escape_key(sample.key)}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{line}\n" for line in lines), "ascii")
            self._has_outlines |= is_outlined
            self._box_files += [] if is_outlined else [path]

    def close(self) -> None:
        """Writes data.yaml. Raises UsageError if no sample has a region: there are no classes to name."""
        for path in self._box_files if self._has_outlines else ():
            lines = [_box_line_as_outline(line) for line in path.read_text("ascii").splitlines()]
            path.write_text("".join(f"{line}\n" for line in lines), "ascii")
            self.dropped[_BOXES_AS_OUTLINES] += len(lines)

        if not self._classes:
            raise UsageError("--to yolo: no sample has a box or an outline, and YOLO holds nothing else.")
        names = {number: name for name, number in self._classes.items()}
        (self._folder / "data.yaml").write_text(yaml_text(_IMAGES, names), "utf-8")

    def _line(self, region: Region, is_outlined: bool) -> str:
        """The label line of a region; "" if nothing of it is inside of the image."""
        height, width = self._size
        left, top, right, bottom = region.box
        points = _joined(region.polygons) or (left, top, right, top, right, bottom, left, bottom)
        xs = [min(max(x / width, 0.0), 1.0) for x in points[0::2]]
        ys = [min(max(y / height, 0.0), 1.0) for y in points[1::2]]
        low_x, high_x, low_y, high_y = min(xs), max(xs), min(ys), max(ys)
        if low_x == high_x or low_y == high_y:
            self.dropped["regions without an area inside of their image"] += 1
            return ""
        self.dropped["parts of regions beyond the edge of their image"] += not (
            min(points) >= 0 and max(points[0::2]) <= width and max(points[1::2]) <= height
        )
        self.dropped["scores of regions"] += region.score is not None
        self.dropped["masks (their boxes are written)"] += region.mask is not None and not region.polygons
        self.dropped[_BOXES_AS_OUTLINES] += is_outlined and not region.polygons
        number = self._classes.setdefault(region.label, len(self._classes))
        values = [v for point in zip(xs, ys, strict=True) for v in point]
        if not is_outlined:
            values = [(low_x + high_x) / 2, (low_y + high_y) / 2, high_x - low_x, high_y - low_y]
        return " ".join([str(number), *(f"{value:.12g}" for value in values)])


class ImageFolderWriter:
    """Hugging Face's ImageFolder: `load_dataset("imagefolder", data_dir=...)` gives a column per field."""

    embeds_images = True

    def __init__(self, folder: Path) -> None:
        self._images = FolderWriter(folder)
        self._file = (folder / "metadata.jsonl").open("wb")
        self.dropped = Counter[str]()

    def check(self, sample: Sample) -> None:
        """The key must fit into a path that is valid Unicode."""
        check_name(sample)
        if schema.portable_name(sample.key) != sample.key:
            raise ImageError(sample.key, "its key is not UTF-8, so metadata.jsonl cannot name its file")

    def add(self, sample: Sample, data: bytes | None, extension: str) -> None:
        """The image and its line. Fields outside of the schema are one text, so that a column has one type."""
        self._images.add(Sample(sample.key, sample.image), data, extension)
        row: JsonDict = {"file_name": escape_key(sample.key) + extension}
        row |= schema.fields_from_sample(replace(sample, extra={}))
        if sample.extra:
            row["extra"] = schema.json_text(dict(sample.extra))
        self._file.write(schema.json_text(row).encode() + b"\n")

    def close(self) -> None:
        """Closes the table."""
        self._file.close()


def _box_line_as_outline(line: str) -> str:
    """`class x y width height` (of a center and sides) -> `class x y x y x y x y` of the four corners."""
    number, *texts = line.split()
    x, y, width, height = map(float, texts)
    left, top, right, bottom = x - width / 2, y - height / 2, x + width / 2, y + height / 2
    corners = (left, top, right, top, right, bottom, left, bottom)
    return " ".join([number, *(f"{min(max(value, 0.0), 1.0):.12g}" for value in corners)])


def _joined(polygons: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
    """One outline x, y, x, y, ... from several: a line leads from the first corner of the first one to each other one.

    a b c + d e f  ->  a b c a d e f d: there and back on the same line, which encloses nothing.
    """
    first, *others = [*polygons] or [()]
    if not others:
        return first
    points = [*first, *first[:2]]
    for polygon in others:
        points += [*polygon, *polygon[:2], *first[:2]]
    return tuple(points[:-2])
