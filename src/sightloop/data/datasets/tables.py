"""Tables with a row for each image, or for each of its captions: CSV, TSV, JSON lines, a JSON list, Parquet.

The columns are those of `records`, the image's is the first of `records.PICTURES`: a path from the table's folder (or
from the current one, where it leads nowhere from there), in Parquet also the bytes, bare or as {"bytes", "path"}. Rows
with the same path are one sample, wherever they stand. The key is the column `key`, or the path without its ending.
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
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sightloop.data.datasets import schema
from sightloop.errors import UsageError
from sightloop.types import JsonDict, Sample

if TYPE_CHECKING:
    import pyarrow as pa

_Fields = JsonDict
_FOOTER = 1 << 20  # the end of a Parquet file holds the places and statistics of all columns


class TableRows(Protocol):
    """The rows of one file by number. Only `scan` goes through the whole file."""

    def scan(self) -> Iterable[_Fields | None]:
        """Every row, at least the columns that name its image; None for one that cannot be read."""
        ...

    def row(self, index: int) -> _Fields:
        """One row. Raises ValueError or OSError where it cannot be read."""
        ...

    def digest(self) -> str: ...


class TableSource:
    """A source: one sample for each image of a table, in the order of their first rows."""

    notes: tuple[str, ...] = ()

    def __init__(self, path: Path, pictures: Path | None = None) -> None:
        """Goes through the table once. Raises `UsageError` where it is no table or has no column with images."""
        self._path, self.name, self._base = path, path.name, pictures or path.parent
        try:
            self._rows = _open(path)
            pictures_seen, keys_seen = array("q"), array("q")
            for row, fields in enumerate(self._rows.scan()):
                name = None if fields is None else _picture_name(fields)
                pictures_seen.append(hash((row,) if name is None else name))
                keys_seen.append(schema.key_hash(self._key(row, fields)))
        except (OSError, ValueError, csv.Error, RecursionError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{path} cannot be read as a table: {error}") from error
        # Rows in the order of the samples, and where each sample's rows start in it.
        _, first, group = np.unique(
            np.asarray(pictures_seen, np.int64), return_index=True, return_inverse=True
        )
        self._order = np.argsort(first[group], kind="stable")
        counts = np.bincount(group, minlength=len(first))[np.argsort(first)]
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        self._hashes = np.asarray(keys_seen, np.int64)[np.sort(first)]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def key(self, index: int) -> str:
        """The key of a record."""
        row = int(self._order[self._starts[index]])
        try:
            return self._key(row, self._rows.row(row))
        except (OSError, ValueError, csv.Error, RecursionError):
            return self._key(row, None)

    def hashes(self) -> Iterable[int]:
        """key_hash() of every key."""
        return self._hashes.tolist()

    def _key(self, row: int, fields: _Fields | None) -> str:
        key, name = (None, None) if fields is None else (fields.get("key"), _picture_name(fields))
        if isinstance(key, str | int) and key != "":
            return str(key)
        return f"{self._path.name} row {row + 1}" if name is None else os.path.splitext(name)[0]

    def sample(self, index: int, key: str) -> Sample:
        """The record under its key. Raises ValueError or OSError where it is broken."""
        sample: Sample | None = None
        for row in self._order[self._starts[index] : self._starts[index + 1]]:
            try:
                fields = self._rows.row(int(row))
            except (ValueError, csv.Error, RecursionError) as error:
                raise ValueError(f"row {row + 1} of {self._path.name} cannot be read: {error}") from error
            picture = self._picture(fields)
            fields.pop("key", None)
            found = schema.sample_from_fields(key, picture, fields)
            sample = found if sample is None else schema.merged(sample, found)
        assert sample is not None
        return sample

    def digest(self) -> str:
        """Of the file; of a Parquet file its size and the end, which describes the rest."""
        return self._rows.digest()

    def _picture(self, fields: _Fields) -> bytes | Path:
        """Takes the image out of the fields."""
        column = schema.first_field(fields, schema.IMAGE_FIELDS)
        if column is None:
            raise ValueError(f"a row of {self._path.name} names no image")
        value = fields.pop(column)
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str):
            raise ValueError(f"its column {column!r} holds no image and no path")
        if "://" in value:
            raise ValueError(f"{value} is an address; images are not fetched from the network")
        for path in (self._base / value, Path(value)):
            if os.path.isfile(path):
                return path
        raise ValueError(f"there is no file {self._base / value}")


def _picture_name(fields: _Fields) -> str | None:
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


def _check_columns(path: Path, columns: Iterable[str]) -> None:
    columns = list(columns)
    if schema.first_field(dict.fromkeys(columns, ""), schema.IMAGE_FIELDS) is None:
        remedy = f"name the one with the paths of the images {schema.IMAGE_FIELDS[0]!r}"
        if "url" in map(str.lower, columns):
            remedy = (
                "its images are addresses; fetch them first, with img2dataset say, and open what it writes"
            )
        raise UsageError(f"{path}: no column with images among {', '.join(columns) or 'none'}: {remedy}.")


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Csv:
    """Comma or tab separated, with a header; the places of the rows are kept, 8 bytes each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets = array("q")
        with path.open("rb") as file:
            head = file.readline().decode("utf-8-sig", "surrogateescape")
            # open_clip's tables are tab separated whatever they are called.
            tabs = path.suffix.lower() == ".tsv" or ("\t" in head and "," not in head)
            self._delimiter = "\t" if tabs else ","
        self.columns: list[str] = next((cells for _, cells in self._cells(0) if cells), [])
        _check_columns(path, self.columns)

    def scan(self) -> Iterator[_Fields | None]:
        for number, (start, cells) in enumerate(self._cells(0)):
            if number and cells != []:  # the header, and blank lines
                self._offsets.append(start)
                yield None if cells is None else self._fields(cells)

    def row(self, index: int) -> _Fields:
        _, cells = next(self._cells(self._offsets[index]))
        if cells is None:
            raise ValueError("a quotation mark is not closed, or a cell is too long")
        return self._fields(cells)

    def digest(self) -> str:
        return _file_digest(self._path)

    def _fields(self, cells: list[str]) -> _Fields:
        return schema.cells(dict(zip(self.columns, cells, strict=False)))

    def _cells(self, start: int) -> Generator[tuple[int, list[str] | None]]:
        """From a row on: where each row starts, and its cells or None. The csv reader takes no line too many."""
        with self._path.open("rb") as file:
            file.seek(start)
            end = start

            def texts() -> Iterator[str]:
                nonlocal end
                for line in iter(file.readline, b""):
                    mark = b"" if end else b"\xef\xbb\xbf"  # a file may begin with one; later it is text
                    end += len(line)
                    yield line.removeprefix(mark).decode("utf-8", "surrogateescape")

            table = csv.reader(texts(), delimiter=self._delimiter)
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
    """An object a line; the places of the lines are kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets = array("q")

    def scan(self) -> Iterator[_Fields | None]:
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

    def row(self, index: int) -> _Fields:
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            return schema.json_object(file.readline().removeprefix(b"\xef\xbb\xbf"), "the line")

    def digest(self) -> str:
        return _file_digest(self._path)


class _JsonList:
    """One list of objects, as many data sets for captions and questions come; held in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._items = json.loads(path.read_bytes())
        if not isinstance(self._items, list):
            raise ValueError("neither a list of objects nor COCO's json")

    def scan(self) -> Iterator[_Fields | None]:
        for item in self._items:
            yield item if isinstance(item, dict) else None

    def row(self, index: int) -> _Fields:
        item = self._items[index]
        if not isinstance(item, dict):
            raise ValueError("not an object")
        return dict(item)

    def digest(self) -> str:
        return _file_digest(self._path)


