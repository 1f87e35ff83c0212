"""Retrieval between images and texts: recall@k and median rank, both ways, ties counted exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sightloop.errors import UsageError
from sightloop.types import Floats, Integers

Array: TypeAlias = NDArray[Any]
Ties: TypeAlias = Literal["expected", "worst", "best"]
Reranked: TypeAlias = "tuple[Any, Any] | None"

_CHUNK = 1 << 23  # similarities compared at a time


@dataclass(frozen=True, slots=True)
class RetrievalScores:
    """mean: the numbers. each: `recall@k` and `rank` of every query that has a positive, float64, in their order."""

    mean: dict[str, float]
    each: dict[str, Floats]


def retrieval_scores(
    similarity: Any,
    positives: Any,
    ks: Sequence[int] = (1, 5, 10),
    ties: Ties = "expected",
    reranked_texts: Reranked = None,
    reranked_pictures: Reranked = None,
) -> dict[str, float]:
    """`image-to-text recall@k` and `text-to-image recall@k`, 0..1, and `... median rank`; ranks begin at 1.

    similarity: [images, texts], compared in blocks of rows, so it may be a memory map. positives: the image of
    every text, integers [texts] (-1: of none), or a bool table [images, texts], or for every image a list of its
    texts. A query is found at k if any of its positives is among its first k. Queries without positives are left out
    of the mean and stay as candidates of the others.

    ties: equal similarities have no order. "expected" is the mean over all their orders, so that a constant similarity
    scores exactly what chance does; "worst" and "best" put positives last and first among their equals.

    reranked_texts: (texts [images, k], scores [images, k]), for every image the texts that were judged anew (by
    ITM, say): they come before all others, by their new scores, the others behind them by similarity.
    reranked_pictures: (images [texts, k], scores [texts, k]), the same the other way.

    Raises UsageError for shapes that do not fit, places out of range, a similarity that is no number, no positive.
    """
    return score_retrieval(similarity, positives, ks, ties, reranked_texts, reranked_pictures).mean


def score_retrieval(
    similarity: Any,
    positives: Any,
    ks: Sequence[int] = (1, 5, 10),
    ties: Ties = "expected",
    reranked_texts: Reranked = None,
    reranked_pictures: Reranked = None,
) -> RetrievalScores:
    """`retrieval_scores` with what every query scored."""
    table = np.asanyarray(similarity)
    if table.ndim != 2 or not table.size:
        raise UsageError(f"similarity: shape {table.shape}, expected [images, texts], none of them 0")
    if ties not in ("expected", "worst", "best"):
        raise UsageError(f'ties={ties!r}: there are "expected", "worst" and "best"')
    pairs = _pairs(positives, table.shape)
    by_picture, by_text = _places(table, pairs)
    if reranked_texts is not None:
        by_picture = _reranked(by_picture, table, pairs, reranked_texts)
    if reranked_pictures is not None:
        by_text = _reranked(by_text, table.T, (pairs[1], pairs[0]), reranked_pictures)
    each: dict[str, Floats] = {}
    mean: dict[str, float] = {}
    for name, places, own in (("image-to-text", by_picture, pairs[0]), ("text-to-image", by_text, pairs[1])):
        asked = places.of(np.unique(own))
        for k in ks:
            each[f"{name} recall@{k}"] = asked.recall(k, ties)
            mean[f"{name} recall@{k}"] = float(each[f"{name} recall@{k}"].mean())
        each[f"{name} rank"] = asked.rank(ties)
        mean[f"{name} median rank"] = float(np.median(each[f"{name} rank"]))
    return RetrievalScores(mean, each)


@dataclass(frozen=True, slots=True)
class _Places:
    """Where every query's best positive stands, [queries]: how many candidates come before it, how many positives are
    as good as it (itself included), and how many others are."""

    above: Integers
    positives: Integers
    others: Integers

    def of(self, queries: Integers) -> _Places:
        return _Places(self.above[queries], self.positives[queries], self.others[queries])

    def rank(self, ties: Ties) -> Floats:
        above = self.above.astype(np.float64)
        if ties == "expected":
            # The first of p among p + q in random order stands, on average, at (p + q + 1) / (p + 1).
            return above + (self.positives + self.others + 1) / (self.positives + 1)
        return above + 1 + (self.others if ties == "worst" else 0)

    def recall(self, k: int, ties: Ties) -> Floats:
        if ties != "expected":
            return (self.rank(ties) <= k).astype(np.float64)
        # The chance that the places left hold none of the p: others drawn one after the other.
        missed = np.ones(len(self.above))
        for drawn in range(k):
            open_place = self.above + drawn < k
            left = np.maximum(self.others - drawn, 0)
            missed *= np.where(open_place, left / (self.positives + left), 1.0)
        return 1 - missed


def _pairs(positives: Any, shape: tuple[int, ...]) -> tuple[Integers, Integers]:
    """(image, text) of all that belong together, each once."""
    if isinstance(positives, Sequence) and len(positives) == shape[0] and isinstance(positives[0], Sequence):
        pictures = np.repeat(np.arange(shape[0]), [len(texts) for texts in positives])
        texts = np.array([text for texts in positives for text in texts], np.int64)
    else:
        table = np.asarray(positives)
        if table.shape == shape and table.dtype == bool:
            pictures, texts = np.nonzero(table)
        elif table.shape == shape[1:] and np.issubdtype(table.dtype, np.integer):
            texts = np.flatnonzero(table != -1)
            pictures = table[texts]
        else:
            raise UsageError(
                f"positives: {table.dtype} {table.shape}, expected the image of every text (integers "
                f"[{shape[1]}]), a bool table {list(shape)}, or a list of texts for each of {shape[0]} images"
            )
    if not len(pictures):
        raise UsageError("positives: no image has a text")
    for name, places, size in (("image", pictures, shape[0]), ("text", texts, shape[1])):
        if places.min() < 0 or places.max() >= size:
            raise UsageError(f"positives: {name} {places.min()}..{places.max()}, but there are {size}")
    key = np.unique(pictures.astype(np.int64) * shape[1] + texts)
    return key // shape[1], key % shape[1]


def _places(table: Array, pairs: tuple[Integers, Integers]) -> tuple[_Places, _Places]:
    """The places of all images' and of all texts' best positives."""
    values = _numbers(table[pairs])
    best: list[Array] = []
    equal: list[Integers] = []
    for own, size in zip(pairs, table.shape, strict=True):
        # A query without positives finds nothing as good as infinity.
        highest = np.full(size, -np.inf, np.result_type(table.dtype, np.float16))
        np.maximum.at(highest, own, values)
        equal.append(np.bincount(own[values == highest[own]], minlength=size))
        highest[np.bincount(own, minlength=size) == 0] = np.inf
        best.append(highest)
    before = [np.zeros(size, np.int64) for size in table.shape]
    level = [np.zeros(size, np.int64) for size in table.shape]
    rows = max(1, _CHUNK // table.shape[1])
    for low in range(0, table.shape[0], rows):
        block = _numbers(table[low : low + rows])
        here = best[0][low : low + rows, None]
        before[0][low : low + rows] = np.count_nonzero(block > here, axis=1)
        level[0][low : low + rows] = np.count_nonzero(block == here, axis=1)
        before[1] += np.count_nonzero(block > best[1], axis=0)
        level[1] += np.count_nonzero(block == best[1], axis=0)
    by_picture, by_text = (_Places(before[i], equal[i], level[i] - equal[i]) for i in range(2))
    return by_picture, by_text


def _numbers(values: Array) -> Array:
    if np.isnan(values).any():
        raise UsageError("similarity: holds values that are no number (NaN)")
    return np.asarray(values)


def _reranked(
    places: _Places, table: Array, pairs: tuple[Integers, Integers], reranked: tuple[Any, Any]
) -> _Places:
    """The places where k candidates of every query come first, by scores of their own; table: [queries, candidates]."""
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
        raise UsageError("re-ranked: a score is no number (NaN), or a query has a candidate twice")
    query = np.arange(queries)[:, None]
    own = np.isin(query * size + candidates, pairs[0] * size + pairs[1])  # [queries, k]: a positive
    scores = scores.astype(np.result_type(scores.dtype, np.float16))
    best = np.where(own, scores, -np.inf).max(1, initial=-np.inf, keepdims=True)
    level = scores == best
    # Where no candidate is a positive, the best positive stands behind all k, among what is left.
    values = table[query, candidates]
    highest = np.full(queries, -np.inf, np.result_type(table.dtype, np.float16))
    np.maximum.at(highest, pairs[0], table[pairs])
    found = own.any(1)
    above = places.above + (values <= highest[:, None]).sum(1)
    others = places.others - (values == highest[:, None]).sum(1)
    return _Places(
        np.where(found, (scores > best).sum(1), above),
        np.where(found, (level & own).sum(1), places.positives),
        np.where(found, (level & ~own).sum(1), others),
    )
