"""Samples -> files: one writer for each kind that `convert` makes, and that `sightloop.open_dataset` reads back."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sightloop.data.datasets import schema
from sightloop.data.datasets.folder import escape_key
from sightloop.data.datasets.rle import encode_rle
from sightloop.data.images.decode import upright_size
from sightloop.errors import ImageError
from sightloop.types import JsonDict, Region, Sample

if TYPE_CHECKING:
    import pyarrow as pa

TABLES = ("csv", "tsv", "jsonl", "coco")  # the kinds whose images lie outside
_LONGEST = 240  # bytes in a part of a path, with room for an ending
_GROUP = 1000, 64 << 20  # samples and bytes in a row group, at most


class DatasetWriter(Protocol):
    """copies: whether it takes the bytes of every image. lost: what it could not hold, in words, and how often."""

    copies: bool
    lost: Counter[str]

    def check(self, sample: Sample) -> None:
        """Raises `ImageError` for a sample that cannot be written."""
        ...

    def add(self, sample: Sample, data: bytes | None, ending: str) -> None:
        """One sample, its image's bytes (None: they stay in the file that it names) and ending (".jpg")."""
        ...

    def close(self) -> None:
        """Ends the file."""
        ...


def _check_name(sample: Sample) -> None:
    if max(len(os.fsencode(part)) for part in escape_key(sample.key, dots=True).split("/")) > _LONGEST:
        raise ImageError(sample.key, "its key is too long for the name of a file")


def _portable(name: str) -> str:
    """A name as text that UTF-8 can hold."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _reference(picture: Path, base: Path) -> str:
    """The path of an image from a folder."""
    found = os.path.relpath(picture, base)
    if found.startswith(".."):  # of a folder behind a link, the parent is where that leads to
        found = os.path.relpath(picture, os.path.realpath(base))
    return found.replace(os.sep, "/")


class FolderWriter:
    """Images with sidecars."""

    copies = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.lost = Counter[str]()

    def check(self, sample: Sample) -> None:
        """The key must be a file name."""
        _check_name(sample)

    def add(self, sample: Sample, data: bytes | None, ending: str) -> None:
        """The image, a .txt where lines hold its captions, a .json for the rest where there is any."""
        name = escape_key(sample.key)
        (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
        self._write(name + ending, data or b"")
        text = schema.as_lines(sample.captions)
        if sample.captions and text is not None:
            self._write(f"{name}.txt", text)
            sample = replace(sample, captions=())
        if fields := schema.fields_from_sample(sample):
            self._write(f"{name}.json", schema.json_text(fields).encode() + b"\n")

    def close(self) -> None:
        """Every file is whole already."""

    def _write(self, name: str, data: bytes) -> None:
        with open(self._folder / name, "xb") as file:  # where names are taken without regard to case, say so
            file.write(data)


class ShardWriter:
    """WebDataset tars. Headers hold nothing that changes from run to run."""

    copies = True

    def __init__(self, folder: Path, name: Callable[[int], str], size: int) -> None:
        """name: of the shard of a number. size: samples in a shard, 0 for all in one."""
        self._folder, self._name, self._size = folder, name, size
        self._count = 0
        self._file: io.BufferedWriter | None = None
        self.lost = Counter[str]()

    def check(self, sample: Sample) -> None:
        """The key must be a file name."""
        _check_name(sample)

    def add(self, sample: Sample, data: bytes | None, ending: str) -> None:
        """KEY.jpg, and KEY.json or KEY.txt."""
        if self._file is None or (self._size and self._count % self._size == 0):
            self.close()
            number = self._count // self._size if self._size else 0
            self._file = open(self._folder / self._name(number), "xb")  # noqa: SIM115 (closed by close)
        self._count += 1
        key = escape_key(sample.key, dots=True)
        members = {ending: data or b""}
        text = schema.as_lines(sample.captions) if len(sample.captions) == 1 else None
        if text is not None:
            members[".txt"] = text.removesuffix(b"\n")
            sample = replace(sample, captions=())
        if fields := schema.fields_from_sample(sample):
            members[".json"] = schema.json_text(fields).encode()
        for name, body in sorted(members.items()):
            info = tarfile.TarInfo(key + name)
            info.size = len(body)
            self._file.write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
            self._file.write(body + bytes(-len(body) % 512))

    def close(self) -> None:
        """The end mark: two empty blocks."""
        if self._file is not None:
            self._file.write(bytes(1024))
            self._file.close()
            self._file = None


class ImageFolder:
    """Where a table's images are: files as they lie, others in a folder beside the table."""

    def __init__(self, folder: Path, base: Path) -> None:
        """base: the folder that the table's paths start from; `folder` will lie in it."""
        self._folder, self._base = folder, base

    def path(self, sample: Sample, data: bytes | None, ending: str) -> str:
        """The path for the table, written to where there is no file yet."""
        if isinstance(sample.image, Path):
            return _reference(sample.image, self._base)
        name = escape_key(sample.key) + ending
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(data or b"")
        return f"{self._folder.name}/{name}"


