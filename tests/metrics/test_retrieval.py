"""Recall and rank: equal to the mean over all orders of equals, counted out; blocks, forms and re-ranking agree."""

from __future__ import annotations

from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sightloop import UsageError
from sightloop.metrics import retrieval as module
from sightloop.metrics.retrieval import Ties, retrieval_scores, score_retrieval

Array = NDArray[Any]


def slow(row: list[float], own: set[int], k: int, ties: str) -> tuple[float, float]:
    """(recall@k, rank) of one query by trying every order of the candidates that sorts their similarities."""
    hits: list[int] = []
    ranks: list[int] = []
    for order in permutations(range(len(row))):
        if all(row[a] >= row[b] for a, b in pairwise(order)):
            rank = min(order.index(candidate) for candidate in own) + 1
            ranks.append(rank)
            hits.append(rank <= k)
    if ties == "expected":
        return float(np.mean(hits)), float(np.mean(ranks))
    return (min(hits), max(ranks)) if ties == "worst" else (max(hits), min(ranks))


@st.composite
def tables(draw: st.DrawFn) -> tuple[Array, Array]:
    pictures, texts = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    values = draw(st.lists(st.integers(0, 2), min_size=pictures * texts, max_size=pictures * texts))
    own = draw(st.lists(st.integers(0, pictures - 1), min_size=texts, max_size=texts))
    return np.array(values, np.float32).reshape(pictures, texts), np.array(own)


@given(tables(), st.sampled_from(["expected", "worst", "best"]), st.integers(1, 4))
def test_ties_are_counted_exactly(drawn: tuple[Array, Array], ties: Ties, k: int) -> None:
    table, own = drawn
    each = score_retrieval(table, own, ks=[k], ties=ties).each
    by_picture = [slow(table[i].tolist(), set(np.flatnonzero(own == i)), k, ties) for i in np.unique(own)]
    by_text = [slow(table[:, t].tolist(), {int(own[t])}, k, ties) for t in range(len(own))]
    for name, expected in (("image-to-text", by_picture), ("text-to-image", by_text)):
        np.testing.assert_allclose(each[f"{name} recall@{k}"], [recall for recall, _ in expected], atol=1e-12)
        np.testing.assert_allclose(each[f"{name} rank"], [rank for _, rank in expected])


def test_a_constant_similarity_scores_as_chance_does() -> None:
    scores = retrieval_scores(np.zeros((20, 20)), np.arange(20))
    for way in ("image-to-text", "text-to-image"):
        np.testing.assert_allclose([scores[f"{way} recall@{k}"] for k in (1, 5, 10)], [0.05, 0.25, 0.5])
        assert scores[f"{way} median rank"] == 10.5


def random_table(pictures: int = 30, captions: int = 5) -> tuple[Array, Array]:
    random = np.random.default_rng(0)
    own = random.permutation(np.repeat(np.arange(pictures), captions))
    table = random.integers(0, 12, (pictures, len(own))).astype(np.float32)
    table[own, np.arange(len(own))] += 3
    return table, own


def test_the_forms_of_positives_agree() -> None:
    table, own = random_table()
    expected = retrieval_scores(table, own)
    assert retrieval_scores(table, own[None] == np.arange(30)[:, None]) == expected
    assert retrieval_scores(table, [np.flatnonzero(own == i).tolist() for i in range(30)]) == expected
    assert retrieval_scores(table, own.tolist()) == expected


def test_the_size_of_the_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    table, own = random_table()
    whole = retrieval_scores(table, own)
    monkeypatch.setattr(module, "_CHUNK", 400)
    assert retrieval_scores(table, own) == whole


def test_queries_without_positives_are_candidates_only() -> None:
    table = np.array([[0.1, 0.9, 0.5], [0.8, 0.2, 0.3]])
    scores = score_retrieval(table, np.array([0, -1, 0]), ks=[1, 2])
    assert scores.each["image-to-text rank"].tolist() == [2]
    assert scores.each["text-to-image rank"].tolist() == [2, 1]


def sparse(table: Array, scores: Array, k: int) -> tuple[Array, tuple[Array, Array]]:
    """What re-ranking means, written out: the k most similar of every row above all others, by the new scores."""
    nearest = np.argsort(-table, axis=1, kind="stable")[:, :k]
    whole = table.copy()
    rows = np.arange(len(table))[:, None]
    whole[rows, nearest] = 1000 + scores[rows, nearest]
    return whole, (nearest, scores[rows, nearest])


@pytest.mark.parametrize("k", [0, 1, 4, 30])
@pytest.mark.parametrize("ties", ["expected", "worst", "best"])
def test_reranking_is_a_new_order_of_the_first(k: int, ties: Ties) -> None:
    table, own = random_table()
    again = np.random.default_rng(1).integers(0, 6, table.shape).astype(np.float32)
    rows, texts = sparse(table, again, k)
    columns, pictures = sparse(table.T, again.T, k)
    both = score_retrieval(table, own, ties=ties, reranked_texts=texts, reranked_images=pictures).each
    expected = score_retrieval(rows, own, ties=ties).each
    turned = score_retrieval(columns.T, own, ties=ties).each
    for name, values in both.items():
        np.testing.assert_allclose(
            values, (expected if name.startswith("image") else turned)[name], atol=1e-12
        )


@pytest.mark.parametrize(
    ("similarity", "positives", "options", "says"),
    [
        (np.zeros(3), [0], {}, "expected \\[images, texts\\]"),
        (np.zeros((2, 0)), [], {}, "expected \\[images, texts\\]"),
        (np.zeros((2, 3)), np.zeros(2, int), {}, "positives"),
        (np.zeros((2, 3)), np.array([0, 1, 2]), {}, "image 0..2, but there are 2"),
        (np.zeros((2, 3)), np.array([-1, -1, -1]), {}, "no image has a text"),
        (np.zeros((2, 3)), [[0], [3]], {}, "text 0..3"),
        (np.full((2, 3), np.nan), np.array([0, 1, 1]), {}, "NaN"),
        (np.zeros((2, 2)), [0, 1], {"ties": "random"}, "ties='random'"),
        (np.zeros((2, 2)), [0, 1], {"reranked_texts": ([[0]], [[1.0]])}, "re-ranked"),
        (np.zeros((2, 2)), [0, 1], {"reranked_texts": ([[0], [2]], [[1.0], [1.0]])}, "candidates 0..2"),
        (np.zeros((2, 2)), [0, 1], {"reranked_images": ([[0, 0], [0, 1]], np.ones((2, 2)))}, "twice"),
    ],
)
def test_what_does_not_fit_is_said(similarity: Any, positives: Any, options: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        retrieval_scores(similarity, positives, **options)
