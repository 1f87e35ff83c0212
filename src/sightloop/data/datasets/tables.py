"""Tables with one row per image or per caption: JSON lines, a JSON list, Parquet, and CSV (see `csv_rows`).

`schema` lists the column names. The image column is the first of `schema.IMAGE_FIELDS` that is present and holds a path
relative to the folder of the table (or, where no such file exists, to the current folder or the table's parent folder;
see `image_paths`); in Parquet also the encoded
bytes, bare or as {"bytes", "path"}. Rows with equal paths are one sample, wherever they are in the table. The key is
the column `key`, or the path without its extension.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import stat
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from sightloop.data.datasets import schema
from sightloop.data.datasets.csv_rows import CsvRows, file_digest, image_column
from sightloop.data.datasets.foreign_fields import FOREIGN_NAMES, own_fields
from sightloop.data.datasets.image_paths import find_image
from sightloop.data.json_members import parse_tolerant, repeated_name
from sightloop.errors import UsageError
from sightloop.types import JsonDict, Sample

if TYPE_CHECKING:
    import pyarrow as pa

_FOOTER_BYTES = 1 << 20  # of a Parquet file: hashed, because offsets and statistics of all columns are in it


class TableRows(Protocol):
    """Random access to the rows of one file. Only `scan` reads the whole file."""

    def scan(self) -> Iterable[JsonDict | None]:
        """All rows, with at least the image and key columns; None for a row that cannot be parsed."""
        ...

    def row(self, index: int) -> JsonDict:
        """One row. Raises ValueError or OSError if it cannot be read."""
        ...

    def digest(self) -> str: ...


class TableSource:
    """Source of the samples of a table, one per image, in the order of their first rows."""

    def __init__(self, path: Path, images: Path | None = None) -> None:
        """Scans the table once.

        Args:
            path: the table.
            images: folder that relative image paths start from; the folder of the table by default.

        Raises:
            UsageError: the file cannot be read as a table, or has no image column.
        """
        self._path, self.name = path, path.name
        # An annotation file is often one folder below the images' root.
        self._image_folders = [images or path.parent, Path(), *([] if images else [path.parent.parent])]
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would wait for its writer
                raise UsageError(f"{path}: neither a regular file nor a link to one.")
            self._rows = _open(path)
            image_hashes, key_hashes = array("q"), array("q")
            aside = Counter[str]()
            for row, fields in enumerate(self._rows.scan()):
                name = None if fields is None else _image_name(fields)
                image_hashes.append(hash((row,) if name is None else name))
                key_hashes.append(schema.key_hash(self._key(row, fields)))
                if fields is not None and not FOREIGN_NAMES.isdisjoint(fields):
                    with suppress(ValueError):  # a wrong row is named when it is read
                        own_fields(fields, aside)
        except (OSError, ValueError, csv.Error, RecursionError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{path} cannot be read as a table: {error}") from error
        self.notes = tuple(f"{self.name}: {count:,} {what}" for what, count in aside.items() if count)
        # Rows grouped by image, groups in the order of their first rows. Images a, b, a, c, b of rows 0..4:
        # first rows of a, b, c = 0, 1, 3; order 0, 2, 1, 4, 3; counts 2, 2, 1; starts 0, 2, 4, 5.
        _, first, group = np.unique(
            np.asarray(image_hashes, np.int64), return_index=True, return_inverse=True
        )  # [images], [rows]
        self._order = np.argsort(first[group], kind="stable")  # [rows]
        counts = np.bincount(group, minlength=len(first))[np.argsort(first)]  # [images]
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])  # [images + 1]
        self._key_hashes = np.asarray(key_hashes, np.int64)[np.sort(first)]  # [images]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def key(self, index: int) -> str:
        """The key of a record."""
        row = int(self._order[self._starts[index]])
        try:
            return self._key(row, self._rows.row(row))
        except (OSError, ValueError, csv.Error, RecursionError):
            return self._key(row, None)

    def key_hashes(self) -> Iterable[int]:
        """`schema.key_hash` of every key."""
        return self._key_hashes.tolist()

    def image_names(self) -> Iterator[str | None]:
        """The path of the image of each record as it is written; None where there is none."""
        for start in self._starts[:-1]:
            try:
                yield _image_name(self._rows.row(int(self._order[start])))
            except (OSError, ValueError, csv.Error, RecursionError):
                yield None

    def _key(self, row: int, fields: JsonDict | None) -> str:
        key, name = (None, None) if fields is None else (fields.get("key"), _image_name(fields))
        if isinstance(key, str | int) and key != "":
            return schema.valid_key(str(key))
        if name is None:
            return f"{self._path.name} row {row + 1}"
        return schema.valid_key(os.path.splitext(name)[0].replace("\\", "/"))

    def sample(self, index: int, key: str, *, keep_captions: bool = True) -> Sample:
        """The record under its key. Raises ValueError or OSError if a row or the image is broken.

        Args:
            index: of the record.
            key: for the sample.
            keep_captions: False leaves the captions out.
        """
        merged: Sample | None = None
        for row in self._order[self._starts[index] : self._starts[index + 1]]:
            try:
                fields = self._rows.row(int(row))
            except (ValueError, csv.Error, RecursionError) as error:
                raise ValueError(f"row {row + 1} of {self._path.name} cannot be read: {error}") from error
            image = self._pop_image(fields)
            fields.pop("key", None)
            if not keep_captions:
                fields = {k: v for k, v in fields.items() if k.lower() not in schema.CAPTION_FIELDS}
            sample = schema.sample_from_fields(key, image, fields)
            merged = sample if merged is None else schema.merge_samples(merged, sample)
        assert merged is not None
        return merged

    def digest(self) -> str:
        """SHA-256 of the file; of a Parquet file that of its size and footer."""
        return self._rows.digest()

    def _pop_image(self, fields: JsonDict) -> bytes | Path:
        """Removes the image column from the fields: encoded bytes, or the path of a file that exists."""
        column = schema.first_field(fields, schema.IMAGE_FIELDS)
        if column is None:
            raise ValueError(f"a row of {self._path.name} names no image")
        value = fields.pop(column)
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str):
            raise ValueError(f"its column {column!r} holds neither an image nor a path")
        if "://" in value:
            raise ValueError(f"{value} is a URL; images are not fetched from the network")
        path = find_image(value, self._image_folders)
        if path is None:
            raise ValueError(f"there is no file {schema.valid_key(str(self._image_folders[0] / value))}")
        return path


def _image_name(fields: JsonDict) -> str | None:
    column = schema.first_field(fields, schema.IMAGE_FIELDS)
    value = None if column is None else fields[column]
    return value if isinstance(value, str) else None


def _open(path: Path) -> TableRows:
    match path.suffix.lower():
        case ".csv" | ".tsv":
            return CsvRows(path)
        case ".jsonl" | ".ndjson":
            return _JsonLines(path)
        case ".parquet":
            return _Parquet(path)
        case _:
            return _JsonList(path)


class _JsonLines:
    """One object per line. The byte offset of each line is kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets = array("q")

    def scan(self) -> Iterator[JsonDict | None]:
        with self._path.open("rb") as file:
            start = 0
            for line in file:
                if line.strip(b" \t\r\n\xef\xbb\xbf"):
                    self._offsets.append(start)
                    try:
                        yield schema.json_object(line.removeprefix(b"\xef\xbb\xbf"), "the line")
                    except ValueError:
                        yield None
                start += len(line)

    def row(self, index: int) -> JsonDict:
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            return schema.json_object(file.readline().removeprefix(b"\xef\xbb\xbf"), "the line")

    def digest(self) -> str:
        return file_digest(self._path)