class JsonLinesWriter:
    """An object a line."""

    copies = False

    def __init__(self, path: Path, pictures: ImageFolder) -> None:
        self._file = path.open("wb")
        self._pictures = pictures
        self.lost = Counter[str]()

    def check(self, sample: Sample) -> None:
        """Where the image gets a file, the key must be a file name."""
        if isinstance(sample.image, bytes):
            _check_name(sample)

    def add(self, sample: Sample, data: bytes | None, ending: str) -> None:
        """{"key", "image", ...}"""
        path = self._pictures.path(sample, data, ending)
        record = {"key": sample.key, "image": path} | schema.fields_from_sample(sample)
        self._file.write(schema.json_text(record).encode() + b"\n")

    def close(self) -> None:
        """Nothing ends the lines."""
        self._file.close()


class CsvWriter:
    """A row for each caption; what is not captions stands in the image's first row."""

    copies = False

    def __init__(self, path: Path, pictures: ImageFolder, delimiter: str) -> None:
        self._file = path.open("w", encoding="utf-8", errors="surrogateescape", newline="")
        self._pictures = pictures
        # "\r\n": what the csv module takes for an end of line it quotes, in every version.
        columns: list[str] = ["key", "image", "caption", "label", "qa", "regions", "extra"]
        self._table = csv.DictWriter(self._file, columns, "", delimiter=delimiter, lineterminator="\r\n")
        self._table.writeheader()
        self.lost = Counter[str]()

    def check(self, sample: Sample) -> None:
        """Where the image gets a file, the key must be a file name."""
        if isinstance(sample.image, bytes):
            _check_name(sample)

    def add(self, sample: Sample, data: bytes | None, ending: str) -> None:
        """An empty caption would be none, so it is lost."""
        captions = [caption for caption in sample.captions if caption]
        self.lost.update({"empty captions": lost} if (lost := len(sample.captions) - len(captions)) else {})
        row: JsonDict = {"key": sample.key, "image": self._pictures.path(sample, data, ending)}
        fields = schema.fields_from_sample(replace(sample, captions=(), extra={}))
        first = {n: v if isinstance(v, str) else schema.json_text(v) for n, v in fields.items()}
        if sample.extra:
            first["extra"] = schema.json_text(dict(sample.extra))
        for number, caption in enumerate(captions or [""]):
            self._table.writerow(row | {"caption": caption} | (first if number == 0 else {}))

    def close(self) -> None:
        """Nothing ends the rows."""
        self._file.close()


