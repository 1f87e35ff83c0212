"""Retrieval metrics between images and texts: recall@k and median rank in both directions, ties counted exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sightloop.errors import UsageError
from sightloop.types import Floats, Integers

Ties: TypeAlias = Literal["expected", "worst", "best"]
# Candidates [queries, k] and their new scores [queries, k].
Reranked: TypeAlias = "tuple[ArrayLike, ArrayLike] | None"

_Similarities: TypeAlias = "NDArray[np.floating]"
_CHUNK = 1 << 23  # similarities compared at a time: bounds memory


@dataclass(frozen=True, slots=True)
class RetrievalScores:
    """Retrieval metrics, and what each query contributes.

    Attributes:
        mean: `image-to-text recall@k`, `image-to-text median rank` and so on.
        each: `... recall@k` and `... rank` of every query with a positive, float64 `[queries]`, in order.
    """

    mean: dict[str, float]
    each: dict[str, Floats]


def retrieval_scores(
    similarity: ArrayLike,
    positives: ArrayLike | Sequence[Sequence[int]],
    ks: Sequence[int] = (1, 5, 10),
    ties: Ties = "expected",
    reranked_texts: Reranked = None,
    reranked_images: Reranked = None,
) -> dict[str, float]:
    """`image-to-text recall@k`, `text-to-image recall@k` (0..1) and `... median rank` (from 1).

    A query is found at k if any of its positives is among its first k candidates. Queries without positives are left
    out of the mean, but stay candidates of the others.

    Args:
        similarity: `[images, texts]`; compared in blocks of rows, so it may be a memory map.
        positives: the image of every text, integers `[texts]` (-1: of none), or a bool table `[images, texts]`, or for
            every image a list of its texts. Two images with two texts each: `[0, 0, 1, 1]` or `[[0, 1], [2, 3]]`.
        ks: numbers of candidates.
        ties: how equal similarities are ordered. "expected": the mean over all their orders, so that a constant
            similarity scores what chance does; "worst", "best": positives last or first among their equals.
        reranked_texts: (texts `[images, k]`, scores `[images, k]`): texts that were scored again (by ITM, say). They
            come before all others, by their new scores; the others follow by similarity.
        reranked_images: (images `[texts, k]`, scores `[texts, k]`), the same for text-to-image.

    Raises:
        UsageError: shapes that do not fit, indices out of range, NaN, or no positive.
    """
    return score_retrieval(similarity, positives, ks, ties, reranked_texts, reranked_images).mean


def score_retrieval(
    similarity: ArrayLike,
    positives: ArrayLike | Sequence[Sequence[int]],
    ks: Sequence[int] = (1, 5, 10),
    ties: Ties = "expected",
    reranked_texts: Reranked = None,
    reranked_images: Reranked = None,
) -> RetrievalScores:
    """`retrieval_scores` of `similarity` `[images, texts]` together with the scores of every query."""
    table = np.asanyarray(similarity)
    if table.ndim != 2 or not table.size:
        raise UsageError(f"similarity: shape {table.shape}, expected [images, texts], none of them 0")
    if ties not in ("expected", "worst", "best"):
        raise UsageError(f'ties={ties!r}: there are "expected", "worst" and "best"')
    pairs = _positive_pairs(positives, table.shape)
    image_ranks, text_ranks = _rank_counts(table, pairs)
    if reranked_texts is not None:
        image_ranks = _rerank(image_ranks, table, pairs, reranked_texts)
    if reranked_images is not None:
        text_ranks = _rerank(text_ranks, table.T, (pairs[1], pairs[0]), reranked_images)
    per_query: dict[str, Floats] = {}
    mean: dict[str, float] = {}
    directions = (("image-to-text", image_ranks, pairs[0]), ("text-to-image", text_ranks, pairs[1]))
    for direction, ranks, queries in directions:
        with_positive = ranks.of(np.unique(queries))
        for k in ks:
            recall = with_positive.recall(k, ties)
            per_query[f"{direction} recall@{k}"] = recall
            mean[f"{direction} recall@{k}"] = float(recall.mean())
        rank = with_positive.rank(ties)
        per_query[f"{direction} rank"] = rank
        mean[f"{direction} median rank"] = float(np.median(rank))
    return RetrievalScores(mean, per_query)


@dataclass(frozen=True, slots=True)
class _RankCounts:
    """Where the best positive of every query is ranked, up to the order of ties; `[queries]` each.

    Similarities 0.9, 0.5*, 0.5, 0.5*, 0.1 (* positive): above 1, positives 2, others 1. The best positive has rank 2, 2
    or 3, depending on the order of the three.

    Attributes:
        above: candidates that are better than the best positive.
        positives: positives that are as good as it, itself included.
        others: other candidates that are as good as it.
    """

    above: Integers
    positives: Integers
    others: Integers

    def of(self, queries: Integers) -> _RankCounts:
        """The counts of these queries, `[n]`."""
        return _RankCounts(self.above[queries], self.positives[queries], self.others[queries])

    def rank(self, ties: Ties) -> Floats:
        """Rank of the best positive, from 1, `[queries]`."""
        above = self.above.astype(np.float64)
        if ties == "expected":
            # The first of p among p + q in random order has the mean rank (p + q + 1) / (p + 1).
            return above + (self.positives + self.others + 1) / (self.positives + 1)
        return above + 1 + (self.others if ties == "worst" else 0)

    def recall(self, k: int, ties: Ties) -> Floats:
        """Whether, or with "expected" how probably, a positive is among the first k, `[queries]`."""
        if ties != "expected":
            return (self.rank(ties) <= k).astype(np.float64)
        # The ties fill the ranks above + 1 ... k one after the other. Probability that each of them gets one of the q
        # others and none of the p positives: q / (p + q) * (q - 1) / (p + q - 1) * ...
        missed = np.ones(len(self.above))
        for drawn in range(k):
            within_k = self.above + drawn < k
            left = np.maximum(self.others - drawn, 0)
            missed *= np.where(within_k, left / (self.positives + left), 1.0)
        return 1 - missed


def _positive_pairs(
    positives: ArrayLike | Sequence[Sequence[int]], shape: tuple[int, ...]
) -> tuple[Integers, Integers]:
    """(images `[P]`, texts `[P]`) of all positive pairs, each once, by image and text."""
    if _is_text_lists(positives, shape[0]):
        images = np.repeat(np.arange(shape[0]), [len(texts) for texts in positives])
        texts = np.array([text for texts in positives for text in texts], np.int64)
    else:
        table = np.asarray(positives)
        if table.shape == shape and table.dtype == bool:
            images, texts = np.nonzero(table)
        elif table.shape == shape[1:] and np.issubdtype(table.dtype, np.integer):
            texts = np.flatnonzero(table != -1)
            images = table[texts]
        else:
            raise UsageError(
                f"positives: {table.dtype} {table.shape}, expected the image of every text (integers "
                f"[{shape[1]}]), a bool table {list(shape)}, or a list of texts for each of {shape[0]} images"
            )
    if not len(images):
        raise UsageError("positives: no image has a text")
    for name, indices, size in (("image", images, shape[0]), ("text", texts, shape[1])):
        if indices.min() < 0 or indices.max() >= size:
            raise UsageError(f"positives: {name} {indices.min()}..{indices.max()}, but there are {size}")
    key = np.unique(images.astype(np.int64) * shape[1] + texts)
    return key // shape[1], key % shape[1]


def _is_text_lists(positives: object, images: int) -> TypeGuard[Sequence[Sequence[int]]]:
    return isinstance(positives, Sequence) and len(positives) == images and isinstance(positives[0], Sequence)


def _rank_counts(table: _Similarities, pairs: tuple[Integers, Integers]) -> tuple[_RankCounts, _RankCounts]:
    """Rank counts of all images (rows of `table` `[images, texts]`) and of all texts (its columns)."""
    values = _without_nan(table[pairs])  # similarity of every positive pair, [P]
    best: list[_Similarities] = []  # of the best positive of every image [images], and of every text [texts]
    equal: list[Integers] = []  # positives as good as that
    for queries, size in zip(pairs, table.shape, strict=True):
        highest = np.full(size, -np.inf, np.result_type(table.dtype, np.float16))
        np.maximum.at(highest, queries, values)
        equal.append(np.bincount(queries[values == highest[queries]], minlength=size))
        # For a query without positives nothing is as good as infinity.
        highest[np.bincount(queries, minlength=size) == 0] = np.inf
        best.append(highest)
    above = [np.zeros(size, np.int64) for size in table.shape]
    level = [np.zeros(size, np.int64) for size in table.shape]
    rows = max(1, _CHUNK // table.shape[1])
    for low in range(0, table.shape[0], rows):
        block = _without_nan(table[low : low + rows])  # [rows, texts]
        row_best = best[0][low : low + rows, None]
        above[0][low : low + rows] = np.count_nonzero(block > row_best, axis=1)
        level[0][low : low + rows] = np.count_nonzero(block == row_best, axis=1)
        above[1] += np.count_nonzero(block > best[1], axis=0)
        level[1] += np.count_nonzero(block == best[1], axis=0)
    of_images, of_texts = (_RankCounts(above[i], equal[i], level[i] - equal[i]) for i in range(2))
    return of_images, of_texts


def _without_nan(values: _Similarities) -> _Similarities:
    if np.isnan(values).any():
        raise UsageError("similarity: contains NaN")
    return np.asarray(values)


def _rerank(
    ranks: _RankCounts,
    table: _Similarities,
    pairs: tuple[Integers, Integers],
    reranked: tuple[ArrayLike, ArrayLike],
) -> _RankCounts:
    """Rank counts where k candidates of every query come first, ordered by a second score.

    Args:
        ranks: counts without re-ranking, `[queries]`.
        table: similarity `[queries, candidates]`.
        pairs: (queries `[P]`, candidates `[P]`) of the positives.
        reranked: (candidates `[queries, k]`, scores `[queries, k]`).
    """
    candidates, scores = np.asarray(reranked[0]), np.asarray(reranked[1])
    queries, size = table.shape
    if candidates.ndim != 2 or candidates.shape != scores.shape or len(candidates) != queries:
        raise UsageError(
            f"re-ranked: candidates {candidates.shape} and scores {scores.shape}, expected twice [{queries}, k]"
        )
    if candidates.size and (candidates.min() < 0 or candidates.max() >= size):
        raise UsageError(
            f"re-ranked: candidates {candidates.min()}..{candidates.max()}, but there are {size}"
        )
    if np.isnan(scores).any() or (np.diff(np.sort(candidates)) == 0).any():
        raise UsageError("re-ranked: a score is NaN, or a query has a candidate twice")
    query = np.arange(queries)[:, None]
    is_positive = np.isin(query * size + candidates, pairs[0] * size + pairs[1])  # [queries, k]
    scores = scores.astype(np.result_type(scores.dtype, np.float16))
    best = np.where(is_positive, scores, -np.inf).max(1, initial=-np.inf, keepdims=True)  # [queries, 1]
    level = scores == best
    # Where none of the k is a positive, the best positive is ranked behind all k, by similarity among the others: of
    # those above it and level with it, the ones that are among the k are counted at the front.
    values = table[query, candidates]  # [queries, k]
    highest = np.full(queries, -np.inf, np.result_type(table.dtype, np.float16))
    np.maximum.at(highest, pairs[0], table[pairs])
    has_positive = is_positive.any(1)
    above = ranks.above + (values <= highest[:, None]).sum(1)
    others = ranks.others - (values == highest[:, None]).sum(1)
    return _RankCounts(
        np.where(has_positive, (scores > best).sum(1), above),
        np.where(has_positive, (level & is_positive).sum(1), ranks.positives),
        np.where(has_positive, (level & ~is_positive).sum(1), others),
    )
