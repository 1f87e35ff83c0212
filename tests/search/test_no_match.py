"""No-match of an index: the null is made once, kept, made anew as the index grows, and says when it cannot be made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

pytest.importorskip("lancedb")

from sightloop.errors import UsageError
from sightloop.search.filters import Filter, parse_filters
from sightloop.search.hits import Hits
from sightloop.search.index import Index
from sightloop.search.no_match import NoMatch, apply_cut
from sightloop.search.query import Query
from sightloop.types import Floats32, JsonDict

DIM = 16


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 background texts suffice: 500 take seconds."""
    monkeypatch.setattr("sightloop.search.no_match.MIN_BACKGROUND", 100)


def vector_of(text: str) -> Floats32:
    """A unit vector for "topic 12 of the texts": that of the topic with a little noise of its own."""
    topic = int(text.split()[1])
    noise = np.random.default_rng(crc32(text.encode())).normal(size=DIM)
    vector = np.random.default_rng(topic).normal(size=DIM) + 0.4 * noise
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def embed(texts: Sequence[str]) -> Floats32:
    return np.stack([vector_of(text) for text in texts])


def make_index(folder: Path, topics: range) -> Index:
    index = Index.create(folder, dim=DIM, dtype="float32", name="topics")
    add(index, topics)
    return index


def add(index: Index, topics: range) -> None:
    rows: list[JsonDict] = [
        {"path": f"{t}.jpg", "captions": [f"topic {t} first", f"topic {t} second"], "width": t}
        for t in topics
    ]
    index.add_vectors(embed([f"topic {t} image" for t in topics]), rows, ids=[f"i{t}" for t in topics])


def no_match(index: Index, **options: object) -> NoMatch:
    fields: JsonDict = {"where": Filter(), "embed_texts": embed, **options}
    return NoMatch(index.store, index.info.space(), **fields)


def cut(index: Index, text: str, rate: float, **options: object) -> Hits:
    hits = Hits(text, tuple(index.search(vector=vector_of(text), k=3)), len(index))
    return apply_cut(hits, text, vector_of(text), rate, no_match(index, **options))


def test_present_texts_are_found_and_absent_ones_are_not(tmp_path: Path) -> None:
    index = make_index(tmp_path / "index", range(60))
    found = [bool(cut(index, f"topic {t} third", 0.1)) for t in range(0, 60, 3)]
    false = [bool(cut(index, f"topic {t} third", 0.1)) for t in range(500, 600)]
    assert np.mean(found) > 0.5
    assert np.mean(false) < 0.1 + 3 * np.sqrt(
        0.09 / 100 + 0.09 / 60
    )  # of 100 queries, with a null of 60 images
    note = cut(index, "topic 700 third", 0.1).note
    assert "120 background texts (captions of the index)" in note
    assert "it refuses" in note


def test_the_null_is_kept_and_made_anew_as_the_index_grows(tmp_path: Path) -> None:
    index = make_index(tmp_path / "index", range(60))
    counts: list[int] = []

    def notify(done: int, total: int) -> None:
        counts.append(total)

    asked = no_match(index, notify=notify)
    first = asked.calibrated()
    assert first is not None
    assert counts == [120] * 120
    kept = asked.calibrated()
    assert kept is not None
    assert (len(counts), kept[0].as_json()) == (120, first[0].as_json())
    assert kept[1].owners == first[1].owners
    assert kept[1].vectors == pytest.approx(first[1].vectors)
    (file,) = (tmp_path / "index").glob("calibration-*.json")
    file.write_text(file.read_text()[:-50])  # damaged: made anew
    asked.calibrated()
    assert len(counts) == 240
    add(index, range(60, 64))
    asked.calibrated()
    assert len(counts) == 240
    add(index, range(64, 70))
    again = asked.calibrated()
    assert again is not None
    assert (len(counts), again[0].images) == (240 + 140, 70)


def test_each_filter_has_its_own_null(tmp_path: Path) -> None:
    index = make_index(tmp_path / "index", range(120))
    whole = no_match(index).calibrated()
    part = no_match(index, where=parse_filters("width<60", "where")).calibrated()
    assert whole is not None
    assert part is not None
    assert len(part[0].absent) == 120
    assert whole[0].key != part[0].key
    assert all(int(owner[1:]) < 60 for owner in part[1].owners)


def test_too_few_texts_promise_nothing(tmp_path: Path) -> None:
    index = make_index(tmp_path / "index", range(45))
    hits = cut(index, "topic 3 third", 0.1)
    assert len(hits) == 3
    assert hits.note.startswith("no cut: a promise needs 100 background texts, and there are 90")
    assert not list((tmp_path / "index").glob("calibration-*"))


def test_texts_of_a_file_have_no_image_to_miss(tmp_path: Path) -> None:
    index = make_index(tmp_path / "index", range(50))
    file = tmp_path / "texts.txt"
    file.write_text("".join(f"topic {t} asked\n\n" for t in range(100, 220)))
    hits = cut(index, "topic 800 third", 0.1, background=file)
    assert "120 background texts" in hits.note
    assert "unknown" in hits.note
    with pytest.raises(UsageError, match=r"none\.txt"):
        cut(index, "topic 1 x", 0.1, background=tmp_path / "none.txt")


def test_the_judge_sees_the_best_sixteen_without_the_own_image(tmp_path: Path) -> None:
    index = make_index(tmp_path / "index", range(52))
    seen: list[list[str]] = []

    def match(text: str, rows: Sequence[JsonDict]) -> Floats32:
        seen.append([row["id"] for row in rows])
        return np.array([0.9 if row["id"] == f"i{text.split()[1]}" else 0.1 for row in rows], np.float32)

    calibrated = no_match(index, match=match, judge="j").calibrated()
    assert calibrated is not None
    assert {len(ids) for ids in seen} == {16}
    for (own, _), masked, whole in zip(
        no_match(index, match=match).background_texts(), seen[::2], seen[1::2], strict=False
    ):
        assert own not in masked
        assert [name for name in whole if name != own][:15] == masked[:15]
    assert calibrated[0].missed(0.1) == pytest.approx(
        np.mean([own not in ids for own, ids in zip(calibrated[1].owners, seen[1::2], strict=True)])
    )


@pytest.mark.parametrize(
    ("query", "words"),
    [
        (Query(text="a", cut=0), "between 0 and 1"),
        (Query(text="a", cut=1.5), "between 0 and 1"),
        (Query(words="a", cut=0.1), "needs a text"),
        (Query(text="a", like="x", cut=0.1), "needs a text"),
    ],
)
def test_a_wrong_cut_is_refused(query: Query, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        query.checked()
