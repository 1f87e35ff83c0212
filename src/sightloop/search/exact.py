"""Exact search: rows in memory as float32 vectors, scored against a query one by one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sightloop.search.rows import Table, vector_column, vectors_of
from sightloop.search.store import Found, VectorSpace
from sightloop.types import Floats32, Integers

_WITHOUT_VECTOR = -2.0  # score of a row that has none: below every cosine


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """All rows of one version of a store with the vectors of one space.

    Args:
        version: of the store.
        column: of the vectors.
        rows: the other columns, n rows.
        vectors: float32 `[n, d]`, unit length, zero for rows without a vector.
    """

    version: int
    column: str
    rows: Table
    vectors: Floats32

    @classmethod
    def of(cls, table: Table, space: VectorSpace, version: int) -> Snapshot:
        """A snapshot of a table with the space's column."""
        vectors = _unit(vectors_of(table[space.column], space.width))
        return cls(version, space.column, table.drop_columns([space.column]), vectors)

    def nearest(self, query: Floats32, k: int, columns: Sequence[str]) -> Found:
        """The k rows with the highest cosine."""
        scores = self.vectors @ query
        chosen = top_rows(scores, k)
        chosen = chosen[self.vectors[chosen].any(axis=1)]
        own = [name for name in columns if name != self.column]
        rows = self.rows.select(own).take(chosen)
        if self.column in columns:
            rows = rows.append_column(self.column, vector_column(self.vectors[chosen], "float32"))
        return Found(rows, scores[chosen])


def top_rows(scores: Floats32, k: int) -> Integers:
    """Indices of the k highest of scores `[n]`, best first, ties in order."""
    k = min(k, len(scores))
    if k < 1:
        return np.zeros(0, np.int64)
    level = np.partition(scores, -k)[-k]
    above = np.flatnonzero(scores > level)
    chosen = np.concatenate([above, np.flatnonzero(scores == level)[: k - len(above)]])
    return chosen[np.lexsort((chosen, -scores[chosen]))]


def nearest_of(rows: Table, space: VectorSpace, query: Floats32, k: int, columns: Sequence[str]) -> Found:
    """The k best of some rows, by their exact cosines.

    Args:
        rows: with the space's column.
        space: of the vectors; of several an image the nearest counts.
        query: unit vector `[d]`.
        k: how many.
        columns: of the rows found.
    """
    vectors = vectors_of(rows[space.column], space.width).reshape(-1, space.queries, space.dim)
    unit = _unit(vectors.reshape(-1, space.dim))
    scores = (unit @ query).reshape(-1, space.queries).max(axis=1, initial=_WITHOUT_VECTOR)
    scores[~vectors.any(axis=(1, 2))] = _WITHOUT_VECTOR
    chosen = top_rows(scores, k)
    chosen = chosen[scores[chosen] > _WITHOUT_VECTOR]
    return Found(rows.select(list(columns)).take(chosen), scores[chosen])


def best_rows(parts: Iterable[Found], k: int, columns: Sequence[str]) -> Found:
    """The k best rows of several results."""
    import pyarrow as pa

    best: Found | None = None
    for part in parts:
        if best is None:
            best = part
            continue
        scores = np.concatenate([best.scores, part.scores])
        chosen = top_rows(scores, k)
        best = Found(pa.concat_tables([best.rows, part.rows]).take(chosen), scores[chosen])
    return best or Found(pa.table({name: [] for name in columns}), np.zeros(0, np.float32))


def _unit(vectors: Floats32) -> Floats32:
    """Vectors `[n, d]` made unit length again, which rounding took away; zero ones stay zero."""
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    return vectors / np.maximum(lengths, 1e-12)[:, None]