class _Parquet:
    """Row groups are read whole and the last one is kept, so a walk in order is fast and a random one is not."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self._path = path
        self._last: tuple[int, pa.Table] | None = None
        with pq.ParquetFile(path) as file:
            arrow, meta = file.schema_arrow, file.metadata
            counts = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        self._starts: list[int] = np.cumsum([0, *counts]).tolist()
        _check_columns(path, arrow.names)
        pictures = schema.first_field(dict.fromkeys(arrow.names, ""), schema.IMAGE_FIELDS)
        named = str(arrow.field(pictures).type) in ("string", "large_string")
        self._names = [pictures] * named + ["key"] * ("key" in arrow.names)
        unread = [f.name for f in arrow if "binary" in str(f.type) and f.name != pictures]
        self._columns = [name for name in arrow.names if name not in unread]
        self._classes = _class_names(arrow.metadata)

    def scan(self) -> Iterator[_Fields | None]:
        import pyarrow.parquet as pq

        if not self._names:
            yield from ({} for _ in range(self._starts[-1]))
            return
        with pq.ParquetFile(self._path) as file:
            for batch in file.iter_batches(columns=self._names):
                yield from batch.to_pylist()

    def row(self, index: int) -> _Fields:
        import pyarrow.parquet as pq

        group = bisect_right(self._starts, index) - 1
        last = self._last
        if last is None or last[0] != group:
            with pq.ParquetFile(self._path) as file:
                last = self._last = (group, file.read_row_group(group, columns=self._columns))
        fields: _Fields = last[1].slice(index - self._starts[group], 1).to_pylist()[0]
        for name, classes in self._classes.items():
            if isinstance(number := fields.get(name), int) and 0 <= number < len(classes):
                fields[name] = classes[number]
        if isinstance(extra := fields.get("extra"), str):
            fields["extra"] = schema.json_object(extra.encode(), "the column extra")
        picture = schema.first_field(fields, schema.IMAGE_FIELDS)
        return {n: v if n == picture else _plain(v) for n, v in fields.items() if v is not None}

    def digest(self) -> str:
        with self._path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _FOOTER))
            return hashlib.sha256(b"%d " % size + file.read()).hexdigest()

    def __getstate__(self) -> _Fields:
        return self.__dict__ | {"_last": None}  # other processes read their own


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """The names behind the numbers of class columns, as Hugging Face's `datasets` notes them in the schema."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        found = {name: about.get("names") for name, about in features.items() if isinstance(about, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
    return {name: names for name, names in found.items() if isinstance(names, list)}


def _plain(value: Any) -> Any:
    """A value as JSON has it; times and the like become texts."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else str(value)
