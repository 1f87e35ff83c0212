"""Rows of delimited text under a header, by number, for `tables`."""

from __future__ import annotations

import csv
import hashlib
import io
from array import array
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import IO

from sightloop.data.datasets import schema
from sightloop.errors import UsageError
from sightloop.types import JsonDict

_DELIMITERS = {",": "a comma", ";": "a semicolon", "|": "a vertical bar", "\t": "a tab"}
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_MAX_HEADER_BYTES = 1 << 24
_BOM = b"\xef\xbb\xbf"


class CsvRows:
    """Rows separated by commas, semicolons, tabs or vertical bars. The byte offset of each row is kept, 8 bytes a row.

    The separator is the one with which the header has an image column. A file in UTF-16 (Excel's "Unicode text") is
    held in memory as UTF-8.
    """

    def __init__(self, path: Path) -> None:
        """Reads the header. Raises UsageError if there is no image column, or a column name repeats."""
        self._path = path
        self._offsets = array("q")
        self._text = _text_from_utf16(path)
        with self._open() as file:
            header = file.readline(_MAX_HEADER_BYTES).removeprefix(_BOM).decode("utf-8", "surrogateescape")
        if not header:
            raise UsageError(f"{path}: the file is empty.")
        if "\r" in header.removesuffix("\n").removesuffix("\r"):
            raise UsageError(f"{path}: its lines end with CR alone; save it with LF or CRLF as line ends.")
        self._delimiter = _find_delimiter(header, is_tsv=path.suffix.lower() == ".tsv")
        cells = next((cells for _, cells in self._cells(0) if cells), [])
        self._columns = [cell.strip() for cell in cells]
        image_column(path, self._columns, f"; cells are separated by {_DELIMITERS[self._delimiter]}")

    def scan(self) -> Iterator[JsonDict | None]:
        """All rows; None for one that cannot be parsed."""
        for number, (start, cells) in enumerate(self._cells(0)):
            if number and cells != []:  # the header, and blank lines
                self._offsets.append(start)
                try:
                    yield None if cells is None else self._fields(cells)
                except ValueError:
                    yield None

    def row(self, index: int) -> JsonDict:
        """One row. Raises ValueError if it cannot be parsed, or has more cells than the header."""
        _, cells = next(self._cells(self._offsets[index]))
        if cells is None:
            raise ValueError("a quotation mark is not closed or not doubled, or a cell is too long")
        return self._fields(cells)

    def digest(self) -> str:
        """SHA-256 of the file."""
        return file_digest(self._path)

    def _open(self) -> IO[bytes]:
        return self._path.open("rb") if self._text is None else io.BytesIO(self._text)

    def _fields(self, cells: list[str]) -> JsonDict:
        if any(cells[len(self._columns) :]):
            raise ValueError(
                f"{len(cells)} cells under {len(self._columns)} columns: put quotation marks around cells that hold "
                f"{_DELIMITERS[self._delimiter]}"
            )
        if self._delimiter == "|":  # Flickr30k: "a.jpg| 0| Two dogs ."
            cells = [cell.strip() for cell in cells]
        return schema.fields_from_cells(dict(zip(self._columns, cells, strict=False)))

    def _cells(self, start: int) -> Generator[tuple[int, list[str] | None]]:
        """Rows from the byte offset `start`: the offset of each, and its cells, or None if it cannot be parsed.

        A row may span lines (quoted line breaks). After one that cannot be parsed, such as one whose quotation mark is
        not closed, the next line is the next row.
        """
        with self._open() as file:
            while (start_of_rest := (yield from self._cells_until_error(file, start))) is not None:
                start = start_of_rest

    def _cells_until_error(
        self, file: IO[bytes], start: int
    ) -> Generator[tuple[int, list[str] | None], None, int | None]:
        """Rows until one that cannot be parsed; returns the offset of the line after that one's first line.

        The csv reader takes no line before it needs it, so the bytes that it has taken when it returns a row end where
        the next row starts.
        """
        file.seek(start)
        end = line_end = start

        def read_lines() -> Iterator[str]:
            nonlocal end, line_end
            for line in iter(file.readline, b""):
                bom = b"" if end else _BOM  # only at the start of a file; elsewhere it is text
                line_end = end + len(line) if end == start else line_end
                end += len(line)
                yield line.removeprefix(bom).decode("utf-8", "surrogateescape")

        table = csv.reader(read_lines(), delimiter=self._delimiter, strict=True)
        while True:
            start = end
            try:
                cells = next(table)
            except StopIteration:
                return None
            except csv.Error:
                yield start, None
                return line_end
            yield start, cells


def image_column(path: Path, columns: Iterable[str], hint: str = "") -> str:
    """The image column of a table.

    Args:
        path: of the table, for messages.
        columns: their names.
        hint: for the message, if there is no image column.

    Raises:
        UsageError: there is none, or a column name repeats.
    """
    columns = list(columns)
    repeated = [column for column, count in Counter(columns).items() if column and count > 1]
    if repeated:
        raise UsageError(f"{path}: several columns are named {repeated[0]!r}: rename all but one.")
    column = schema.first_field(dict.fromkeys(columns, ""), schema.IMAGE_FIELDS)
    if column is None:
        remedy = f"name the column with the image paths {schema.IMAGE_FIELDS[0]!r}{hint}"
        if "url" in map(str.lower, columns):
            remedy = (
                "its images are URLs: fetch them first, for example with img2dataset, and open its output"
            )
        raise UsageError(f"{path}: no image column among {', '.join(columns) or 'none'}: {remedy}.")
    return column


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text_from_utf16(path: Path) -> bytes | None:
    """The content of a UTF-16 file as UTF-8; None if it is not UTF-16."""
    with path.open("rb") as file:
        if file.read(2) not in _UTF16_MARKS:
            return None
        file.seek(0)
        try:
            return file.read().decode("utf-16").encode()
        except ValueError:
            raise UsageError(f"{path}: its text is damaged UTF-16; save it as UTF-8.") from None


def _find_delimiter(header: str, *, is_tsv: bool) -> str:
    """The delimiter that gives an image column, or else the usual one of the file's extension."""
    usual = "\t" if is_tsv else ","
    for delimiter in dict.fromkeys((usual, *_DELIMITERS)):
        try:
            cells = next(csv.reader([header], delimiter=delimiter), [])
        except csv.Error:
            continue
        names = [cell.strip() for cell in cells]
        if len(names) > 1 and schema.first_field(dict.fromkeys(names, ""), schema.IMAGE_FIELDS) is not None:
            return delimiter
    return usual
