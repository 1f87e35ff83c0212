"""Large tables of LanceDB, made small: the index over vectors is built, made anew as it grows, and is there once."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lancedb")

from sightloop.errors import UsageError
from sightloop.search import lance
from sightloop.search.index import Index, open_index
from sightloop.search.lance import LanceStore


def vector_indices(index: Index) -> list[str]:
    assert isinstance(index.store, LanceStore)
    table = index.store._table  # pyright: ignore[reportPrivateUsage]
    return [each.name for each in table.list_indices() if each.columns == ["vector"]]


@pytest.mark.parametrize("width", [16, 12])  # RaBitQ takes multiples of 8 alone
def test_the_index_of_vectors_grows_with_the_table(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lance, "EXACT_ROWS", 1_000)
    monkeypatch.setattr(lance, "_ROWS_PER_PARTITION", 50)
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((5_400, width))
    index = Index.create(tmp_path / "index", dim=width)
    names: list[list[str]] = []
    for start, stop in ((0, 900), (900, 1_200), (1_200, 4_700), (4_700, 5_400)):
        index.add_vectors(vectors[start:stop], ids=[f"i{i}" for i in range(start, stop)])
        names.append(vector_indices(index))
        found = [index.search(vector=vectors[i], k=1).ids for i in range(0, stop, stop // 20)]
        assert found == [[f"i{i}"] for i in range(0, stop, stop // 20)]
    # 900 rows are compared one by one; of 4,700 more than half are new; of 5,400 few.
    first, last = ["vector_partitions_24"], ["vector_partitions_94"]
    assert names == [[], first, last, last]


def test_a_damaged_file_is_named_in_one_line(tmp_path: Path) -> None:
    index = Index.create(tmp_path / "index", dim=8)
    index.add_vectors(np.eye(8), [{"id": str(i), "captions": ["a red car"]} for i in range(8)])
    messages: list[str] = []
    for path in sorted((tmp_path / "index").rglob("*")):
        # Of a truncated manifest LanceDB's own thread prints a panic first.
        for content in (b"", path.read_bytes()[: path.stat().st_size // 2]) if path.is_file() else ():
            if path.suffix == ".manifest" and content:
                continue
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
            shutil.copytree(tmp_path / "index", tmp_path / "copy")
            (tmp_path / "copy" / path.relative_to(tmp_path / "index")).write_bytes(content)
            try:
                damaged = open_index(tmp_path / "copy")
                damaged.rows()
                damaged.search(vector=np.ones(8))
                damaged.search(words="red")
            except UsageError as error:
                messages.append(str(error))
    assert len(messages) >= 6
    assert all(message.startswith(str(tmp_path / "copy")) for message in messages)
    assert not any("\n" in message for message in messages)


def test_an_index_that_a_killed_build_left_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lance, "EXACT_ROWS", 1_000)
    vectors = np.random.default_rng(0).standard_normal((1_100, 8))
    index = Index.create(tmp_path / "index", dim=8)
    index.add_vectors(vectors)
    with monkeypatch.context() as patch:
        patch.setattr(lance, "_ROWS_PER_PARTITION", 10)
        store = index.store
        assert isinstance(store, LanceStore)
        store._build(index.info.space(), 1_100, None)  # pyright: ignore[reportPrivateUsage]
    assert sorted(vector_indices(index)) == ["vector_partitions_110", "vector_partitions_16"]
    with store.writing():
        store.maintain()
    assert vector_indices(index) == ["vector_partitions_110"]