class _JsonList:
    """A list of objects, a common form of caption and question data sets; held in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        items, self._has_repeats = parse_tolerant(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
        if not isinstance(items, list):
            raise ValueError("neither a list of objects nor COCO JSON")
        self._items: list[object] = items

    def scan(self) -> Iterator[JsonDict | None]:
        for item in self._items:
            is_repeated = self._has_repeats and repeated_name(item) is not None
            yield item if isinstance(item, dict) and not is_repeated else None

    def row(self, index: int) -> JsonDict:
        item = self._items[index]
        if not isinstance(item, dict):
            raise ValueError("not an object")
        if self._has_repeats and (name := repeated_name(item)) is not None:
            raise ValueError(f"the name {name!r} occurs twice in an object")
        return dict(item)

    def digest(self) -> str:
        return file_digest(self._path)


class _Parquet:
    """Rows of a Parquet file. The last row group that was read is kept: sequential access is fast, random is not."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self._path = path
        self._last: tuple[int, pa.Table] | None = None  # number of the row group, its rows
        with _arrow_errors(), pq.ParquetFile(path) as file:
            arrow, meta = file.schema_arrow, file.metadata
            counts = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        self._starts: list[int] = np.cumsum([0, *counts]).tolist()
        column = image_column(path, arrow.names)
        is_path = str(arrow.field(column).type) in ("string", "large_string")
        self._scanned = [column] * is_path + ["key"] * ("key" in arrow.names)
        binary = [f.name for f in arrow if "binary" in str(f.type) and f.name != column]
        self._columns = [name for name in arrow.names if name not in binary]
        self._classes = _class_names(arrow.metadata)

    def scan(self) -> Iterator[JsonDict | None]:
        import pyarrow.parquet as pq

        if not self._scanned:
            yield from ({} for _ in range(self._starts[-1]))
            return
        with _arrow_errors(), pq.ParquetFile(self._path) as file:
            for batch in file.iter_batches(columns=self._scanned):
                yield from batch.to_pylist()

    def row(self, index: int) -> JsonDict:
        import pyarrow.parquet as pq

        group = bisect_right(self._starts, index) - 1
        last = self._last
        with _arrow_errors():
            if last is None or last[0] != group:
                with pq.ParquetFile(self._path) as file:
                    last = self._last = (group, file.read_row_group(group, columns=self._columns))
            fields: JsonDict = last[1].slice(index - self._starts[group], 1).to_pylist()[0]
        for name, classes in self._classes.items():
            if isinstance(number := fields.get(name), int) and 0 <= number < len(classes):
                fields[name] = classes[number]
        if isinstance(extra := fields.get("extra"), str):
            fields["extra"] = schema.json_object(extra.encode(), "the column extra")
        image_column = schema.first_field(fields, schema.IMAGE_FIELDS)
        return {n: v if n == image_column else _json_value(v) for n, v in fields.items() if v is not None}

    def digest(self) -> str:
        with self._path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _FOOTER_BYTES))
            return hashlib.sha256(b"%d " % size + file.read()).hexdigest()

    def __getstate__(self) -> JsonDict:
        return self.__dict__ | {"_last": None}  # a pickle is small: other processes read the row group again


@contextmanager
def _arrow_errors() -> Generator[None]:
    """Errors of pyarrow, and of values that Python cannot hold (a date of the year 300,000), as ValueError."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Class names of integer columns, by column, from the schema metadata that Hugging Face `datasets` writes."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        names = {
            column: feature.get("names") for column, feature in features.items() if isinstance(feature, dict)
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
    return {column: classes for column, classes in names.items() if isinstance(classes, list)}


def _json_value(value: object) -> object:
    """A value of Arrow as JSON has it; times and other types become strings."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(name): _json_value(inner) for name, inner in value.items()}
    return [_json_value(inner) for inner in value] if isinstance(value, list | tuple) else str(value)
