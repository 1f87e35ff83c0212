"""Writers of samples, one for each format of `convert`; `open_dataset` reads what they write."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeGuard

from sightloop.data.datasets import schema
from sightloop.data.datasets.folder import escape_key
from sightloop.data.datasets.parquet_schema import parquet_schema
from sightloop.data.datasets.rle import encode_rle, mask_area
from sightloop.data.images.decode import upright_size
from sightloop.errors import ImageError
from sightloop.types import JsonDict, Region, Sample, Size

if TYPE_CHECKING:
    import pyarrow as pa

LINKED_IMAGE_FORMATS = ("csv", "tsv", "jsonl", "coco")  # hold paths of images, not the images
_MAX_NAME_BYTES = 240  # of a part of a path; with an extension it fits into the 255 of usual file systems
_ROW_GROUP_SAMPLES, _ROW_GROUP_BYTES = 1000, 64 << 20


class DatasetWriter(Protocol):
    """Writer of samples: `check` then `add` for each, `close` once.

    Attributes:
        embeds_images: whether `add` needs the bytes of every image, also of an image that is a file.
        dropped: what the format cannot hold, for people, and how often it was dropped.
    """

    embeds_images: bool
    dropped: Counter[str]

    def check(self, sample: Sample) -> None:
        """Raises `ImageError` for a sample that cannot be written."""
        ...

    def add(self, sample: Sample, data: bytes | None, extension: str) -> None:
        """Writes one sample.

        Args:
            sample: as it was checked.
            data: the encoded image; None where it stays in the file that the sample names.
            extension: of the image (".jpg").
        """
        ...

    def close(self) -> None:
        """Completes the file."""
        ...


def check_name(sample: Sample) -> None:
    """Raises `ImageError` if the key does not fit into the names of a path."""
    if max(len(os.fsencode(part)) for part in escape_key(sample.key, dots=True).split("/")) > _MAX_NAME_BYTES:
        raise ImageError(sample.key, "its key is too long for a file name")


def _relative_path(image: Path, folder: Path) -> str:
    """The path of an image as seen from a folder, with slashes."""
    path = os.path.relpath(image, folder)
    if path.startswith(".."):  # if the folder is behind a link, ".." is the parent of the link's target
        path = os.path.relpath(image, os.path.realpath(folder))
    return path.replace(os.sep, "/")


class FolderWriter:
    """A folder of images with sidecars."""

    embeds_images = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.dropped = Counter[str]()

    def check(self, sample: Sample) -> None:
        """The key must fit into a file name."""
        check_name(sample)

    def add(self, sample: Sample, data: bytes | None, extension: str) -> None:
        """The image; a .txt if its captions can be lines; a .json for the rest, if there is any."""
        name = escape_key(sample.key)
        (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
        self._write(name + extension, data or b"")
        text = schema.join_captions(sample.captions)
        if sample.captions and text is not None:
            self._write(f"{name}.txt", text)
            sample = replace(sample, captions=())
        if fields := schema.fields_from_sample(sample):
            self._write(f"{name}.json", schema.json_text(fields).encode() + b"\n")

    def close(self) -> None:
        """Every file is complete already."""

    def _write(self, name: str, data: bytes) -> None:
        with open(self._folder / name, "xb") as file:  # an error where names are case-insensitive
            file.write(data)


class ShardWriter:
    """WebDataset tars. Equal samples give equal bytes: headers hold no times and owners."""

    embeds_images = True

    def __init__(self, folder: Path, name: Callable[[int], str], size: int) -> None:
        """Opens nothing yet.

        Args:
            folder: of the shards.
            name: file name of the shard with a number, from 0.
            size: samples per shard; 0 for all in one.
        """
        self._folder, self._name, self._size = folder, name, size
        self._count = 0
        self._file: io.BufferedWriter | None = None
        self.dropped = Counter[str]()

    def check(self, sample: Sample) -> None:
        """The key must fit into a file name."""
        check_name(sample)

    def add(self, sample: Sample, data: bytes | None, extension: str) -> None:
        """KEY.jpg; KEY.txt with the first caption; KEY.json with the rest, and with all captions if there are several.

        Every sample has all three: readers such as `datasets` take the first samples for the form of all.
        """
        if self._file is None or (self._size and self._count % self._size == 0):
            self.close()
            number = self._count // self._size if self._size else 0
            self._file = open(self._folder / self._name(number), "xb")  # noqa: SIM115 (closed by close)
        self._count += 1
        key = escape_key(sample.key, dots=True)
        text = schema.join_captions(sample.captions[:1])
        if text is not None and len(sample.captions) == 1:
            sample = replace(sample, captions=())
        members = {
            extension: data or b"",
            ".txt": (text or b"").removesuffix(b"\n"),
            ".json": schema.json_text(schema.fields_from_sample(sample)).encode(),
        }
        for suffix, body in sorted(members.items()):
            info = tarfile.TarInfo(key + suffix)
            info.size = len(body)
            self._file.write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
            self._file.write(body + bytes(-len(body) % 512))  # padded to whole blocks

    def close(self) -> None:
        """Writes the end mark, two empty blocks."""
        if self._file is not None:
            file, self._file = self._file, None
            with file:  # closed also where the disk is full
                file.write(bytes(1024))


class ImageFolder:
    """Paths of images in a table. Images that are files stay where they are, others are written to a folder."""

    def __init__(self, folder: Path, base: Path) -> None:
        """Makes no folder yet.

        Args:
            folder: for images that are not files; its final place is in `base`.
            base: folder that the paths are relative to.
        """
        self._folder, self._base = folder, base

    def path(self, sample: Sample, data: bytes | None, extension: str) -> str:
        """The path of the image of a sample; the image is written if it is not a file."""
        if isinstance(sample.image, Path):
            return _relative_path(sample.image, self._base)
        name = escape_key(sample.key) + extension
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(data or b"")
        return f"{self._folder.name}/{name}"


class JsonLinesWriter:
    """JSON lines, an object per sample."""

    embeds_images = False

    def __init__(self, path: Path, image_folder: ImageFolder) -> None:
        self._file = path.open("wb")
        self._image_folder = image_folder
        self.dropped = Counter[str]()

    def check(self, sample: Sample) -> None:
        """The key must fit into a file name if the image is written."""
        if isinstance(sample.image, bytes):
            check_name(sample)

    def add(self, sample: Sample, data: bytes | None, extension: str) -> None:
        """Writes {"key": ..., "image": path, ...}."""
        path = self._image_folder.path(sample, data, extension)
        record = {"key": sample.key, "image": path} | schema.fields_from_sample(sample)
        self._file.write(schema.json_text(record).encode() + b"\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class CsvWriter:
    """CSV or TSV with a row per caption; the other fields are in the first row of an image."""

    embeds_images = False

    def __init__(self, path: Path, image_folder: ImageFolder, delimiter: str) -> None:
        self._file = path.open("w", encoding="utf-8", errors="surrogateescape", newline="")
        self._image_folder = image_folder
        # "\r\n": every version of the csv module quotes the characters of the line terminator.
        columns: list[str] = ["key", "image", "caption", "label", "qa", "regions", "dialogues", "extra"]
        self._table = csv.DictWriter(self._file, columns, "", delimiter=delimiter, lineterminator="\r\n")
        self._table.writeheader()
        self.dropped = Counter[str]()

    def check(self, sample: Sample) -> None:
        """The key must fit into a file name if the image is written."""
        if isinstance(sample.image, bytes):
            check_name(sample)

    def add(self, sample: Sample, data: bytes | None, extension: str) -> None:
        """Writes a row per caption. Empty captions are dropped, as an empty cell is no caption."""
        captions = [caption for caption in sample.captions if caption]
        if len(captions) < len(sample.captions):
            self.dropped["empty captions"] += len(sample.captions) - len(captions)
        row: JsonDict = {"key": sample.key, "image": self._image_folder.path(sample, data, extension)}
        fields = schema.fields_from_sample(replace(sample, captions=(), extra={}))
        cells = {n: v if isinstance(v, str) else schema.json_text(v) for n, v in fields.items()}
        if sample.extra:
            cells["extra"] = schema.json_text(dict(sample.extra))
        for number, caption in enumerate(captions or [""]):
            self._table.writerow(row | {"caption": caption} | (cells if number == 0 else {}))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class ParquetWriter:
    """Parquet with columns for the encoded image and for every field of a sample."""

    embeds_images = True

    def __init__(self, path: Path, *, refer: bool = False) -> None:
        """Opens the file.

        Args:
            path: of the file.
            refer: write paths relative to the folder of the file instead of image bytes; all images must be files.
        """
        import pyarrow.parquet as pq

        self._base = path.parent if refer else None
        self._schema = parquet_schema()
        self._file = pq.ParquetWriter(path, self._schema)
        self._rows: list[JsonDict] = []  # of the next row group
        self._bytes = 0  # of images in them
        self.dropped = Counter[str]()

    def check(self, sample: Sample) -> None:
        """With `refer`, the image must be a file, and its path valid Unicode."""
        if self._base is None:
            return
        if isinstance(sample.image, bytes):
            raise ImageError(sample.key, "its image is not a file, so it has no path to refer to")
        if schema.portable_name(str(sample.image)) != str(sample.image):
            raise ImageError(sample.key, "its path is not UTF-8, so it cannot be referred to")

    def add(self, sample: Sample, data: bytes | None, extension: str) -> None:
        """Adds a row; a full row group is written."""
        key = schema.portable_name(sample.key)
        image: JsonDict = {"bytes": data, "path": key + extension}
        if self._base is not None and isinstance(sample.image, Path):
            image = {"bytes": None, "path": _relative_path(sample.image, self._base)}
        row: JsonDict = {"key": key, "image": image}
        row["captions"] = list(sample.captions)
        row["qa"] = [{"question": q.question, "answers": list(q.answers)} for q in sample.questions]
        fields = schema.fields_from_sample(replace(sample, extra={}))
        row |= {name: fields.get(name, []) for name in ("regions", "dialogues")}
        row |= {
            "label": sample.label,
            "extra": schema.json_text(dict(sample.extra)) if sample.extra else None,
        }
        self._rows.append(row)
        self._bytes += len(data or b"")
        if len(self._rows) >= _ROW_GROUP_SAMPLES or self._bytes >= _ROW_GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        """Writes the last row group and the footer."""
        if self._rows:
            self._flush()
        self._file.close()

    def _flush(self) -> None:
        import pyarrow as pa

        table: pa.Table = pa.Table.from_pylist(self._rows, self._schema)
        self._file.write_table(table, row_group_size=len(self._rows))
        self._rows, self._bytes = [], 0


class CocoWriter:
    """COCO JSON. What COCO has no place for is in the object of the image, where `CocoSource` reads it.

    pycocotools takes a file of captions or one of instances, not both at once: with both, x.json has the instances,
    with the captions in the objects of the images, and x.captions.json the captions alone.
    """

    embeds_images = False

    def __init__(self, path: Path, image_folder: ImageFolder) -> None:
        """Opens temporary files for the images and the annotations; the size of the file is not limited by memory."""
        self._path, self._image_folder = path, image_folder
        self._images, self._captions, self._regions = (
            _JsonItems(path.with_name(f"{path.name}.{name}")) for name in ("images", "captions", "regions")
        )
        self._categories: dict[str, int] = {}  # id by label
        self._used_ids: set[int | str] = set()  # of images
        self._next_id, self._annotation_id = 1, 0
        self._size: Size = (0, 0)  # of the image that was checked last
        self.dropped = Counter[str]()

    def check(self, sample: Sample) -> None:
        """COCO has the size of every image, so its header must be readable."""
        if isinstance(sample.image, bytes):
            check_name(sample)
        self._size = upright_size(sample.image, sample.key)

    def add(self, sample: Sample, data: bytes | None, extension: str) -> None:
        """Writes an object for the image, and one for each caption and region."""
        extra = dict(sample.extra)
        image_id = self._image_id(extra)
        crowd = extra.pop("crowd") if _is_crowd(extra.get("crowd")) else []
        # Members of an image object that `CocoSource` does not take for fields of the sample.
        nested = {name: extra.pop(name) for name in ("id", "width", "height") if name in extra}
        fields = schema.fields_from_sample(replace(sample, captions=(), regions=(), extra=extra))
        if nested:
            fields["extra"] = fields.get("extra", {}) | nested
        height, width = self._size
        path = self._image_folder.path(sample, data, extension)
        image = {"id": image_id, "file_name": path, "width": width, "height": height, "key": sample.key}
        captions = {"captions": list(sample.captions)} if sample.captions else {}
        self._images.add(image | fields | captions)
        for caption in sample.captions:
            self._annotate(self._captions, image_id, {"caption": caption})
        for region in sample.regions:
            self._annotate(self._regions, image_id, self._fields_from_region(region))
        for item in crowd:
            fields = {name: value for name, value in item.items() if name != "label"}
            category_id = self._category_id(item["label"])
            self._annotate(self._regions, image_id, fields | {"category_id": category_id, "iscrowd": 1})

    def close(self) -> None:
        """Writes the file, or both."""
        is_mixed = self._captions.count > 0 and self._regions.count > 0
        if is_mixed:
            captions_path = self._path.with_name(f"{self._path.stem}.captions{self._path.suffix}")
            self._write(captions_path, self._captions, plain=True)
            self.dropped[f"captions beside regions (they are in {captions_path.name} too)"] += (
                self._captions.count
            )
        self._write(self._path, self._regions if self._regions.count else self._captions, plain=not is_mixed)
        for items in (self._images, self._captions, self._regions):
            items.remove()

    def _write(self, path: Path, annotations: _JsonItems, *, plain: bool) -> None:
        """Writes a file. plain: without captions in the objects of the images."""
        with path.open("wb") as file:
            file.write(b'{"images": [')
            for number, line in enumerate(self._images.lines()):
                if plain and b'"captions"' in line:
                    image = json.loads(line)
                    image.pop("captions", None)
                    line = schema.json_text(image).encode()
                file.write((b",\n" if number else b"\n") + line)
            file.write(b'\n],\n"annotations": [')
            for number, line in enumerate(annotations.lines()):
                file.write((b",\n" if number else b"\n") + line)
            file.write(b"\n]")
            # pycocotools looks for the category of every annotation as soon as there are categories, even none.
            if annotations is self._regions:
                categories = [{"id": number, "name": name} for name, number in self._categories.items()]
                file.write(b',\n"categories": ' + schema.json_text(categories).encode())
            file.write(b"}\n")

    def _image_id(self, extra: JsonDict) -> int | str:
        """The image id of `extra`, which is removed, if it is unused; otherwise the next free number."""
        image_id = extra.get("image_id")
        if not isinstance(image_id, int | str) or isinstance(image_id, bool) or image_id in self._used_ids:
            while self._next_id in self._used_ids:
                self._next_id += 1
            image_id = self._next_id
        else:
            del extra["image_id"]
        self._used_ids.add(image_id)
        return image_id

    def _category_id(self, label: str) -> int:
        return self._categories.setdefault(label, len(self._categories) + 1)

    def _fields_from_region(self, region: Region) -> JsonDict:
        left, top, right, bottom = region.box
        # COCO has two decimals; rounding removes the float error of right = left + width, so that widths come back.
        width, height = round(right - left, 6), round(bottom - top, 6)
        outlines = [list(polygon) for polygon in region.polygons]
        area = sum(map(_polygon_area, region.polygons)) if outlines else width * height
        fields: JsonDict = {"category_id": self._category_id(region.label), "iscrowd": 0, "area": area}
        fields |= {"bbox": [left, top, width, height], "segmentation": outlines}
        if region.mask is not None and not outlines:
            fields |= {"area": mask_area(region.mask), "segmentation": encode_rle(region.mask)}
        return fields | ({} if region.score is None else {"score": region.score})

    def _annotate(self, items: _JsonItems, image_id: int | str, fields: JsonDict) -> None:
        self._annotation_id += 1
        items.add({"id": self._annotation_id, "image_id": image_id} | fields)


class _JsonItems:
    """Objects in a temporary file, one a line."""

    def __init__(self, path: Path) -> None:
        self._path, self._file, self.count = path, path.open("w+b"), 0

    def add(self, item: JsonDict) -> None:
        self._file.write(schema.json_text(item).encode() + b"\n")
        self.count += 1

    def lines(self) -> Iterator[bytes]:
        """All lines so far, without their ends."""
        self._file.seek(0)
        for line in self._file:
            yield line.rstrip(b"\n")

    def remove(self) -> None:
        self._file.close()
        self._path.unlink()


def _is_crowd(value: object) -> TypeGuard[list[JsonDict]]:
    """Whether `extra["crowd"]` has the form that `CocoSource` gives it."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(item, Mapping) and set(item) == {"label", "bbox", "segmentation"} for item in value
        )
    )


def _polygon_area(polygon: tuple[float, ...]) -> float:
    """Area of a flat x, y, x, y, ... outline, by the shoelace formula: |sum(x0 * y1 - x1 * y0)| / 2 over its edges."""
    xs, ys = polygon[0::2], polygon[1::2]
    edges = zip(
        xs, ys, (*xs[1:], *xs[:1]), (*ys[1:], *ys[:1]), strict=False
    )  # the last one closes the outline
    return abs(sum(x0 * y1 - x1 * y0 for x0, y0, x1, y1 in edges)) / 2
