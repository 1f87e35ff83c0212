"""Reader and writer of result tables: rows with a "name" in a .jsonl, .csv or .parquet file that people may edit."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from sightloop.data.atomic import atomic_path, check_regular
from sightloop.data.datasets.schema import json_text
from sightloop.errors import UsageError
from sightloop.types import JsonDict

ENDINGS = (".jsonl", ".csv", ".parquet")
_BOM = b"\xef\xbb\xbf"
_GROUP_ROWS = 10_000  # of a Parquet file


def check_table_path(path: Path) -> None:
    """Raises `UsageError` unless `path` names a table in a folder that exists."""
    if path.suffix.lower() not in ENDINGS:
        raise UsageError(f"--out {path}: the file must end in .jsonl, .csv or .parquet.")
    if path.is_dir():
        raise UsageError(f"--out {path}: this is a folder; name a file.")
    if not path.parent.is_dir():
        raise UsageError(f"--out {path}: the folder {path.parent} does not exist; make it first.")
    check_regular(path)
    if path.suffix.lower() == ".parquet" and find_spec("pyarrow") is None:
        raise UsageError(f"--out {path}: needs pyarrow (pip install pyarrow), or name a .jsonl or .csv file.")


def rows_by_name(path: Path) -> dict[str, list[JsonDict]]:
    """The rows of a finished table. Raises `UsageError` naming the line that cannot be read."""
    read = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}[path.suffix.lower()]
    rows: dict[str, list[JsonDict]] = {}
    try:
        for row in read(path):
            rows.setdefault(row["name"], []).append(row)
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(
            f"--out {path} cannot be continued: {error}; fix it, move it, or replace it with --write overwrite."
        ) from error
    return rows


def write_rows(path: Path, rows: Callable[[], Iterable[JsonDict]], columns: Iterable[str]) -> None:
    """Writes a table by atomic rename.

    Args:
        path: Its ending gives the format.
        rows: Called for each pass over the rows; CSV and Parquet need two, because columns come first.
        columns: The first columns of CSV and Parquet, in order; others follow as they appear.
    """
    with atomic_path(path) as temporary:
        if path.suffix.lower() == ".jsonl":
            with temporary.open("wb") as file:
                file.writelines(json_text(row).encode() + b"\n" for row in rows())
        elif path.suffix.lower() == ".csv":
            _write_csv(temporary, rows, columns)
        else:
            _write_parquet(temporary, rows, columns)


def _write_csv(path: Path, rows: Callable[[], Iterable[JsonDict]], columns: Iterable[str]) -> None:
    names = dict.fromkeys(columns)
    for row in rows():
        names.update(dict.fromkeys(row))
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        table = csv.DictWriter(file, list(names), restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(rows())


def _write_parquet(path: Path, rows: Callable[[], Iterable[JsonDict]], columns: Iterable[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds: dict[str, set[type]] = {name: set() for name in columns}
    for row in rows():
        for name, value in row.items():
            kinds.setdefault(name, set()).update(() if value is None else (type(value),))
    fields = [pa.field(name, _arrow_type(seen)) for name, seen in kinds.items()]
    texts = {field.name for field in fields if field.type == pa.string()}
    schema, iterator = pa.schema(fields), iter(rows())
    with pq.ParquetWriter(str(path), schema) as writer:
        while group := list(islice(iterator, _GROUP_ROWS)):
            cells = [
                {k: _text(v) if k in texts and v is not None else v for k, v in row.items()} for row in group
            ]
            writer.write_table(pa.Table.from_pylist(cells, schema=schema))


def _arrow_type(kinds: set[type]) -> Any:  # pyarrow has no type hints
    """Type of a Parquet column; values of several kinds, lists and objects are stored as text."""
    import pyarrow as pa

    if kinds and kinds <= {bool}:
        return pa.bool_()
    if kinds and kinds <= {int}:
        return pa.int64()
    return pa.float64() if kinds and kinds <= {int, float} else pa.string()


def _text(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()


def _csv_rows(path: Path) -> Iterator[JsonDict]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file, strict=True)
        for number, cells in enumerate(table, 2):
            if cells.get("name") is None or None in cells:
                raise ValueError(f"row {number} has no 'name', or too many cells")
            yield {key: value for key, value in cells.items() if value is not None}


def _jsonl_rows(path: Path) -> Iterator[JsonDict]:
    """Rows of a file that people may have edited: blank lines, a BOM and a last line without newline are allowed."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.removeprefix(_BOM))
            except ValueError:
                row = None
            if not isinstance(row, dict) or not isinstance(row.get("name"), str):
                raise ValueError(f"line {number} is not a JSON object with a 'name'")
            yield row


def _parquet_rows(path: Path) -> Iterator[JsonDict]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(str(path)) as file:
        if "name" not in file.schema_arrow.names:
            raise ValueError("it has no column 'name'")
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                if not isinstance(row["name"], str):
                    raise ValueError("a row has no 'name'")
                yield {key: value for key, value in row.items() if value is not None}
