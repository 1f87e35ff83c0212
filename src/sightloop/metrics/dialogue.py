"""Visual dialogue metrics: where the true answer stands among the candidates, and NDCG by people's relevance.

Das et al. 2017; the rules are those of the VisDial challenge's code (batra-mlp-lab/visdial-challenge-starter-pytorch):
distinct ranks from a descending sort, in which equal scores keep the order of the candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from sightloop.errors import UsageError
from sightloop.types import Floats, Integers

RECALL_AT = (1, 5, 10)


def answer_ranks(scores: ArrayLike) -> Integers:
    """Ranks of candidates, int64 of the shape of the scores `[..., C]`: 1 for the best, C for the last.

    Of equal scores the earlier candidate has the better rank.

    Raises:
        UsageError: a score is NaN, or there is no candidate.
    """
    values = np.asarray(scores, np.float64)
    if values.ndim == 0 or not values.shape[-1]:
        raise UsageError(f"scores {values.shape}: expected [..., C] with at least one candidate")
    if np.isnan(values).any():
        raise UsageError("scores: some are NaN")
    order = np.argsort(-values, axis=-1, kind="stable")  # [..., C], candidates from the best to the last
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(1, order.shape[-1] + 1), order.shape), axis=-1)
    return ranks


def dialogue_ndcg(scores: ArrayLike, relevance: ArrayLike) -> float:
    """Normalized discounted cumulative gain of one round, 0..1.

    DCG = sum over the k best candidates of relevance / log2(rank + 1), k the number of candidates with relevance other
    than 0; divided by that of the best order.

    Args:
        scores: `[C]`.
        relevance: `[C]`, at least 0.

    Returns:
        NDCG; NaN where no candidate is relevant.

    Raises:
        UsageError: the shapes differ, or a score is NaN.
    """
    ranks, gains = answer_ranks(scores), np.asarray(relevance, np.float64)
    if gains.shape != ranks.shape or ranks.ndim != 1:
        raise UsageError(f"scores {ranks.shape} and relevance {gains.shape}: expected two of shape [C]")
    k = int((gains != 0).sum())
    if not k:
        return float("nan")
    discounts = np.log2(np.arange(k) + 2)  # [k]
    ideal = np.sort(gains)[::-1][:k]
    return float((gains[np.argsort(ranks)[:k]] / discounts).sum() / (ideal / discounts).sum())


def dialogue_scores(
    scores: Sequence[ArrayLike], truths: Sequence[int], relevance: Sequence[ArrayLike | None] = ()
) -> dict[str, float]:
    """Metrics of N rounds.

    Args:
        scores: for each round the scores `[C]` of its candidates; higher is better.
        truths: for each round the index of the true answer.
        relevance: for each round `[C]`, or None where people gave none; () for none at all.

    Returns:
        `MRR` (mean of 1 / rank), `R@1`, `R@5`, `R@10` and `mean rank` of the true answers; `NDCG`, the mean of the
        rounds with a relevant candidate, if there are any.

    Raises:
        UsageError: no round, lengths that differ, an index without candidate, or a NaN.
    """
    if not len(scores) or len(truths) != len(scores) or len(relevance) not in (0, len(scores)):
        raise UsageError(
            f"{len(scores)} rounds of scores, {len(truths)} truths, {len(relevance)} of relevance: expected one of "
            "each for every round, and at least one round"
        )
    ranks = np.array([truth_rank(row, truth) for row, truth in zip(scores, truths, strict=True)])
    result = {name: float(values.mean()) for name, values in rank_metrics(ranks).items()}
    gains = [
        dialogue_ndcg(row, gain) for row, gain in zip(scores, relevance, strict=False) if gain is not None
    ]
    if known := [value for value in gains if not np.isnan(value)]:
        result["NDCG"] = float(np.mean(known))
    return result


def truth_rank(scores: ArrayLike, truth: int) -> int:
    """The rank of the true answer among candidates with scores `[C]`. Raises UsageError for an index out of range."""
    ranks = answer_ranks(scores)
    if ranks.ndim != 1 or not 0 <= truth < len(ranks):
        raise UsageError(f"the true answer has the index {truth}, the scores the shape {ranks.shape}")
    return int(ranks[truth])


def rank_metrics(ranks: Integers) -> dict[str, Floats]:
    """What each rank `[N]` of a true answer contributes to `MRR`, `R@1`, `R@5`, `R@10` and `mean rank`, `[N]` each."""
    hits = {f"R@{k}": (ranks <= k).astype(np.float64) for k in RECALL_AT}
    return {"MRR": 1 / ranks, **hits, "mean rank": ranks.astype(np.float64)}
