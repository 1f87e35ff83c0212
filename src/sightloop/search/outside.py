"""Vectors that were made elsewhere, with records of their images, as rows of an index."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np

from sightloop.errors import UsageError
from sightloop.search.rows import (
    COLUMNS,
    PUBLIC_COLUMNS,
    Table,
    empty_rows,
    merge_columns,
    row_schema,
    table_of,
    unit_vectors,
    vector_column,
)
from sightloop.search.store import Store, VectorSpace
from sightloop.types import Integers, JsonMapping

# Records of n images: a mapping of each, one column of n values by name, or a pyarrow.Table.
OutsideRows: TypeAlias = Sequence[JsonMapping] | Mapping[str, Any] | Table
_ROWS_AT_ONCE: Final = 20_000  # in one commit


def add_outside(
    store: Store, space: VectorSpace, vectors: Any, rows: OutsideRows | None, ids: Sequence[str] | None
) -> list[str]:
    """Adds vectors `[n, d]` with their records; the caller holds the lock. Returns the ids.

    Raises:
        UsageError: another shape, NaN, zero, ids that are taken or repeated. Of more than 20,000 rows, the parts before
            the one at fault are added.
    """
    array = vectors if isinstance(vectors, np.ndarray) else np.asarray(vectors)
    count = len(array) if array.ndim == 2 else 1
    array = array.reshape(count, -1)
    columns = _as_table(rows, ids, count)
    names: list[str] = []
    taken = _id_hashes(store)
    for start in range(0, count, _ROWS_AT_ONCE):
        size = min(_ROWS_AT_ONCE, count - start)
        table = columns.slice(start, size)
        own: list[str] = table["id"].to_pylist()
        taken = _with_new_ids(taken, own)
        unit = unit_vectors(array[start : start + size], space.width, "vectors", own)
        store.add(merge_columns(_complete(table), {space.column: vector_column(unit, space.dtype)}))
        names += own
    return names


def _as_table(rows: OutsideRows | None, ids: Sequence[str] | None, count: int) -> Table:
    """The records as columns, with an id for each."""
    import pyarrow as pa

    table = pa.table({"id": pa.array([], pa.string())}).slice(0, 0) if rows is None else _table_from(rows)
    own = None if ids is None else [str(name) for name in ids]
    if own is None and (rows is None or "id" not in table.column_names):
        own = _random_ids(count)
    if rows is not None and table.num_rows != count:
        raise UsageError(f"rows: {table.num_rows:,} for {count:,} vectors; give one for each")
    if own is not None:
        if len(own) != count:
            raise UsageError(f"ids: {len(own):,} for {count:,} vectors; give one for each")
        others = [name for name in table.column_names if name != "id"] if rows is not None else []
        table = pa.table([pa.array(own, pa.string()), *(table[name] for name in others)], ["id", *others])
    if unknown := set(table.column_names) - set(COLUMNS):
        raise UsageError(
            f"rows: no field {', '.join(sorted(unknown))}; there are {', '.join(PUBLIC_COLUMNS)} "
            '(others go below "extra", as a JSON string)'
        )
    return table


def _table_from(rows: OutsideRows) -> Table:
    import pyarrow as pa

    if isinstance(rows, pa.Table):
        return rows
    try:
        if isinstance(rows, Mapping):
            return pa.table({str(name): pa.array(values) for name, values in rows.items()})
        names = list(dict.fromkeys(str(name) for row in rows for name in row))
        known = [name for name in names if name in COLUMNS]
        if len(known) < len(names):  # is refused with its name
            return pa.table({name: [None] * len(rows) for name in names})
        return pa.Table.from_pylist([dict(row) for row in rows], schema=row_schema(known))
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise UsageError(f"rows: values of the wrong type or number: {error}") from error


def _complete(table: Table) -> Table:
    """The records with all columns of an index; texts become keywords."""
    import pyarrow as pa

    if {"captions", "texts", "labels", "path"} & set(table.column_names):
        return table_of(table.to_pylist())
    full = empty_rows(table.num_rows, table["id"].to_pylist())
    schema = row_schema()
    for name in table.column_names:
        try:
            column = table[name].cast(schema.field(name).type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UsageError(f"rows: {name} has the wrong type: {error}") from error
        full = full.set_column(full.column_names.index(name), name, column)
    return full


def _random_ids(count: int) -> list[str]:
    digits = secrets.token_hex(8 * count)
    return [digits[i : i + 16] for i in range(0, 16 * count, 16)]


def _id_hashes(store: Store) -> Integers:
    parts = [np.fromiter(map(hash, part["id"].to_pylist()), np.int64) for part in store.scan(["id"])]
    return np.sort(np.concatenate(parts)) if parts else np.zeros(0, np.int64)


def _with_new_ids(taken: Integers, names: Sequence[str]) -> Integers:
    """Sorted hashes of ids `[m]` with n further ones. UsageError, with the first, if one is taken or repeated."""
    hashes = np.fromiter(map(hash, names), np.int64, len(names))
    _, first = np.unique(hashes, return_index=True)
    again = np.ones(len(names), bool)
    again[first] = False
    if len(taken):
        again |= taken[np.searchsorted(taken, hashes).clip(max=len(taken) - 1)] == hashes
    if again.any():
        raise UsageError(f"ids: {names[int(again.argmax())]!r} is in the index already, or comes twice")
    return np.sort(
        np.concatenate([taken, np.sort(hashes)]), kind="stable"
    )  # two sorted runs, which it merges
