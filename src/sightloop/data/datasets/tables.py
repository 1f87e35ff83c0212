"""Tables with one row per image or per caption: CSV, TSV, JSON lines, a JSON list, Parquet.

`schema` lists the column names. The image column is the first of `schema.IMAGE_FIELDS` that is present and holds a path
relative to the folder of the table (or, where no such file exists, to the current folder); in Parquet also the encoded
bytes, bare or as {"bytes", "path"}. Rows with equal paths are one sample, wherever they are in the table. The key is
the column `key`, or the path without its extension.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from sightloop.data.datasets import schema
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

    notes: tuple[str, ...] = ()

    def __init__(self, path: Path, images: Path | None = None) -> None:
        """Scans the table once.

        Args:
            path: the table.
            images: folder that relative image paths start from; the folder of the table by default.

        Raises:
            UsageError: the file cannot be read as a table, or has no image column.
        """
        self._path, self.name, self._image_folder = path, path.name, images or path.parent
        try:
            self._rows = _open(path)
            image_hashes, key_hashes = array("q"), array("q")
            for row, fields in enumerate(self._rows.scan()):
                name = None if fields is None else _image_name(fields)
                image_hashes.append(hash((row,) if name is None else name))
                key_hashes.append(schema.key_hash(self._key(row, fields)))
        except (OSError, ValueError, csv.Error, RecursionError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{path} cannot be read as a table: {error}") from error
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

    def _key(self, row: int, fields: JsonDict | None) -> str:
        key, name = (None, None) if fields is None else (fields.get("key"), _image_name(fields))
        if isinstance(key, str | int) and key != "":
            return str(key)
        return f"{self._path.name} row {row + 1}" if name is None else os.path.splitext(name)[0]

    def sample(self, index: int, key: str) -> Sample:
        """The record under its key. Raises ValueError or OSError if a row or the image is broken."""
        merged: Sample | None = None
        for row in self._order[self._starts[index] : self._starts[index + 1]]:
            try:
                fields = self._rows.row(int(row))
            except (ValueError, csv.Error, RecursionError) as error:
                raise ValueError(f"row {row + 1} of {self._path.name} cannot be read: {error}") from error
            image = self._pop_image(fields)
            fields.pop("key", None)
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
        for path in (self._image_folder / value, Path(value)):
            if os.path.isfile(path):
                return path
        raise ValueError(f"there is no file {self._image_folder / value}")


def _image_name(fields: JsonDict) -> str | None:
    column = schema.first_field(fields, schema.IMAGE_FIELDS)
    value = None if column is None else fields[column]
    return value if isinstance(value, str) else None


def _open(path: Path) -> TableRows:
    match path.suffix.lower():
        case ".csv" | ".tsv":
            return _Csv(path)
        case ".jsonl" | ".ndjson":
            return _JsonLines(path)
        case ".parquet":
            return _Parquet(path)
        case _:
            return _JsonList(path)


def _image_column(path: Path, columns: Iterable[str]) -> str:
    """The image column. Raises `UsageError` if there is none."""
    columns = list(columns)
    column = schema.first_field(dict.fromkeys(columns, ""), schema.IMAGE_FIELDS)
    if column is None:
        remedy = f"name the column with the image paths {schema.IMAGE_FIELDS[0]!r}"
        if "url" in map(str.lower, columns):
            remedy = (
                "its images are URLs: fetch them first, for example with img2dataset, and open its output"
            )
        raise UsageError(f"{path}: no image column among {', '.join(columns) or 'none'}: {remedy}.")
    return column


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Csv:
    """Comma or tab separated rows under a header. The byte offset of each row is kept, 8 bytes a row."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets = array("q")
        with path.open("rb") as file:
            header = file.readline().decode("utf-8-sig", "surrogateescape")
            # open_clip's tables are tab separated and named .csv.
            has_tabs = path.suffix.lower() == ".tsv" or ("\t" in header and "," not in header)
            self._delimiter = "\t" if has_tabs else ","
        self._columns: list[str] = next((cells for _, cells in self._cells(0) if cells), [])
        _image_column(path, self._columns)

    def scan(self) -> Iterator[JsonDict | None]:
        for number, (start, cells) in enumerate(self._cells(0)):
            if number and cells != []:  # the header, and blank lines
                self._offsets.append(start)
                yield None if cells is None else self._fields(cells)

    def row(self, index: int) -> JsonDict:
        _, cells = next(self._cells(self._offsets[index]))
        if cells is None:
            raise ValueError("a quotation mark is not closed, or a cell is too long")
        return self._fields(cells)

    def digest(self) -> str:
        return _file_digest(self._path)

    def _fields(self, cells: list[str]) -> JsonDict:
        return schema.fields_from_cells(dict(zip(self._columns, cells, strict=False)))

    def _cells(self, start: int) -> Generator[tuple[int, list[str] | None]]:
        """Rows from the byte offset `start`: the offset of each, and its cells, or None if it cannot be parsed.

        A row may span lines (quoted line breaks). The csv reader takes no line before it needs it, so the bytes that it
        has taken when it returns a row end where the next row starts.
        """
        with self._path.open("rb") as file:
            file.seek(start)
            end = start

            def read_lines() -> Iterator[str]:
                nonlocal end
                for line in iter(file.readline, b""):
                    bom = b"" if end else b"\xef\xbb\xbf"  # only at the start of a file; elsewhere it is text
                    end += len(line)
                    yield line.removeprefix(bom).decode("utf-8", "surrogateescape")

            table = csv.reader(read_lines(), delimiter=self._delimiter)
            while True:
                start = end
                try:
                    cells = next(table)
                except StopIteration:
                    return
                except csv.Error:
                    cells = None
                yield start, cells


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
        return _file_digest(self._path)


class _JsonList:
    """A list of objects, a common form of caption and question data sets; held in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._items = json.loads(path.read_bytes())
        if not isinstance(self._items, list):
            raise ValueError("neither a list of objects nor COCO JSON")

    def scan(self) -> Iterator[JsonDict | None]:
        for item in self._items:
            yield item if isinstance(item, dict) else None

    def row(self, index: int) -> JsonDict:
        item = self._items[index]
        if not isinstance(item, dict):
            raise ValueError("not an object")
        return dict(item)

    def digest(self) -> str:
        return _file_digest(self._path)


class _Parquet:
    """Rows of a Parquet file. The last row group that was read is kept: sequential access is fast, random is not."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self._path = path
        self._last: tuple[int, pa.Table] | None = None  # number of the row group, its rows
        with pq.ParquetFile(path) as file:
            arrow, meta = file.schema_arrow, file.metadata
            counts = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        self._starts: list[int] = np.cumsum([0, *counts]).tolist()
        image_column = _image_column(path, arrow.names)
        is_path = str(arrow.field(image_column).type) in ("string", "large_string")
        self._scanned = [image_column] * is_path + ["key"] * ("key" in arrow.names)
        binary = [f.name for f in arrow if "binary" in str(f.type) and f.name != image_column]
        self._columns = [name for name in arrow.names if name not in binary]
        self._classes = _class_names(arrow.metadata)

    def scan(self) -> Iterator[JsonDict | None]:
        import pyarrow.parquet as pq

        if not self._scanned:
            yield from ({} for _ in range(self._starts[-1]))
            return
        with pq.ParquetFile(self._path) as file:
            for batch in file.iter_batches(columns=self._scanned):
                yield from batch.to_pylist()

    def row(self, index: int) -> JsonDict:
        import pyarrow.parquet as pq

        group = bisect_right(self._starts, index) - 1
        last = self._last
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
