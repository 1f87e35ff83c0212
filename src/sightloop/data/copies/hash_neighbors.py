"""Neighbors of 64-bit hashes within a Hamming distance, by multi-index hashing (Norouzi et al. 2012).

Hashes are cut into 3 bands of 21 or 22 bits. Of two hashes that differ in at most 8 bits, one band differs in at most
8 / 3 = 2 bits, so it suffices to look up each band with up to 2 bits changed (1 + 22 + 231 = 254 look-ups), and to
count the differences of what is found.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from sightloop.types import Integers

Hashes = NDArray[np.uint64]

_EDGES = (0, 21, 42, 64)  # of the bands, in bits
_MIN_INDEXED = 4096  # hashes; fewer are compared one by one
_LOOKUPS_AT_ONCE = 1 << 21
_CANDIDATES_AT_ONCE = 1 << 22


class HashNeighbors:
    """Hashes that can be searched.

    Args:
        stored: uint64 `[s]`.
        radius: greatest distance in bits, 0 to 11: beyond that the look-ups outnumber the hashes.
    """

    def __init__(self, stored: Hashes, radius: int) -> None:
        if not 0 <= radius <= 11:
            raise ValueError(f"radius {radius}: must be from 0 to 11")
        self._stored, self._radius = stored, radius
        edges = pairwise(_EDGES) if len(stored) >= _MIN_INDEXED else ()
        self._bands = [_Band(stored, low, high, radius // 3) for low, high in edges]

    def search(self, queries: Hashes) -> Iterator[tuple[Integers, Integers, NDArray[np.uint8]]]:
        """Pairs of queries and stored hashes within the radius, some of them more than once.

        Args:
            queries: uint64 `[q]`.

        Yields:
            Rows of the queries `[p]`, rows of the stored hashes `[p]`, and distances in bits `[p]`.
        """
        if not self._bands:
            yield from self._compare_all(queries)
        for band in self._bands:
            for rows, hits in band.candidates(queries):
                distances = np.bitwise_count(queries[rows] ^ self._stored[hits])
                near = distances <= self._radius
                yield rows[near], hits[near], distances[near]

    def _compare_all(self, queries: Hashes) -> Iterator[tuple[Integers, Integers, NDArray[np.uint8]]]:
        step = max(1, _CANDIDATES_AT_ONCE // max(1, len(self._stored)))
        for start in range(0, len(queries), step):
            distances = np.bitwise_count(queries[start : start + step, None] ^ self._stored)  # [step, s]
            rows, hits = np.nonzero(distances <= self._radius)
            yield rows + start, hits, distances[rows, hits]


class _Band:
    """Some bits of the stored hashes, sorted: bits low to high, looked up with up to `changes` of them changed."""

    def __init__(self, stored: Hashes, low: int, high: int, changes: int) -> None:
        self._low, self._width = np.uint64(low), high - low
        keys = self._keys(stored)
        self._order: Integers = np.argsort(keys, kind="stable")
        # The hashes with key k are order[starts[k] : starts[k + 1]].
        counts = np.bincount(keys, minlength=1 << self._width)
        self._starts: Integers = np.concatenate([[0], np.cumsum(counts)])
        masks = [
            sum(1 << bit for bit in bits)
            for n in range(changes + 1)
            for bits in combinations(range(high - low), n)
        ]
        self._masks = np.array(masks, np.int64)

    def _keys(self, hashes: Hashes) -> Integers:
        return ((hashes >> self._low) & np.uint64((1 << self._width) - 1)).astype(np.int64)

    def candidates(self, queries: Hashes) -> Iterator[tuple[Integers, Integers]]:
        """Rows of queries `[p]` and of stored hashes `[p]` whose bands agree up to the changes."""
        keys = self._keys(queries)
        step = max(1, _LOOKUPS_AT_ONCE // len(self._masks))
        for start in range(0, len(keys), step):
            looked_up = keys[start : start + step, None] ^ self._masks  # [step, masks]
            first = self._starts[looked_up]
            counts = self._starts[looked_up + 1] - first
            filled = np.flatnonzero(counts)
            rows = filled // len(self._masks) + start
            yield from self._expand(rows, first.ravel()[filled], counts.ravel()[filled])

    def _expand(
        self, rows: Integers, first: Integers, counts: Integers
    ) -> Iterator[tuple[Integers, Integers]]:
        """Pairs of the runs order[first : first + count], a bounded number at a time."""
        ends = np.cumsum(counts)
        start = 0
        while start < len(rows):
            done = ends[start - 1] if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, done + _CANDIDATES_AT_ONCE, "right")))
            part = counts[start:stop]
            offsets = np.arange(part.sum()) - np.repeat(np.cumsum(part) - part, part)
            yield np.repeat(rows[start:stop], part), self._order[np.repeat(first[start:stop], part) + offsets]
            start = stop
