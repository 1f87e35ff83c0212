"""Rows of an index: their columns, and tables of them from records, samples and vectors."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np

from sightloop.errors import UsageError
from sightloop.search.keywords import extra_key, normalize, searchable
from sightloop.types import Floats32, JsonDict, JsonMapping

# pyarrow has no type hints: a pyarrow.Table, and a column of one or a type or schema of it.
Table: TypeAlias = Any
Arrow: TypeAlias = Any

# Column -> its Arrow type. Times: `mtime` in nanoseconds since 1970, `time` in seconds of the camera's clock;
# `start` and `end` of a scene in seconds of its video, null for an image.
COLUMNS: Final[dict[str, str]] = {
    "id": "string",
    "root": "string",
    "path": "string",
    "size": "int64",
    "mtime": "int64",
    "sha256": "string",
    "pixels": "string",
    "phash": "int64",
    "spectrum": "string",
    "width": "int32",
    "height": "int32",
    "time": "int64",
    "latitude": "float64",
    "longitude": "float64",
    "start": "float64",
    "end": "float64",
    "captions": "list<string>",
    "texts": "list<string>",
    "labels": "list<string>",
    "regions": "string",
    "extra": "string",
    "stamp": "int64",
    "path_key": "string",
    "caption_keys": "string",
    "label_keys": "string",
    "extra_keys": "string",
    "words": "string",
    "grams": "string",
}
_DERIVED = ("stamp", "path_key", "caption_keys", "label_keys", "extra_keys", "words", "grams")
PUBLIC_COLUMNS: Final = tuple(name for name in COLUMNS if name not in (*_DERIVED, "spectrum"))
_LISTS = ("captions", "texts", "labels")
_STRINGS = ("id", "root", "path", "sha256")
_ZERO_LENGTH = 1e-6  # a vector shorter than this has no direction


def row_schema(names: Sequence[str] = tuple(COLUMNS)) -> Arrow:
    """The Arrow schema of these columns, vectors aside."""
    import pyarrow as pa

    types = {
        "string": pa.string(),
        "int64": pa.int64(),
        "int32": pa.int32(),
        "float64": pa.float64(),
        "list<string>": pa.list_(pa.string()),
    }
    return pa.schema([pa.field(name, types[COLUMNS[name]]) for name in names])


def with_derived(row: JsonMapping) -> JsonDict:
    """A record with what filters and keywords look at: its path, captions, texts and labels, normalized."""
    full = JsonDict(row)
    captions, texts, labels = (list(full.get(name) or ()) for name in _LISTS)
    full["path_key"] = str(full.get("path") or "").lower()
    full["caption_keys"] = _keys(captions)
    full["label_keys"] = _keys(labels)
    full["extra_keys"] = _extra_keys(full.get("extra"))
    full["words"], full["grams"] = searchable([*captions, *texts, *labels])
    return full


def _keys(texts: Sequence[str]) -> str:
    """Texts as one string in which each stands between line ends."""
    return "".join(f"\n{normalize(text)}" for text in texts) + "\n" if texts else ""


def _extra_keys(extra: object) -> str:
    """The fields of a JSON object as `_keys` has texts, each as "name=value"; those of lists one by one."""
    try:
        fields = json.loads(extra) if isinstance(extra, str) else {}
    except (ValueError, RecursionError):
        return ""
    pairs = [
        extra_key(str(name), each)
        for name, value in (fields.items() if isinstance(fields, dict) else ())
        for each in (value if isinstance(value, list) else [value])
        if isinstance(each, str | int | float)
    ]
    return "".join(f"\n{pair}" for pair in dict.fromkeys(pairs)) + "\n" if pairs else ""


def table_of(rows: Sequence[JsonMapping]) -> Table:
    """A table with all columns but vectors; fields that a record lacks are null.

    Raises:
        UsageError: a field is unknown, or a value has the wrong type.
    """
    import pyarrow as pa

    full: list[JsonDict] = []
    for row in rows:
        if unknown := set(row) - set(COLUMNS):
            raise UsageError(
                f"rows: no field {', '.join(sorted(unknown))}; there are {', '.join(PUBLIC_COLUMNS)} "
                '(others go below "extra", as a JSON string)'
            )
        full.append(with_derived(dict.fromkeys(_STRINGS, "") | {name: [] for name in _LISTS} | dict(row)))
    try:
        return pa.Table.from_pylist(full, schema=row_schema())
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise UsageError(f"rows: a value has the wrong type: {error}") from error


def empty_rows(count: int, ids: Sequence[str] | None = None) -> Table:
    """A table of rows that are nothing but their ids; random ids where none are given."""
    import pyarrow as pa

    names = [secrets.token_hex(8) for _ in range(count)] if ids is None else list(ids)
    columns: list[Arrow] = []
    schema = row_schema()
    for field in schema:
        if field.name == "id":
            columns.append(pa.array(names, pa.string()))
        elif field.type == pa.string() and field.name not in ("pixels", "spectrum", "regions", "extra"):
            columns.append(pa.repeat(pa.scalar("", pa.string()), count))
        else:
            columns.append(pa.nulls(count, field.type))
    return pa.table(columns, schema=schema)


def vector_type(width: int, dtype: str) -> Arrow:
    """The Arrow type of a vector column."""
    import pyarrow as pa

    return pa.list_(pa.float16() if dtype == "float16" else pa.float32(), width)


def vector_column(vectors: Floats32, dtype: str) -> Arrow:
    """Vectors `[n, d]` as an Arrow column of lists of d."""
    import pyarrow as pa

    stored = np.ascontiguousarray(vectors, np.float16 if dtype == "float16" else np.float32)
    return pa.FixedSizeListArray.from_arrays(pa.array(stored.ravel()), vectors.shape[1])


def vectors_of(column: Arrow, width: int) -> Floats32:
    """float32 `[n, d]` of a vector column; rows without a vector are zero."""
    parts: list[Floats32] = []
    for chunk in column.chunks:
        values = (
            chunk.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(-1, width)
        )
        if chunk.null_count:
            whole = np.zeros((len(chunk), width), np.float32)
            whole[np.asarray(chunk.is_valid())] = values
            values = whole
        parts.append(values)
    return np.concatenate(parts) if parts else np.zeros((0, width), np.float32)


def unit_vectors(vectors: object, width: int, what: str, names: Sequence[str] | None = None) -> Floats32:
    """Vectors `[n, d]` of unit length, checked.

    Args:
        vectors: an array `[n, d]`, or `[d]` for one.
        width: d.
        what: for messages: "vectors", "query".
        names: of the rows, for messages.

    Raises:
        UsageError: another shape, NaN or infinity, or a vector of length zero; the message names the first such row.
    """
    try:
        array = np.asarray(vectors, np.float32)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{what}: no array of numbers: {error}") from None
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or array.shape[1] != width:
        shape = " x ".join(map(str, array.shape))
        raise UsageError(
            f"{what}: the shape is {shape}; the index has vectors of {width} numbers, so give [n, {width}]"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.sqrt(np.einsum("nd,nd->n", array, array, dtype=np.float64))
    for is_bad, reason in (
        (~np.isfinite(array).all(axis=1) | ~np.isfinite(lengths), "holds NaN or infinity"),
        (lengths < _ZERO_LENGTH, "is zero, which has no direction"),
    ):
        if is_bad.any():
            first, count = int(is_bad.argmax()), int(is_bad.sum())
            name = names[first] if names else f"row {first}" if len(array) > 1 else "the vector"
            more = f" (and {count - 1:,} more)" if count > 1 else ""
            raise UsageError(f"{what}: {name} {reason}{more}; leave such rows out")
    return array / lengths.astype(np.float32)[:, None]


def merge_columns(base: Table, columns: Mapping[str, Arrow]) -> Table:
    """A table with further columns."""
    for name, column in columns.items():
        base = base.append_column(name, column)
    return base
