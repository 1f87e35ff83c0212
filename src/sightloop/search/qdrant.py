"""Qdrant store: a collection of a server, for indexes that outgrow one machine.

Rows are points: their columns are payload, the vectors of each space a named vector, and their words a sparse vector
whose rarity (IDF) the server weighs, as BM25 does.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import numpy as np

from sightloop.data.atomic import lock_folder
from sightloop.errors import UnsupportedError, UsageError, install_command
from sightloop.search.filters import Condition, Filter
from sightloop.search.keywords import grams_of, words_of
from sightloop.search.rows import Arrow, Table, row_schema, vector_column, vectors_of
from sightloop.search.store import Found, IndexInfo, VectorSpace
from sightloop.types import Floats32, JsonDict

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

_WORDS: Final = "keywords"  # name of the sparse vector
# Columns of several entries -> the list of them in the payload, for an index of the server.
_LISTS: Final = {
    "label_keys": "label_list",
    "extra_keys": "extra_list",
    "caption_keys": "caption_list",
}
_POINTS_AT_ONCE: Final = 256
_NEIGHBORS_READ: Final = 300  # ef of HNSW: recall of text queries
_NAMESPACE: Final = uuid.UUID("5f6b2c1e-6d0a-4f65-9a63-0f3b1f1f7e55")
# BM25 (Robertson and Zaragoza 2009): saturation, weight of the length, and the length that counts as usual.
_K1, _B, _USUAL_WORDS = 1.2, 0.75, 16.0


class QdrantStore:
    """Store in a collection.

    Args:
        client: a `qdrant_client.QdrantClient`: of a server, or in-process.
        collection: made by `create`.
        name: for messages: the address.

    Raises:
        UsageError: there is no such collection, or it is no index.
    """

    def __init__(self, client: QdrantClient, collection: str, name: str = "") -> None:
        self.name = name or f"qdrant:{collection}"
        self._client, self._collection = client, collection
        self.info()

    @classmethod
    def create(cls, client: QdrantClient, collection: str, info: IndexInfo, name: str = "") -> QdrantStore:
        """A new collection. Raises UsageError if there is one."""
        from qdrant_client import models

        if client.collection_exists(collection):
            raise UsageError(f"{name or collection}: there is such a collection already; name another one")
        client.create_collection(
            collection,
            vectors_config={space.column: _vector_params(space) for space in info.spaces},
            sparse_vectors_config={_WORDS: models.SparseVectorParams(modifier=models.Modifier.IDF)},
            metadata=info.as_json(),
        )
        for column in ("width", "height", "size", "mtime", "time"):
            client.create_payload_index(collection, column, models.PayloadSchemaType.INTEGER)
        for column in (*_LISTS.values(), "id", "root"):
            client.create_payload_index(collection, column, models.PayloadSchemaType.KEYWORD)
        return cls(client, collection, name)

    def info(self) -> IndexInfo:
        """What the index is made of, from the collection's metadata."""
        if not self._client.collection_exists(self._collection):
            raise UsageError(f"{self.name}: there is no such collection; `sightloop index --store` makes one")
        metadata = self._client.get_collection(self._collection).config.metadata
        if not metadata or "spaces" not in metadata:
            raise UsageError(f"{self.name}: the collection is no index of sightloop; name another one")
        return IndexInfo.from_json(metadata, self.name)

    def set_info(self, info: IndexInfo) -> None:
        """Replaces the info. Raises UnsupportedError for a new space: a collection has the vectors it was made with."""
        if {space.column for space in info.spaces} - {space.column for space in self.info().spaces}:
            raise UnsupportedError(
                f"{self.name}: a Qdrant collection takes no further model's vectors; index into another collection"
            )
        self._client.update_collection(self._collection, metadata=info.as_json())

    def version(self) -> int:
        """The number of points: a server counts no versions, and applies each call at once."""
        return self.count()

    def count(self, where: Filter | None = None) -> int:
        """Number of rows."""
        chosen = _filter(where) if where else None
        return self._client.count(self._collection, count_filter=chosen, exact=True).count

    def writing(self) -> AbstractContextManager[None]:
        """Lock against other writers on this machine; a server has none for those on others."""
        digest = hashlib.sha256(self.name.encode()).hexdigest()[:16]
        return lock_folder(Path(tempfile.gettempdir()), f"sightloop-qdrant-{digest}.lock")

    def add(self, rows: Table) -> None:
        """Adds rows."""
        self.upsert(rows)

    def upsert(self, rows: Table) -> None:
        """Adds rows, or replaces those with the same ids; 256 at a time."""
        from qdrant_client import models

        spaces = [space for space in self.info().spaces if space.column in rows.column_names]
        for start in range(0, rows.num_rows, _POINTS_AT_ONCE):
            part = rows.slice(start, _POINTS_AT_ONCE)
            vectors = {space.column: _by_row(part, space) for space in spaces}
            payloads = part.drop_columns([space.column for space in spaces]).to_pylist()
            points = [
                models.PointStruct(
                    id=_point_id(payload["id"]),
                    vector={_WORDS: _word_vector(payload)}
                    | {column: own[i] for column, own in vectors.items()},
                    payload=_with_lists(payload),
                )
                for i, payload in enumerate(payloads)
            ]
            self._client.upsert(self._collection, points, wait=True)

    def update(self, rows: Table) -> None:
        """Sets some columns of rows that are there."""
        from qdrant_client import models

        operations: list[Any] = []
        for payload in rows.to_pylist():
            points: list[Any] = [_point_id(payload["id"])]
            payload = _with_lists(payload)
            operations.append(
                models.SetPayloadOperation(set_payload=models.SetPayload(payload=payload, points=points))
            )
            if "words" in payload:
                vector = models.PointVectors(id=points[0], vector={_WORDS: _word_vector(payload)})
                operations.append(
                    models.UpdateVectorsOperation(update_vectors=models.UpdateVectors(points=[vector]))
                )
        if operations:
            self._client.batch_update_points(self._collection, operations, wait=True)

    def delete(self, ids: Sequence[str]) -> None:
        """Removes rows."""
        from qdrant_client import models

        if ids:
            points: list[Any] = [_point_id(name) for name in ids]
            chosen = models.PointIdsList(points=points)
            self._client.delete(self._collection, points_selector=chosen, wait=True)

    def scan(
        self, columns: Sequence[str], where: Filter | None = None, limit: int | None = None
    ) -> Iterator[Table]:
        """Columns of rows, part by part."""
        offset: Any = None
        left = self.count() if limit is None else limit
        vectors = self._spaces_in(columns)
        while left > 0:
            records, offset = self._client.scroll(
                self._collection,
                scroll_filter=_filter(where) if where else None,
                limit=min(left, 1_000),
                offset=offset,
                with_payload=_payload_columns(columns),
                with_vectors=[space.column for space in vectors],
            )
            if records:
                yield _table(records, columns, vectors)
            left -= len(records)
            if offset is None:
                return

    def nearest(
        self, space: VectorSpace, query: Floats32, k: int, where: Filter, columns: Sequence[str]
    ) -> Found:
        """The k rows nearest to a unit vector."""
        from qdrant_client import models

        question: Any = query.tolist() if space.queries == 1 else [query.tolist()]
        params = models.SearchParams(hnsw_ef=max(_NEIGHBORS_READ, 2 * k))
        return self._query(question, space.column, k, where, columns, params)

    def by_words(self, query: str, k: int, where: Filter, columns: Sequence[str]) -> Found:
        """The k rows that keywords describe best."""
        from qdrant_client import models

        tokens = sorted({_token(word) for word in _tokens_of(words_of(query))})
        if not tokens:
            return Found(row_schema(()).empty_table(), np.zeros(0, np.float32))
        return self._query(
            models.SparseVector(indices=tokens, values=[1.0] * len(tokens)), _WORDS, k, where, columns, None
        )

    def maintain(self, *, whole: bool = False) -> None:
        """Nothing: the server keeps its own indexes."""

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()

    def _query(
        self, question: Any, using: str, k: int, where: Filter, columns: Sequence[str], params: Any
    ) -> Found:
        vectors = self._spaces_in(columns)
        points = self._client.query_points(
            self._collection,
            query=question,
            using=using,
            limit=k,
            query_filter=_filter(where) if where else None,
            search_params=params,
            with_payload=_payload_columns(columns),
            with_vectors=[space.column for space in vectors],
        ).points
        scores = np.array([point.score for point in points], np.float32)
        return Found(_table(points, columns, vectors), scores)

    def _spaces_in(self, columns: Sequence[str]) -> list[VectorSpace]:
        return [space for space in self.info().spaces if space.column in columns]