class ParquetWriter:
    """Images and all that is known about them in columns, row group by row group."""

    copies = True

    def __init__(self, path: Path, *, refer: bool = False) -> None:
        """refer: paths from the file's folder instead of images that are files of their own."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._base = path.parent if refer else None

        texts, numbers = pa.list_(pa.string()), pa.list_(pa.float64())
        question = pa.struct([("question", pa.string()), ("answers", texts)])
        mask = pa.struct([("size", pa.list_(pa.int64())), ("counts", pa.string())])
        known = [("label", pa.string()), ("box", numbers), ("polygons", pa.list_(numbers))]
        region = pa.struct([*known, ("score", pa.float64()), ("mask", mask)])
        picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        self._schema = pa.schema(
            [
                ("key", pa.string()),
                ("image", picture),
                ("captions", texts),
                ("qa", pa.list_(question)),
                ("regions", pa.list_(region)),
                ("label", pa.string()),
                ("extra", pa.string()),
            ]
        )
        self._file = pq.ParquetWriter(path, self._schema)
        self._rows: list[JsonDict] = []
        self._bytes = 0
        self.lost = Counter[str]()

    def check(self, sample: Sample) -> None:
        """A path must be text; a column holds everything else."""
        if self._base is None:
            return
        if isinstance(sample.image, bytes):
            raise ImageError(sample.key, "its image is no file of its own, so it cannot be referred to")
        if _portable(str(sample.image)) != str(sample.image):
            raise ImageError(sample.key, "its path is not UTF-8, so it cannot be referred to")

    def add(self, sample: Sample, data: bytes | None, ending: str) -> None:
        """One row, kept until its row group is full."""
        key = _portable(sample.key)
        image: JsonDict = {"bytes": data, "path": key + ending}
        if self._base is not None and isinstance(sample.image, Path):
            image = {"bytes": None, "path": _reference(sample.image, self._base)}
        row: JsonDict = {"key": key, "image": image}
        row["captions"] = list(sample.captions)
        row["qa"] = [{"question": q.question, "answers": list(q.answers)} for q in sample.questions]
        row["regions"] = schema.fields_from_sample(replace(sample, extra={})).get("regions", [])
        row |= {"label": sample.label, "extra": json.dumps(dict(sample.extra)) if sample.extra else None}
        self._rows.append(row)
        self._bytes += len(data or b"")
        if len(self._rows) >= _GROUP[0] or self._bytes >= _GROUP[1]:
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
    """COCO's json. What COCO has no place for stands in the image's object, where `open_dataset` finds it."""

    copies = False

    def __init__(self, path: Path, pictures: ImageFolder) -> None:
        self._path, self._pictures = path, pictures
        self._images = path.open("wb")
        self._notes_path = path.with_name(path.name + ".annotations")
        self._notes = self._notes_path.open("w+b")
        self._images.write(b'{"images": [')
        self._categories: dict[str, int] = {}
        self._used: set[int] = set()
        self._next, self._note = 1, 0
        self._size = (0, 0)
        self.lost = Counter[str]()

    def check(self, sample: Sample) -> None:
        """COCO states the size of every image, so its header must be readable."""
        if isinstance(sample.image, bytes):
            _check_name(sample)
        self._size = upright_size(sample.image, sample.key)

    def add(self, sample: Sample, data: bytes | None, ending: str) -> None:
        """An object for the image, one for each caption and region."""
        extra = dict(sample.extra)
        number = self._number(extra)
        crowd = extra.pop("crowd") if _is_crowd(extra.get("crowd")) else []
        inner = {name: extra.pop(name) for name in ("id", "width", "height") if name in extra}
        fields = schema.fields_from_sample(replace(sample, captions=(), regions=(), extra=extra))
        if inner:
            fields["extra"] = fields.get("extra", {}) | inner
        height, width = self._size
        path = self._pictures.path(sample, data, ending)
        image = {"id": number, "file_name": path, "width": width, "height": height, "key": sample.key}
        self._images.write(b",\n" if len(self._used) > 1 else b"\n")
        self._images.write(schema.json_text(image | fields).encode())
        for caption in sample.captions:
            self._annotate(number, {"caption": caption})
        for region in sample.regions:
            self._annotate(number, self._region(region))
        for item in crowd:
            about = {"category_id": self._category(item["label"]), "iscrowd": 1}
            self._annotate(number, {n: v for n, v in item.items() if n != "label"} | about)

    def close(self) -> None:
        """Puts the parts together."""
        self._images.write(b'\n],\n"annotations": [')
        self._notes.seek(0)
        for block in iter(lambda: self._notes.read(1 << 20), b""):
            self._images.write(block)
        categories = [{"id": number, "name": name} for name, number in self._categories.items()]
        self._images.write(b'\n],\n"categories": ' + schema.json_text(categories).encode() + b"}\n")
        self._images.close()
        self._notes.close()
        self._notes_path.unlink()

    def _number(self, extra: JsonDict) -> int:
        """COCO's own number where the sample has one, taken out of `extra`; otherwise the next."""
        number = extra.get("image_id")
        if not isinstance(number, int) or isinstance(number, bool) or number in self._used:
            while self._next in self._used:
                self._next += 1
            number = self._next
        else:
            del extra["image_id"]
        self._used.add(number)
        return number

    def _category(self, label: str) -> int:
        return self._categories.setdefault(label, len(self._categories) + 1)

    def _region(self, region: Region) -> JsonDict:
        left, top, right, bottom = region.box
        # Rounded, so that COCO's numbers of two decimals come back from the sum that made an edge of them.
        width, height = round(right - left, 6), round(bottom - top, 6)
        outlines = [list(polygon) for polygon in region.polygons]
        area = sum(map(_area, region.polygons)) if outlines else width * height
        about: JsonDict = {"category_id": self._category(region.label), "iscrowd": 0, "area": area}
        about |= {"bbox": [left, top, width, height], "segmentation": outlines}
        if region.mask is not None and not outlines:
            about |= {"area": int(region.mask.sum()), "segmentation": encode_rle(region.mask)}
        return about | ({} if region.score is None else {"score": region.score})

    def _annotate(self, number: int, about: JsonDict) -> None:
        self._note += 1
        self._notes.write(b",\n" if self._note > 1 else b"\n")
        note = {"id": self._note, "image_id": number} | about
        self._notes.write(schema.json_text(note).encode())


def _is_crowd(value: Any) -> bool:
    """Whether this is what the reader of COCO's json makes of crowd regions."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(item, Mapping) and set(item) == {"label", "bbox", "segmentation"} for item in value
        )
    )


def _area(polygon: tuple[float, ...]) -> float:
    """Of a flat x, y, x, y, ... outline: the shoelace formula."""
    xs, ys = polygon[0::2], polygon[1::2]
    pairs = zip(xs, ys, (*xs[1:], *xs[:1]), (*ys[1:], *ys[:1]), strict=False)
    return abs(sum(x0 * y1 - x1 * y0 for x0, y0, x1, y1 in pairs)) / 2
