"""Clusters of images that edges connect (union-find)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sightloop.types import Integers


class Clusters:
    """Disjoint sets of the rows 0..n-1, joined one edge at a time (Tarjan 1975, with path halving)."""

    def __init__(self, count: int) -> None:
        """Args: count: n; each row starts alone."""
        self._parent: Integers = np.arange(count)

    def join(self, first: int, second: int) -> bool:
        """Joins the clusters of two rows; False where they are one already."""
        a, b = self._root(first), self._root(second)
        self._parent[max(a, b)] = min(a, b)
        return a != b

    def joined(self, first: Integers, second: Integers) -> NDArray[np.bool_]:
        """Whether the rows of each pair are in one cluster: `[p]`, `[p]` -> bool `[p]`."""
        self._flatten()
        return self._parent[first] == self._parent[second]

    def groups(self) -> list[list[int]]:
        """The rows of each cluster of two or more, ascending; clusters in the order of their first rows."""
        self._flatten()
        order = np.argsort(self._parent, kind="stable")
        starts = np.flatnonzero(np.diff(self._parent[order], prepend=-1))
        return [rows.tolist() for rows in np.split(order, starts[1:]) if len(rows) > 1]

    def _root(self, row: int) -> int:
        parent = self._parent
        while (up := int(parent[row])) != row:
            parent[row] = parent[up]
            row = int(parent[row])
        return row

    def _flatten(self) -> None:
        """Points every row at its root."""
        while (above := self._parent[self._parent] != self._parent).any():
            self._parent[above] = self._parent[self._parent[above]]
