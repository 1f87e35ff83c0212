"""What an index asks of a store: rows with vectors in whole commits, searched by vector, words and filter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Literal, Protocol, TypeAlias

from sightloop.errors import UsageError
from sightloop.search.filters import Filter
from sightloop.search.rows import Table
from sightloop.types import Floats32, JsonDict, JsonMapping

VectorDtype: TypeAlias = Literal["float16", "float32"]
FORMAT = 1  # of `IndexInfo`


@dataclass(frozen=True, slots=True)
class VectorSpace:
    """A vector column of an index and the model that fills it.

    Args:
        column: name of the column.
        model: what the model was loaded from; "" for vectors that came from outside.
        fingerprint: of its weights; "" likewise.
        dim: width of one vector.
        queries: vectors an image: 1, or Q of a BLIP-2, whose nearest one counts.
        dtype: in the store.
        probe: what the model makes of a fixed image and a fixed text, by which it is known again whatever its name.
    """

    column: str
    model: str
    fingerprint: str
    dim: int
    queries: int = 1
    dtype: VectorDtype = "float16"
    probe: tuple[float, ...] = field(default=(), repr=False)

    @property
    def width(self) -> int:
        """Numbers in a row of the column."""
        return self.dim * self.queries


@dataclass(frozen=True, slots=True)
class IndexInfo:
    """What an index is made of.

    Args:
        spaces: its vector columns; the first is the one that is searched unless another model is named.
        notes: further facts as JSON values, such as a calibration.
    """

    spaces: tuple[VectorSpace, ...]
    notes: JsonMapping = field(default_factory=JsonDict)

    def as_json(self) -> JsonDict:
        """The object that `from_json` reads."""
        return {
            "format": FORMAT,
            "spaces": [asdict(space) for space in self.spaces],
            "notes": dict(self.notes),
        }

    @classmethod
    def from_json(cls, value: JsonMapping, name: str) -> IndexInfo:
        """The info of a store. Raises UsageError for one of another version."""
        if value.get("format") != FORMAT:
            raise UsageError(
                f"{name}: an index of format {value.get('format')!r}; this version reads {FORMAT}"
            )
        described: list[JsonDict] = value["spaces"]
        return cls(tuple(VectorSpace(**_with_tuple(each)) for each in described), value["notes"])

    def space(self, model: str | None = None) -> VectorSpace:
        """The first vector column, or that of a model. Raises UsageError if there is none."""
        for space in self.spaces:
            if model in (None, space.model, space.column):
                return space
        names = ", ".join(space.model or "vectors from outside" for space in self.spaces)
        raise UsageError(
            f"the index has no vectors of {model}; it has: {names}. `--add-model` adds a model's"
        )


def _with_tuple(space: JsonDict) -> JsonDict:
    return space | {"probe": tuple(space["probe"])}


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Rows that a store found, best first.

    Args:
        rows: the columns that were asked for, n rows.
        scores: float32 `[n]`: cosines, or BM25 of words.
    """

    rows: Table
    scores: Floats32


class Store(Protocol):
    """A table of rows and vectors. Every call that writes is one commit: whole or not at all.

    One process writes at a time (`writing`); readers are never blocked, and each call sees one commit.

    Attributes:
        name: for messages: the path, or the address.
    """

    name: str

    def info(self) -> IndexInfo:
        """What the index is made of."""
        ...

    def set_info(self, info: IndexInfo) -> None:
        """Replaces the info; new spaces get their column, without vectors."""
        ...

    def version(self) -> int:
        """A number that is another after each commit."""
        ...

    def count(self, where: Filter | None = None) -> int:
        """Number of rows."""
        ...

    def writing(self) -> AbstractContextManager[None]:
        """Context in which this process alone may write. Raises UsageError if another one does."""
        ...

    def add(self, rows: Table) -> None:
        """Adds rows, whose ids are new."""
        ...

    def upsert(self, rows: Table) -> None:
        """Adds rows, or replaces those with the same ids whole."""
        ...

    def update(self, rows: Table) -> None:
        """Sets some columns of rows that are there: a table of `id` and these columns."""
        ...

    def delete(self, ids: Sequence[str]) -> None:
        """Removes rows; ids without a row are ignored."""
        ...

    def scan(
        self, columns: Sequence[str], where: Filter | None = None, limit: int | None = None
    ) -> Iterator[Table]:
        """Columns of all rows that the filter takes, in parts, all of one commit, in no stated order."""
        ...

    def nearest(
        self, space: VectorSpace, query: Floats32, k: int, where: Filter, columns: Sequence[str]
    ) -> Found:
        """The k rows with the highest cosine with a unit vector `[d]`."""
        ...

    def by_words(self, query: str, k: int, where: Filter, columns: Sequence[str]) -> Found:
        """The k rows that keywords describe best."""
        ...

    def maintain(self, *, whole: bool = False) -> None:
        """Brings indexes up to date where it pays, or at once."""
        ...

    def close(self) -> None:
        """Releases what is held."""
        ...
