"""VisDial's metrics against a reference that follows the challenge's loops, on random scores with ties."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sightloop.errors import UsageError
from sightloop.metrics import answer_ranks, dialogue_ndcg, dialogue_scores, truth_rank


def ranks_by_counting(scores: list[float]) -> list[int]:
    """How many are better, and how many are equal and come before."""
    return [
        1 + sum(other > own for other in scores) + sum(other == own for other in scores[:i])
        for i, own in enumerate(scores)
    ]


def ndcg_by_loops(scores: list[float], relevance: list[float]) -> float:
    ranks = ranks_by_counting(scores)
    order = sorted(range(len(scores)), key=lambda i: ranks[i])
    best = sorted(relevance, reverse=True)
    k = sum(gain != 0 for gain in relevance)
    gained = sum(relevance[order[i]] / math.log2(i + 2) for i in range(k))
    return gained / sum(best[i] / math.log2(i + 2) for i in range(k))


def test_thousand_random_rounds_with_ties_equal_the_reference() -> None:
    random = np.random.default_rng(0)
    scores: list[list[float]] = []
    truths: list[int] = []
    relevance: list[list[float] | None] = []
    for case in range(1000):
        count = int(random.integers(2, 101)) if case % 2 else 100
        # From all equal to hardly any equal.
        values = random.integers(0, random.choice([1, 3, 20, 10_000]), count) / 4
        scores.append(values.tolist())
        truths.append(int(random.integers(count)))
        gains = random.choice([0.0, 0.0, 0.0, 0.2, 0.4, 1.0], count)
        relevance.append(gains.tolist() if case % 3 and gains.any() else None)
    ranks = [ranks_by_counting(row)[truth] for row, truth in zip(scores, truths, strict=True)]
    gains = [ndcg_by_loops(row, own) for row, own in zip(scores, relevance, strict=True) if own is not None]
    expected = {
        "MRR": sum(1 / rank for rank in ranks) / 1000,
        "R@1": sum(rank <= 1 for rank in ranks) / 1000,
        "R@5": sum(rank <= 5 for rank in ranks) / 1000,
        "R@10": sum(rank <= 10 for rank in ranks) / 1000,
        "mean rank": sum(ranks) / 1000,
        "NDCG": sum(gains) / len(gains),
    }
    assert dialogue_scores(scores, truths, relevance) == pytest.approx(expected, abs=1e-12)
    assert [answer_ranks(row).tolist() for row in scores[:100]] == [
        ranks_by_counting(row) for row in scores[:100]
    ]
    assert answer_ranks(np.array([scores[0], scores[0]])).tolist() == [ranks_by_counting(scores[0])] * 2


def test_a_perfect_and_the_worst_order() -> None:
    relevance = [0, 0.5, 1, 0]
    assert dialogue_ndcg([0, 1, 2, -1], relevance) == 1
    assert dialogue_ndcg([3, 1, 0, 4], relevance) == 0
    assert math.isnan(dialogue_ndcg([1, 2], [0, 0]))
    assert "NDCG" not in dialogue_scores([[1, 2]], [0], [[0, 0]])
    assert dialogue_scores([[1, 2]], [1]) == {"MRR": 1, "R@1": 1, "R@5": 1, "R@10": 1, "mean rank": 1}


def test_wrong_arguments_raise() -> None:
    for scores in ([1, float("nan")], [], 1):
        with pytest.raises(UsageError, match="scores"):
            answer_ranks(scores)
    with pytest.raises(UsageError, match="index 2"):
        truth_rank([1, 2], 2)
    with pytest.raises(UsageError, match="index -1"):
        truth_rank([1, 2], -1)
    with pytest.raises(UsageError, match="relevance"):
        dialogue_ndcg([1, 2], [1])
    for arguments in (([], []), ([[1]], []), ([[1]], [0], [None, None])):
        with pytest.raises(UsageError, match="at least one round"):
            dialogue_scores(*arguments)  # type: ignore[arg-type]
