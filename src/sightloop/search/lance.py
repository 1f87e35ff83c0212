"""LanceDB store: a folder with one table; exact search of small tables in memory, IVF_RQ beyond, keywords by BM25.

LanceDB runs threads of its own: start worker processes by spawn, never by fork, once a store is open.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import reduce, wraps
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import numpy as np

from sightloop.data.atomic import lock_folder, write_json
from sightloop.errors import UsageError, install_command
from sightloop.search.exact import Snapshot, best_rows, nearest_of
from sightloop.search.filters import Condition, Filter, ids_filter
from sightloop.search.keywords import grams_of, normalize
from sightloop.search.rows import Arrow, Table, row_schema, vector_type
from sightloop.search.store import Found, IndexInfo, VectorSpace
from sightloop.types import Floats32

INFO_NAME: Final = "index.json"
_LOCK_NAME: Final = "writer.lock"
_TABLE: Final = "images"

# Rows up to which vectors are searched exactly, from memory; beyond, IVF_RQ is built.
EXACT_ROWS: Final = 65_536
# Of IVF. To bring an index up to date costs more than to make it anew: LanceDB splits partitions of some 12,000 rows,
# writes codes again and compacts the table (250,000 rows into a million: 77 CPU s, and slower queries; anew: 72). So an
# index is made anew when the table has four times its rows, or when two thirds of the rows are new: rows that come
# little by little cost half as much again as rows that come at once. Where all is brought up to date, a tenth suffices.
_ROWS_PER_PARTITION: Final = 4_000
_GROWTH: Final = 4
_NEW_SHARE: Final = 2 / 3
_NEW_SHARE_OF_WHOLE: Final = 0.1
# Rows whose real distances are computed, by rows of the table: this decides recall, and most of the time.
_MIN_REFINED: Final = 200
_MAX_REFINED: Final = 500
_ROWS_PER_REFINED: Final = 2_000
# Of the codes of IVF_RQ, a number of a vector: with 2 a fourth of the refined rows gives the recall of 1.
_CODE_BITS: Final = 2
# Of k-means. With 6 iterations and 24 vectors a partition, or with 10,000 rows a partition, recall at 200,000 rows is
# .925 (1 % filter: .763) where these have 1.0 (.999): codes are of what a vector differs from its partition's mean.
_ITERATIONS: Final = 15
_SAMPLED_PER_PARTITION: Final = 128
_PARTITIONS_MARK: Final = "_partitions_"  # in the name of an index, before their number
_MIN_UNINDEXED: Final = 4_096  # rows that are new before an index of words is made anew
_TEXT_COLUMNS: Final = ("words", "grams")
_SMALL_FRAGMENTS: Final = 64
_KEEP_VERSIONS: Final = timedelta(hours=1)  # longer than any reader needs an old version
_IDS_AT_ONCE: Final = 2_000

ParamsT = ParamSpec("ParamsT")
ResultT = TypeVar("ResultT")


@contextmanager
def _naming(index: str) -> Generator[None]:
    """Raises what LanceDB raises about its files (RuntimeError, or a panic) as a UsageError that names the index."""
    try:
        yield
    except BaseException as error:
        if not str(error).startswith(("lance error", "rust future panicked", "Invalid input")):
            raise
        reason = re.sub(r",? \S*/\.cargo/\S+|,? /rustc/\S+", "", str(error).removeprefix("lance error: "))
        raise UsageError(
            f"{index}: LanceDB fails ({reason.splitlines()[0][:200]}); if a file of the index is damaged, make it again"
        ) from error


def _named(
    method: Callable[Concatenate[LanceStore, ParamsT], ResultT],
) -> Callable[Concatenate[LanceStore, ParamsT], ResultT]:
    """A method whose failures in LanceDB name the index."""

    @wraps(method)
    def call(store: LanceStore, *args: ParamsT.args, **options: ParamsT.kwargs) -> ResultT:
        with _naming(store.name):
            return method(store, *args, **options)

    return call


class LanceStore:
    """Store in a folder.

    Args:
        folder: made by `create`.

    Raises:
        UsageError: no index, one of another version, or LanceDB is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        self._folder = folder
        self._info_stamp: tuple[int, int] | None = None
        self._info = self.info()
        with _naming(self.name):
            self._table: Any = _connect(folder).open_table(_TABLE)  # which LanceDB gives no type
        if missing := set(row_schema().names) - set(self._table.schema.names):
            raise UsageError(
                f"{folder}: of an earlier version, without {', '.join(sorted(missing))}; make it again"
            )
        self._snapshot: Snapshot | None = None
        self._partitions_seen: dict[str, tuple[int, int]] = {}  # column -> version and partitions
        self._lock = threading.Lock()

    @classmethod
    def create(cls, folder: Path, info: IndexInfo) -> LanceStore:
        """A new store, in place of what a killed creation left. Raises UsageError if the folder holds something."""
        if (folder / INFO_NAME).exists():
            raise UsageError(f"{folder}: there is an index already; open it, or name another folder")
        if folder.exists() and (not folder.is_dir() or _has_other_files(folder)):
            raise UsageError(f"{folder}: exists and is no index; name a new folder")
        database = _connect(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(folder, _LOCK_NAME):
            table = database.create_table(_TABLE, schema=_schema(info), mode="overwrite")
            for column in _TEXT_COLUMNS:
                table.create_index(column, config=_text_config())
            write_json(info.as_json(), folder / INFO_NAME)
        return cls(folder)

    def info(self) -> IndexInfo:
        """What the index is made of; read again when another process has changed it."""
        path = self._folder / INFO_NAME
        try:
            status = path.stat()
            stamp = (status.st_mtime_ns, status.st_ino)
            if stamp != self._info_stamp:
                self._info = IndexInfo.from_json(json.loads(path.read_text("utf-8")), self.name)
                self._info_stamp = stamp
        except FileNotFoundError:
            hint = "no such folder" if not self._folder.exists() else "is no index: it has no index.json"
            raise UsageError(
                f"{self.name}: {hint}; `sightloop index IMAGES --store {self.name}` makes one"
            ) from None
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UsageError(f"{path}: cannot be read as the description of an index: {error}") from error
        return self._info

    @_named
    def set_info(self, info: IndexInfo) -> None:
        """Replaces the info; new spaces get their column, without vectors."""
        import pyarrow as pa

        have = set(self._table.schema.names)
        new = [pa.field(s.column, vector_type(s.width, s.dtype)) for s in info.spaces if s.column not in have]
        if new:
            self._table.add_columns(new)
        write_json(info.as_json(), self._folder / INFO_NAME)

    def version(self) -> int:
        """The version of the table."""
        return self._table.version

    @_named
    def count(self, where: Filter | None = None) -> int:
        """Number of rows."""
        if not where:
            return self._table.count_rows()
        return sum(part.num_rows for part in self.scan(["id"], where))

    def writing(self) -> AbstractContextManager[None]:
        """Lock on a file of the folder, which the kernel releases when the process ends, however it ends."""
        return lock_folder(self._folder, _LOCK_NAME)

    @_named
    def add(self, rows: Table) -> None:
        """Adds rows as one version."""
        self._table.add(self._complete(rows))

    @_named
    def upsert(self, rows: Table) -> None:
        """Adds or replaces rows as one version."""
        merge = self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        merge.execute(self._complete(rows))

    @_named
    def update(self, rows: Table) -> None:
        """Sets some columns as one version."""
        self._table.merge_insert("id").when_matched_update_all().execute(rows)

    @_named
    def delete(self, ids: Sequence[str]) -> None:
        """Removes rows; of many at a time, each group is a version."""
        for start in range(0, len(ids), _IDS_AT_ONCE):
            self._table.delete(_expression(ids_filter(ids[start : start + _IDS_AT_ONCE])))

    def scan(
        self, columns: Sequence[str], where: Filter | None = None, limit: int | None = None
    ) -> Iterator[Table]:
        """Columns of rows of one version, part by part."""
        import pyarrow as pa

        query = self._table.search().select(list(columns))
        if where:
            query = query.where(_expression(where))
        if limit is not None:
            query = query.limit(limit)
        with _naming(self.name):
            for batch in query.to_batches():
                yield pa.Table.from_batches([batch])

    @_named
    def nearest(
        self, space: VectorSpace, query: Floats32, k: int, where: Filter, columns: Sequence[str]
    ) -> Found:
        """The k rows nearest to a unit vector; see `EXACT_ROWS` for how."""
        rows = self.count()
        if space.queries > 1:
            return self._scan_nearest(space, query, k, where, columns)
        if rows <= EXACT_ROWS and not where:
            return self._snapshot_of(space).nearest(query, k, columns)
        wanted = list(dict.fromkeys([*columns, space.column, "_distance"]))
        # More than k, because the store orders by distances of rounded numbers; the best of these are scored again.
        limit = k + max(10, k // 4)
        refined = max(_MIN_REFINED, min(_MAX_REFINED, rows // _ROWS_PER_REFINED))
        builder = self._table.search(query, vector_column_name=space.column).distance_type("cosine")
        builder = builder.select(wanted).limit(limit).refine_factor(max(4, -(-refined // limit)))
        partitions = self._partitions_of(space) or _partitions(rows)
        # With a filter all partitions are read, because few of them may hold a row that it takes.
        least = partitions if where else max(1, partitions // 2)
        builder = builder.minimum_nprobes(least).maximum_nprobes(partitions)
        if where:
            builder = builder.where(_expression(where))
        return nearest_of(builder.to_arrow(), space, query, k, columns)

    @_named
    def by_words(self, query: str, k: int, where: Filter, columns: Sequence[str]) -> Found:
        """BM25 over words and, for scripts without spaces and codes, over n-grams; the better of both counts."""
        words = normalize(query).split()
        tables = [
            self._match("words", words, k, where, columns),
            self._match("grams", grams_of(words), k, where, columns),
        ]
        tables = [table for table in tables if table is not None]
        if not tables:
            return Found(row_schema(()).empty_table(), np.zeros(0, np.float32))
        import pyarrow as pa

        both = pa.concat_tables(tables)
        names, scores = both["id"].to_pylist(), both["_score"].to_numpy().astype(np.float32)
        best: dict[str, int] = {}
        for row in np.argsort(-scores, kind="stable"):
            best.setdefault(names[row], int(row))
        chosen = np.array(list(best.values())[:k], np.int64)
        return Found(both.select(list(columns)).take(chosen), scores[chosen])

    @_named
    def maintain(self, *, whole: bool = False) -> None:
        """Compacts small files, indexes new rows, and builds IVF_RQ once the table is large."""
        rows, stats = self.count(), self._table.stats()
        spaces = [space for space in self.info().spaces if space.queries == 1]
        indexed: dict[str, Any] = {}
        for index in sorted(self._table.list_indices(), key=lambda index: _partitions_in(index.name)):
            before = indexed.get(index.columns[0])
            if before is not None:  # a build was killed before it had dropped the index that it replaced
                self._table.drop_index(before.name)
            indexed[index.columns[0]] = index
        is_small = stats["fragment_stats"]["num_small_fragments"] > _SMALL_FRAGMENTS
        share, is_new = (_NEW_SHARE_OF_WHOLE if whole or is_small else _NEW_SHARE) * rows, False
        for space in spaces:
            index = indexed.get(space.column)
            partitions = 0 if index is None else _partitions_in(index.name)
            waiting = rows if index is None else index.num_unindexed_rows
            is_outgrown = _partitions(rows) > _GROWTH * partitions or waiting > share
            if rows > EXACT_ROWS and is_outgrown:
                self._build(space, rows, None if index is None else index.name)
                is_new = True
        for column in _TEXT_COLUMNS:  # alone: `optimize` would bring the index of vectors up to date too
            if indexed[column].num_unindexed_rows > max(_MIN_UNINDEXED, share):
                self._table.create_index(column, config=_text_config(), replace=True)
        if is_small or (whole and not is_new):  # else compaction would write a new index once more
            self._table.optimize(cleanup_older_than=_KEEP_VERSIONS)

    def close(self) -> None:
        """Drops what is kept in memory."""
        self._snapshot = None

    def _complete(self, rows: Table) -> Table:
        """Rows with all columns of the table in its order; those that they lack are null."""
        import pyarrow as pa

        schema = self._table.schema
        columns = [
            rows[field.name] if field.name in rows.column_names else pa.nulls(len(rows), field.type)
            for field in schema
        ]
        return pa.table(columns, schema=schema)

    def _build(self, space: VectorSpace, rows: int, before: str | None) -> None:
        """Builds IVF_RQ over all rows, in place of an index of another name, which readers use until then."""
        from lancedb.index import IvfFlat, IvfRq

        partitions = _partitions(rows)
        # RaBitQ packs eight numbers into a byte; other widths, which no usual model has, stay as they are.
        config = (
            IvfRq(
                distance_type="cosine",
                num_partitions=partitions,
                num_bits=_CODE_BITS,
                max_iterations=_ITERATIONS,
                sample_rate=_SAMPLED_PER_PARTITION,
            )
            if space.width % 8 == 0
            else IvfFlat(
                distance_type="cosine",
                num_partitions=partitions,
                max_iterations=_ITERATIONS,
                sample_rate=_SAMPLED_PER_PARTITION,
            )
        )
        name = f"{space.column}{_PARTITIONS_MARK}{partitions}"
        self._table.create_index(space.column, config=config, name=name)
        if before not in (None, name):
            self._table.drop_index(before)

    def _partitions_of(self, space: VectorSpace) -> int:
        """Partitions of the space's index; 0 where there is none."""
        version = self._table.version
        if self._partitions_seen.get(space.column, (-1, 0))[0] != version:
            names = [index.name for index in self._table.list_indices() if index.columns == [space.column]]
            self._partitions_seen[space.column] = (version, max(map(_partitions_in, names), default=0))
        return self._partitions_seen[space.column][1]

    def _snapshot_of(self, space: VectorSpace) -> Snapshot:
        """All rows of the current version in memory."""
        with self._lock:
            while True:
                version = self._table.version
                kept = self._snapshot
                if kept is not None and kept.version == version and kept.column == space.column:
                    return kept
                rows = self._table.search().select([*row_schema().names, space.column]).to_arrow()
                if (
                    self._table.version == version
                ):  # else the rows may be of the next version: read them again
                    self._snapshot = Snapshot.of(rows, space, version)

    def _scan_nearest(
        self, space: VectorSpace, query: Floats32, k: int, where: Filter, columns: Sequence[str]
    ) -> Found:
        """Exact search over all rows, part by part: for several vectors an image."""
        parts = self.scan([*columns, space.column], where)
        return best_rows((nearest_of(part, space, query, k, columns) for part in parts), k, columns)

    def _match(
        self, column: str, words: Sequence[str], k: int, where: Filter, columns: Sequence[str]
    ) -> Table | None:
        from lancedb.query import MatchQuery

        if not words:
            return None
        match: Any = MatchQuery  # whose defaults type checkers do not see
        query = self._table.search(match(" ".join(words), column))
        if where:
            query = query.where(_expression(where))
        wanted = list(dict.fromkeys([*columns, "id", "_score"]))
        return query.select(wanted).limit(k).to_arrow().select(wanted)


def _partitions(rows: int) -> int:
    return max(16, min(4_096, rows // _ROWS_PER_PARTITION))


def _partitions_in(name: str) -> int:
    """Partitions of an index by its name; 1 for a name that does not tell, so that it is made anew."""
    digits = name.rpartition(_PARTITIONS_MARK)[2]
    return int(digits) if digits.isdecimal() else 1


def _connect(folder: Path) -> Any:
    os.environ.setdefault("LANCEDB_LOG", "error")  # it logs what is no fault, such as that a table is new
    try:
        import lancedb
    except ImportError:
        raise UsageError(f"an index needs LanceDB: {install_command('search')}") from None
    # 0: a reader sees each commit at once.
    return lancedb.connect(str(folder), read_consistency_interval=timedelta(0))


def _schema(info: IndexInfo) -> Arrow:
    import pyarrow as pa

    schema = row_schema()
    for space in info.spaces:
        schema = schema.append(pa.field(space.column, vector_type(space.width, space.dtype)))
    return schema


def _text_config() -> Any:
    from lancedb.index import FTS

    return FTS(
        base_tokenizer="whitespace",
        stem=False,
        remove_stop_words=False,
        lower_case=False,
        ascii_folding=False,
        max_token_length=None,
    )


def _has_other_files(folder: Path) -> bool:
    own = {INFO_NAME, _LOCK_NAME, f"{_TABLE}.lance"}
    return any(path.name not in own and not path.name.startswith(".sightloop-") for path in folder.iterdir())


def _expression(where: Filter) -> Any:
    """The filter as LanceDB's expression of typed literals."""

    def joined(parts: list[Any], by_and: bool) -> Any:
        return reduce(lambda a, b: a & b if by_and else a | b, parts)

    clauses = [
        joined([joined([_compare(c) for c in conditions], True) for conditions in clause], False)
        for clause in where.clauses
    ]
    return joined(clauses, True)


def _compare(condition: Condition) -> Any:
    from lancedb.expr import col

    column = col(condition.column)
    value: Any = condition.value
    match condition.operator:
        case "=":
            return column == value
        case "!=":
            return column != value
        case "<":
            return column < value
        case "<=":
            return column <= value
        case ">":
            return column > value
        case ">=":
            return column >= value
        case "~":
            return column.contains(value)
        case "!~":
            return ~column.contains(value)
        case "in":
            return column.isin(value)