def connect_qdrant(address: str) -> tuple[QdrantClient, str]:
    """The client and the collection of qdrant://host:port/collection; an API key is read from QDRANT_API_KEY.

    Raises:
        UsageError: the address has another form, no server answers, or qdrant-client is not installed.
    """
    try:
        from qdrant_client import QdrantClient
    except ImportError:
        raise UsageError(f"{address}: needs qdrant-client: {install_command('qdrant')}") from None
    parts = urlsplit(address)
    collection = parts.path.strip("/")
    try:
        port = parts.port or 6333
    except ValueError:
        port = 0
    if not parts.hostname or not collection or "/" in collection or not port:
        raise UsageError(f"{address}: write qdrant://host:port/collection")
    client = QdrantClient(
        host=parts.hostname, port=port, https=False, api_key=os.environ.get("QDRANT_API_KEY")
    )
    try:
        client.get_collections()
    except Exception as error:  # httpx and qdrant_client have many, and no common class
        raise UsageError(
            f"{address}: no Qdrant server answers there ({type(error).__name__}); start it first"
        ) from error
    return client, collection


def _vector_params(space: VectorSpace) -> Any:
    from qdrant_client import models

    several = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    return models.VectorParams(
        size=space.dim,
        distance=models.Distance.COSINE,
        datatype=models.Datatype.FLOAT16 if space.dtype == "float16" else models.Datatype.FLOAT32,
        multivector_config=several if space.queries > 1 else None,
    )


