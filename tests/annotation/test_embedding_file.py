from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from sightloop.annotation import result_table
from sightloop.annotation.result_table import EmbeddingFile
from sightloop.errors import UsageError


@pytest.mark.parametrize("n", [1, 7, 12_345])
def test_npy(tmp_path: Path, n: int) -> None:
    values = np.random.default_rng(0).standard_normal((n, 3)).astype(np.float32)
    with EmbeddingFile(tmp_path / "x.npy") as file:
        for start in range(0, n, 1000):
            rows = values[start : start + 1000]
            file.add([f"{start + i}\n\udcff" for i in range(len(rows))], rows)
    read = np.load(tmp_path / "x.npy")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, values)
    names = (tmp_path / "x.names.txt").read_text("utf-8").splitlines()
    assert names == [f"{i}\\n\\xff" for i in range(n)]
    assert len(list(tmp_path.iterdir())) == 2


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_table, "_GROUP_ROWS", 4)
    values = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32)
    with EmbeddingFile(tmp_path / "x.parquet", "some/model") as file:
        for i in range(10):
            file.add([f"{i}.jpg"], values[i : i + 1])
    table = pq.read_table(tmp_path / "x.parquet")
    assert table.column_names == ["name", "embedding"]
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[3]"
    assert table.schema.metadata[b"sightloop.model"] == b"some/model"
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), np.float32), values)
    assert table["name"].to_pylist() == [f"{i}.jpg" for i in range(10)]


@pytest.mark.parametrize("name", ["x.npy", "x.parquet"])
def test_whole_or_not_at_all(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"older")
    with EmbeddingFile(path):
        pass  # no rows: the older file stays
    with pytest.raises(KeyboardInterrupt), EmbeddingFile(path) as file:
        file.add(["a"], np.ones((1, 3), np.float32))
        raise KeyboardInterrupt
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "d.npy").mkdir()
    for name in ("x.txt", "d.npy", "gone/x.npy"):
        with pytest.raises(UsageError, match="--out"):
            EmbeddingFile(tmp_path / name)
