"""Re-ranking: judged together is judged one by one; the same candidates everywhere; no pair twice, none forgotten."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sightloop
from sightloop.inference import matching, rerank
from sightloop.inference.model import Model
from sightloop.inference.rerank import ImageCache, cosines, pairs_to_match, top_k
from tests.checkpoints.test_against_reference import pictures
from tests.tiny_checkpoints.clip_and_blip import write_blip

TEXTS = ["a dog", "two red cats on a beach", "", "the old man, sitting in a car!", "a", "dog " * 12]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("rerank") / "match"
    write_blip(folder, head="match")
    return sightloop.load(folder, device="cpu")


@pytest.mark.parametrize(
    "rows", [[[0, 1, 5], [3], [], [2, 4, 0, 1], [5]], [[1], [2], [0]], [[5, 4, 3, 2, 1, 0]] * 2]
)
def test_texts_of_a_picture_together_are_what_they_are_alone(model: Model, rows: list[list[int]]) -> None:
    images = list(model.read(pictures(len(rows)), isolate=False))
    chosen = [np.array(mine, np.int64) for mine in rows]
    found = model.match_scores(model.encode(images), model.tokenize(TEXTS), chosen)
    for image, mine, logits in zip(images, rows, found, strict=True):
        assert logits.shape == (len(mine), 2)
        for text, (no, yes) in zip(mine, logits, strict=True):
            alone = model.match(image, TEXTS[text])[0]
            assert abs(1 / (1 + np.exp(float(no) - float(yes))) - alone) < 2e-6


def test_a_cap_on_tokens_changes_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    image = model.encode(list(model.read(pictures(1), isolate=False)))
    rows, texts = [np.arange(len(TEXTS))], model.tokenize(TEXTS)
    whole = model.match_scores(image, texts, rows)[0]
    monkeypatch.setattr(matching, "_TOKENS_AT_ONCE", 10)
    assert np.abs(model.match_scores(image, texts, rows)[0] - whole).max() < 1e-5


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(0, 300))
def test_every_text_goes_once_and_no_split_is_dearer_than_none(lengths: list[int], price: int) -> None:
    values = np.array(lengths, np.int64)
    passes = list(matching._passes(values, price))
    assert sorted(np.concatenate([np.empty(0, np.int64), *passes]).tolist()) == list(range(len(lengths)))
    if lengths:
        cost = sum(price + len(part) * int(values[part].max()) for part in passes)
        assert cost <= price + len(lengths) * max(lengths)
        assert cost <= sum(
            price + n * count for n, count in zip(*np.unique(values, return_counts=True), strict=True)
        )


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=5, max_size=5), min_size=1, max_size=4), st.integers(1, 7)
)
def test_of_equal_scores_the_first_are_the_top(rows: list[list[int]], k: int) -> None:
    table = np.array(rows, np.float32)
    expected = np.argsort(-table, axis=1, kind="stable")[:, :k]
    assert np.array_equal(top_k(table, k), expected)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 1000))
def test_both_directions_meet_in_one_list_of_pairs(pictures: int, texts: int, k: int, seed: int) -> None:
    table = np.random.default_rng(seed).random((pictures, texts))
    texts_of, pictures_of = top_k(table, k), top_k(table.T, k)
    expected = {(p, int(t)) for p in range(pictures) for t in texts_of[p]}
    expected |= {(int(p), t) for t in range(texts) for p in pictures_of[t]}
    found = pairs_to_match(texts_of, pictures_of)
    assert len(found) == pictures
    assert [(p, int(t)) for p, mine in enumerate(found) for t in mine] == sorted(expected)


def test_similarities_in_blocks_are_similarities(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    images, texts = random.random((7, 5), np.float32), random.random((4, 5), np.float32)
    monkeypatch.setattr(rerank, "_SIMILARITIES_AT_ONCE", 8)
    assert np.array_equal(
        cosines(images, texts), (images.astype(float) @ texts.T.astype(float)).astype(np.float32)
    )


def test_memories_keep_what_fits_and_hand_it_out_once(model: Model) -> None:
    image = model.encode(list(model.read(pictures(3), isolate=False)))
    size = image.tokens[0].numel() * 4
    kept = ImageCache(2 * size)
    for row in range(3):
        kept.put(str(row), image, row)
    found = [kept.pop(str(row)) for row in range(3)]
    assert found[2] is None
    assert kept.pop("0") is None
    assert all(
        one is not None and one.tokens.equal(image.tokens[i : i + 1]) for i, one in enumerate(found[:2])
    )
    kept.put("2", image, 2)
    assert kept.pop("2") is not None