def _point_id(name: str) -> int | str:
    return str(uuid.uuid5(_NAMESPACE, name))


def _payload_columns(columns: Sequence[str]) -> list[str]:
    return [name for name in columns if name in row_schema().names]


def _with_lists(payload: JsonDict) -> JsonDict:
    lists = {
        name: [key for key in payload[column].split("\n") if key]
        for column, name in _LISTS.items()
        if payload.get(column) is not None
    }
    return payload | lists


def _by_row(part: Table, space: VectorSpace) -> list[Any]:
    vectors = vectors_of(part[space.column], space.width)
    if space.queries == 1:
        return vectors.tolist()
    return vectors.reshape(-1, space.queries, space.dim).tolist()


def _table(records: Sequence[Any], columns: Sequence[str], spaces: Sequence[VectorSpace]) -> Table:
    import pyarrow as pa

    names = _payload_columns(columns)
    payloads = [{name: (record.payload or {}).get(name) for name in ["id", *names]} for record in records]
    table = pa.Table.from_pylist(payloads, schema=row_schema(list(dict.fromkeys(["id", *names]))))
    for space in spaces:
        vectors = np.array([record.vector[space.column] for record in records], np.float32)
        column: Arrow = vector_column(vectors.reshape(len(records), space.width), "float32")
        table = table.append_column(space.column, column)
    return table.select(list(columns))


def _tokens_of(words: Sequence[str]) -> list[str]:
    return [*words, *(f"\0{gram}" for gram in grams_of(words))]


def _token(word: str) -> int:
    """A number of 32 bits for a word."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest(), "big")


def _word_vector(payload: JsonDict) -> Any:
    """The BM25 weights of the words of a row, without rarity, which the server knows."""
    from qdrant_client import models

    words = (payload.get("words") or "").split()
    counts = Counter(map(_token, _tokens_of(words)))
    length = _K1 * (1 - _B + _B * len(words) / _USUAL_WORDS)
    weights = {token: count * (_K1 + 1) / (count + length) for token, count in counts.items()}
    return models.SparseVector(indices=list(weights), values=list(weights.values()))


def _filter(where: Filter) -> Any:
    """The filter as Qdrant's conditions."""
    from qdrant_client import models

    clauses: Any = [
        models.Filter(should=[models.Filter(must=[_condition(each) for each in some]) for some in clause])
        for clause in where.clauses
    ]
    return models.Filter(must=clauses)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _condition(condition: Condition) -> Any:
    from qdrant_client import models

    key = condition.column
    value: Any = condition.value
    if condition.operator == "in":
        names: tuple[str, ...] = value
        points: list[Any] = [_point_id(name) for name in names]
        return models.HasIdCondition(has_id=points)
    if condition.operator in ("!=", "!~"):
        opposite = Condition(key, "=" if condition.operator == "!=" else "~", value)
        # A row without the field matches no comparison, as in SQL.
        present = (
            [models.IsNullCondition(is_null=models.PayloadField(key=key))]
            if isinstance(value, int | float)
            else []
        )
        return models.Filter(must_not=[_condition(opposite), *present])
    if _is_number(value):
        bounds = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"}
        if condition.operator == "=":
            return models.FieldCondition(key=key, range=models.Range(gte=value, lte=value))
        return models.FieldCondition(key=key, range=models.Range(**{bounds[condition.operator]: value}))
    if condition.operator == "=":
        return models.FieldCondition(key=key, match=models.MatchValue(value=str(value)))
    text = str(value)
    if key in _LISTS and text.startswith("\n"):
        return models.FieldCondition(key=_LISTS[key], match=models.MatchValue(value=text.strip("\n")))
    # Of parts of texts a server knows whole words alone, in any order.
    return models.FieldCondition(key=key, match=models.MatchText(text=text))
