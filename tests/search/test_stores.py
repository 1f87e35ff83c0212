"""The stores beside each other: the same rows, vectors, queries and filters give the same hits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("lancedb")
pytest.importorskip("qdrant_client")

from sightloop.search.index import Index
from sightloop.search.qdrant import QdrantStore
from sightloop.search.store import IndexInfo, VectorSpace

ROWS, WIDTH = 60, 12
WORDS = ("red", "blue", "car", "dog", "house", "東京駅", "ae16x")
CONDITIONS = (
    "width>300", "width<=500", "label=cat", "not label=cat", "time>=2024-05", "caption~dog", "text!~red",
    "latitude<0", "path=7.jpg", "extra.rating=2", "caption=''", "caption='red car'", "not caption='blue dog'",
)  # fmt: skip


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, Index]:
    """The same 60 rows in LanceDB and in Qdrant's in-process client, some changed, some removed again."""
    from qdrant_client import QdrantClient

    rng = np.random.default_rng(0)
    info = IndexInfo((VectorSpace("vector", "", "", WIDTH, dtype="float32"),))
    lance = Index.create(tmp_path_factory.mktemp("stores") / "index", dim=WIDTH, dtype="float32")
    qdrant = Index(QdrantStore.create(QdrantClient(":memory:"), "stores", info))
    rows = [
        {
            "id": f"i{i}",
            "path": f"{i}.jpg",
            "width": int(rng.integers(100, 900)),
            "time": int(rng.integers(1_700_000_000, 1_730_000_000)) if i % 5 else None,
            "latitude": float(rng.uniform(-80, 80)) if i % 3 else None,
            "captions": [" ".join(rng.choice(WORDS[:4], 2)), rng.choice(WORDS)] if i % 4 else [],
            "labels": ["cat"] if i % 2 else [],
            "extra": f'{{"rating": {i % 4}}}',
        }
        for i in range(ROWS)
    ]
    vectors = rng.standard_normal((ROWS, WIDTH))
    for index in (lance, qdrant):
        index.add_vectors(vectors, rows)
        index.delete(["i3", "i30"])
        with index.store.writing():
            import pyarrow as pa

            index.store.update(pa.table({"id": ["i5", "i6"], "width": pa.array([1, 2], pa.int32())}))
    return lance, qdrant


@pytest.mark.filterwarnings("ignore")  # the in-process Qdrant warns that payload indexes do nothing there
@settings(max_examples=60, deadline=None)
@given(
    vector=st.lists(st.floats(-1, 1, width=32), min_size=WIDTH, max_size=WIDTH).filter(
        lambda v: np.linalg.norm(v) > 0.1
    ),
    k=st.integers(1, ROWS + 5),
    where=st.lists(st.sampled_from(CONDITIONS), max_size=2, unique=True),
)
def test_hits_of_vectors_are_the_same(
    indexes: tuple[Index, Index], vector: list[float], k: int, where: list[str]
) -> None:
    ours, theirs = (index.search(vector=vector, k=k, where=where) for index in indexes)
    assert ours.total == theirs.total
    np.testing.assert_allclose([hit.score for hit in ours], [hit.score for hit in theirs], atol=1e-5)
    # Rows whose scores differ by rounding alone may change places.
    for one, other in zip(ours, theirs, strict=True):
        assert one.id == other.id or abs(one.score - other.score) < 1e-5
    if k > ROWS:
        assert {hit.id: hit.row for hit in ours} == {hit.id: hit.row for hit in theirs}


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=40, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=3, unique=True))
def test_rows_that_have_a_word_are_the_same(indexes: tuple[Index, Index], words: list[str]) -> None:
    ours, theirs = (index.search(words=" ".join(words), k=ROWS) for index in indexes)
    assert set(ours.ids) == set(theirs.ids)
    assert set(ours.ids)
