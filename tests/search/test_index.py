"""The index: what a run adds, changes, moves and removes; two models; kills, locks and readers; search."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

import sightloop
from sightloop.data.images.batch_size import BatchSizer
from sightloop.errors import UsageError
from sightloop.inference.model import Model
from sightloop.search.encoder import MemoryCache
from sightloop.search.index import BuildOptions, Index, open_index
from sightloop.types import Pixels, Region
from tests.tiny_checkpoints.clip_and_blip import write_blip, write_clip

OPTIONS = BuildOptions(isolate=False, workers=1, commit_images=4)


def write_images(folder: Path, count: int, start: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        values = np.random.default_rng(i).integers(0, 255, (20, 30, 3), np.uint8)
        Image.fromarray(values).save(folder / f"{i:03}.png")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_clip(folder / "clip")
    write_clip(folder / "other", seed=1)
    write_blip(folder / "judge", head="match")
    return folder


@pytest.fixture(scope="module")
def clip(checkpoints: Path) -> Model:
    return sightloop.load(checkpoints / "clip")


def tables(index: Index) -> Any:
    return index.to_arrow(vectors=True)


def test_runs_do_what_changed(clip: Model, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_images(photos, 6)
    (photos / "001.txt").write_text("a red car\n")
    index = Index.create(tmp_path / "index", model=clip)
    assert index.add(photos, options=OPTIONS) == Counter(added=6)
    assert index.add(photos, options=OPTIONS) == Counter(skipped=6)
    before = {row["path"]: row for row in index.rows()}
    assert before["001.png"]["captions"] == ["a red car"]
    assert (before["001.png"]["width"], before["001.png"]["height"]) == (30, 20)

    (photos / "001.txt").write_text("a blue car\n")  # new text
    (photos / "sub").mkdir()
    (photos / "002.png").rename(photos / "sub" / "moved.png")
    os.utime(photos / "003.png")  # new time, old content
    shutil.copy(photos / "005.png", photos / "004.png")  # new content
    (photos / "broken.png").write_bytes(b"no image")
    (photos / "000.png").unlink()
    expected = Counter(updated=2, moved=1, changed=1, skipped=1, failed=1)
    assert index.add(photos, options=OPTIONS) == expected
    after = {row["path"]: row for row in index.rows()}
    assert after["sub/moved.png"]["id"] == before["002.png"]["id"]
    assert after["004.png"]["id"] == before["004.png"]["id"]
    assert after["004.png"]["sha256"] == before["005.png"]["sha256"]
    assert index.search(words="blue").ids == [before["001.png"]["id"]]
    assert not index.search(words="red").hits
    assert "000.png" in after

    assert index.add(photos, prune=True, options=OPTIONS)["removed"] == 1
    assert "000.png" not in {row["path"] for row in index.rows()}
    fresh = Index.create(tmp_path / "fresh", model=clip)
    fresh.add(photos, options=OPTIONS)
    ours, theirs = index.to_arrow(["sha256", "captions"]), fresh.to_arrow(["sha256", "captions"])
    assert sorted(map(str, ours.drop_columns("id").to_pylist())) == sorted(
        map(str, theirs.drop_columns("id").to_pylist())
    )
    vectors = [dict(zip([r["path"] for r in i.rows()], i.to_numpy(), strict=True)) for i in (index, fresh)]
    assert all(np.array_equal(vector, vectors[1][path]) for path, vector in vectors[0].items())


def test_a_folder_that_is_gone_takes_no_entry_with_it(clip: Model, tmp_path: Path) -> None:
    write_images(tmp_path / "disk", 3)
    index = Index.create(tmp_path / "index", model=clip)
    index.add(tmp_path / "disk", options=OPTIONS)
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    assert index.prune() == 0
    assert index.add(tmp_path / "disk", prune=True, options=OPTIONS) == Counter(failed=1)
    assert len(index) == 3
    assert index.add(tmp_path / "unmounted", options=OPTIONS) == Counter(moved=3)


def test_two_models(clip: Model, checkpoints: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 5)
    index = Index.create(tmp_path / "index", model=clip)
    index.add(tmp_path / "photos", options=OPTIONS)
    other = sightloop.load(checkpoints / "other")
    with pytest.raises(UsageError, match=r"its vectors are of .*clip.*which .*other is not"):
        open_index(tmp_path / "index", model=other)
    index.add_model(other)
    assert index.add(tmp_path / "photos", options=OPTIONS) == Counter(skipped=5, updated=5)
    write_images(tmp_path / "photos", 1, start=5)
    assert index.add(tmp_path / "photos", options=OPTIONS) == Counter(skipped=5, added=1)
    ids, vectors = index.vectors(other.name)
    files = {row["id"]: row["path"] for row in index.rows()}
    expected = other.embed_images([str(tmp_path / "photos" / files[name]) for name in ids])
    np.testing.assert_allclose(vectors, expected, atol=1e-3)
    with pytest.raises(UsageError, match="already"):
        index.add_model(other)


@dataclass
class Reader:
    """A model that reads "Nr. EN" in an image, N of its pixels' sum; nothing where that is even.

    Args:
        model: that preprocesses.
        stop_after: batches after which it breaks.
    """

    model: Model
    stop_after: int = 1_000
    sizer: Any = field(default_factory=lambda: BatchSizer(1))
    images: int = 0

    def read(self, *sources: Any, **options: Any) -> Any:
        return self.model.read(*sources, **options)

    def read_text(self, batch: list[Pixels]) -> list[list[Region]]:
        if self.images == self.stop_after:
            raise KeyboardInterrupt
        self.images += len(batch)
        first = [int(pixels.values.sum()) % 997 for pixels in batch]
        return [[Region(f"Nr. E{n}", (0, 0, 1, 1))] if n % 2 else [] for n in first]


def test_texts_in_images_are_read_once(clip: Model, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_images(photos, 6)
    (photos / "000.txt").write_text("a red car\n")
    index = Index.create(tmp_path / "index", model=clip)
    index.add(photos, options=OPTIONS)
    assert {str(row["texts"]) for row in index.rows()} == {"None"}
    options = replace(OPTIONS, commit_images=2)
    with pytest.raises(KeyboardInterrupt):
        index.add(photos, reader=cast(Model, Reader(clip, stop_after=3)), options=options)
    committed = [row for row in index.rows() if row["texts"] is not None]
    assert len(committed) == 2

    reader = Reader(clip)
    assert index.add(photos, reader=cast(Model, reader), options=OPTIONS) == Counter(skipped=6, read=4)
    assert reader.images == 4
    rows = {row["path"]: row for row in index.rows()}
    with_text = [path for path, row in rows.items() if row["texts"]]
    assert 0 < len(with_text) < 6
    assert {str(row["texts"]) for row in rows.values() if not row["texts"]} == {"[]"}
    word = rows[with_text[0]]["texts"][0]
    same = {row["id"] for row in rows.values() if row["texts"] == [word]}
    assert set(index.search(words=word, k=6).ids) >= same

    # A row that is moved or has new captions keeps its texts, one with another content is read again.
    (photos / with_text[0]).rename(photos / "moved.png")
    (photos / with_text[0]).with_suffix(".txt").unlink(missing_ok=True)
    (photos / "moved.txt").write_text("a blue boat\n")
    first, second, *_ = sorted(set(rows) - {with_text[0]})
    shutil.copy(photos / first, photos / second)
    index.add(photos, options=OPTIONS)
    after = {row["path"]: row for row in index.rows()}
    assert after["moved.png"]["texts"] == rows[with_text[0]]["texts"]
    assert index.search(words="boat").ids == [after["moved.png"]["id"]]
    assert after["moved.png"]["id"] in index.search(words=word, k=6).ids
    assert after[second]["texts"] is None


def test_search_by_image_text_and_id(clip: Model, tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 8)
    index = Index.create(tmp_path / "index", model=clip, dtype="float32")
    index.add(tmp_path / "photos", options=OPTIONS)
    image = tmp_path / "photos" / "003.png"
    first = index.search(image=image, k=3)[0]
    assert first.row["path"] == "003.png"
    assert first.itc == pytest.approx(1, abs=1e-5)
    assert first.id not in index.search(like=first.id, k=8).ids
    assert len(index.search(like=first.id, k=8)) == 7
    text = clip.embed_texts("a red car")[0]
    ids, vectors = index.vectors()
    order = [ids[i] for i in np.argsort(-(vectors @ text))]
    assert index.search("a red car", k=8).ids == order
    assert index.search("a red car", like=first.id, blend=0.0, k=7).ids != order[:7]
    blended = index.search("a red car", image=image, blend=1.0, k=8)
    assert set(blended.ids) == set(ids)
    hits = index.search("a red car without people", k=4)
    assert hits.query == "a red car, without people"
    assert hits.to_arrow().num_rows == 4
    assert str(hits).count("\n") == 4
    assert hits._repr_html_().count("<img") == 4


def test_rerank_orders_as_rank_does(checkpoints: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 6)
    judge = sightloop.load(checkpoints / "judge")
    index = Index.create(tmp_path / "index", model=judge, dtype="float32")
    index.add(tmp_path / "photos", options=OPTIONS)
    files = sorted((tmp_path / "photos").iterdir())
    scores = judge.rank([str(file) for file in files], ["a red car"], k=1)[:, 0]
    hits = index.search("a red car", rerank=6)
    assert [hit.row["path"] for hit in hits] == [files[i].name for i in np.argsort(-scores)]
    np.testing.assert_allclose([hit.score for hit in hits], sorted(scores, reverse=True), atol=2e-2)
    assert all(hit.itm is not None and 0 <= hit.itm <= 1 for hit in hits)
    assert "ITM" in hits[0].why


def test_the_cache_of_memories_keeps_its_budget() -> None:
    import torch

    cache = MemoryCache(budget=3 * 4 * 5 * 2)
    for name in "abcd":
        cache.put(name, torch.ones(4, 5))
        assert cache.get("a") is not None or name == "d"
        assert cache.size <= cache.budget
    assert [name for name in "abcd" if cache.get(name) is not None] != ["a", "b", "c", "d"]
    cache.put("large", torch.ones(1_000, 5))
    assert cache.get("large") is None
    assert len(cache) == 3


@pytest.mark.parametrize(
    ("vector", "reason"),
    [
        (np.array([0.0] * 4), "is zero"),
        (np.array([1, np.nan, 0, 0]), "NaN"),
        (np.array([1, np.inf, 0, 0]), "NaN or infinity"),
        (np.ones(3), "vectors of 4"),
        ("red", "no array of numbers"),
    ],
)
def test_vectors_without_a_direction_are_refused(tmp_path: Path, vector: Any, reason: str) -> None:
    index = Index.create(tmp_path / "index", dim=4)
    index.add_vectors(np.eye(4), ids=["a", "b", "c", "d"])
    with pytest.raises(UsageError, match=reason):
        index.search(vector=vector)
    if isinstance(vector, np.ndarray) and vector.shape == (4,):
        with pytest.raises(UsageError, match=f"second .*{reason}"):
            index.add_vectors(np.stack([np.ones(4), vector]), ids=["first", "second"])
    assert len(index) == 4


def test_vectors_from_outside(tmp_path: Path) -> None:
    index = Index.create(tmp_path / "index", dim=4, name="clip of a friend")
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((50, 4))
    index.add_vectors(vectors, {"id": [f"i{i}" for i in range(50)], "width": list(range(50))})
    with pytest.raises(UsageError, match="'i3' is in the index already"):
        index.add_vectors(np.ones((2, 4)), ids=["new", "i3"])
    with pytest.raises(UsageError, match="no field colour"):
        index.add_vectors(np.ones((1, 4)), [{"colour": "red"}])
    with pytest.raises(UsageError, match="3 for 2 vectors"):
        index.add_vectors(np.ones((2, 4)), ids=["x", "y", "z"])
    with pytest.raises(UsageError, match="came from outside"):
        index.search("a red car")
    query = rng.standard_normal(4)
    unit = vectors / np.linalg.norm(vectors, axis=1)[:, None]
    order = [f"i{i}" for i in np.argsort(-(unit @ query))]
    assert index.search(vector=query, k=10).ids == order[:10]
    assert (
        index.search(vector=query, k=10, where="width<20").ids == [n for n in order if int(n[1:]) < 20][:10]
    )
    assert index.delete(order[:5]) == 5
    assert index.search(vector=query, k=10).ids == order[5:15]
    assert index.delete(where="width>=10") == len(set(order[5:]) - {f"i{i}" for i in range(10)})


def test_one_writer_and_readers_at_once(tmp_path: Path) -> None:
    index = Index.create(tmp_path / "index", dim=4)
    index.add_vectors(np.eye(4), ids=["a", "b", "c", "d"])
    reader = open_index(tmp_path / "index")
    assert reader.search(vector=[1, 0, 0, 0], k=1).ids == ["a"]
    with index.store.writing():
        with pytest.raises(UsageError, match="another process is working on it"):
            open_index(tmp_path / "index").add_vectors(np.ones((1, 4)), ids=["e"])
        assert len(reader.search(vector=[1, 0, 0, 0], k=9)) == 4
    index.add_vectors([[1, 0.1, 0, 0]], ids=["e"])
    assert reader.search(vector=[1, 0, 0, 0], k=2).ids == ["a", "e"]
    index.delete(["a"])
    assert reader.search(vector=[1, 0, 0, 0], k=2).ids[0] == "e"


def test_datasets(clip: Model, tmp_path: Path) -> None:
    write_images(tmp_path / "a", 3)
    rows = [{"image": f"a/{i:03}.png", "caption": f"thing {i}", "label": "x", "price": i} for i in range(3)]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = Index.create(tmp_path / "index", model=clip)
    assert index.add(tmp_path / "table.jsonl", options=OPTIONS) == Counter(added=3)
    row = next(row for row in index.rows() if row["path"].endswith("001.png"))
    assert (row["captions"], row["labels"], json.loads(row["extra"])["price"]) == (["thing 1"], ["x"], 1)
    from sightloop.data.datasets.convert import convert

    convert(tmp_path / "table.jsonl", tmp_path / "shard.tar")
    assert index.add(tmp_path / "shard.tar", options=OPTIONS) == Counter(added=3)
    assert index.add(tmp_path / "shard.tar", options=OPTIONS) == Counter(skipped=3)
    hit = index.search(words="thing 2", where=f"root={tmp_path / 'shard.tar'}")[0]
    assert isinstance(hit.image(), bytes)
    assert hit.why == "words #1 (thing, 2)"


def test_places_that_are_no_index(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        open_index(tmp_path / "none")
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(UsageError, match="is no index"):
        open_index(tmp_path)
    with pytest.raises(UsageError, match="exists and is no index"):
        Index.create(tmp_path, dim=4)
    Index.create(tmp_path / "index", dim=4)
    with pytest.raises(UsageError, match="there is an index already"):
        Index.create(tmp_path / "index", dim=4)
