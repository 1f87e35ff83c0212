"""Bootstrap confidence intervals (Efron and Tibshirani 1993): how far a score would move on other samples.

Two kinds of statistics:

* of means (`bootstrap_interval`, `paired_bootstrap`): the score is a mean over samples or a function of such means.
  All resampled sets are then one matrix product, and thousands of them are cheap.
* of rows (`bootstrap_rows`, `paired_bootstrap_rows`): the score needs the samples themselves (a median, mAP). It is
  computed once for each resampled set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from sightloop.errors import UsageError
from sightloop.types import Floats, Integers

Statistic: TypeAlias = Callable[[Floats], Floats]  # means over samples [R, k] -> scores [R]
RowStatistic: TypeAlias = Callable[[Floats], float]  # one set of rows [N] or [N, k] -> its score

_CHUNK = 1 << 22  # indices drawn at a time: bounds memory
_ROW_LEVELS = (0.025, 0.975)  # ends of the 95 % interval


@dataclass(frozen=True, slots=True)
class Interval:
    """A score with its percentile interval.

    Attributes:
        value: the score of the samples themselves.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    """How much higher the first model scores than the second, on the same samples.

    Attributes:
        value: score of the first minus score of the second.
        low: lower end of the interval of the difference.
        high: upper end of the interval of the difference.
        p: two-sided p-value in (0, 1]: twice the share of sets (the observed one counted among them) on which the
            difference is 0 or has the other sign; never 0.
    """

    value: float
    low: float
    high: float
    p: float


def bootstrap_interval(
    values: ArrayLike,
    statistic: Statistic | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a mean over samples, or of a function of means.

    BLEU-4: `bootstrap_interval(scores.bleu_counts, lambda means: bleu(means * N)[:, 3])`.

    Args:
        values: `[N]`, one number per sample, or `[N, k]` with a `statistic`.
        statistic: makes scores `[R]` of the means `[R, k]` of R resampled sets; None: the mean itself.
        resamples: number of resampled sets.
        level: coverage of the interval, between 0 and 1.
        seed: the same seed draws the same sets whenever N is the same.
    """
    table = _table(values)
    scores = _scores(_means(table, resamples, seed), statistic)
    low, high = _percentiles(scores, level)
    return Interval(float(_scores(table.mean(0, keepdims=True), statistic)[0]), low, high)


def paired_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    statistic: Statistic | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Interval of the difference first - second of two models; both are resampled alike (Koehn 2004).

    Args:
        first: `[N]` or `[N, k]`, as `values` of `bootstrap_interval`.
        second: the same shape, the same samples in the same order.
        statistic: as in `bootstrap_interval`.
        resamples: number of resampled sets.
        level: coverage of the interval, between 0 and 1.
        seed: of the resampled sets.
    """
    first_table, second_table = _table(first), _table(second)
    if first_table.shape != second_table.shape:
        raise UsageError(
            f"first {first_table.shape} and second {second_table.shape}: expected scores of the same samples"
        )
    both = np.concatenate([first_table, second_table], 1)  # [N, 2k]
    width = first_table.shape[1]

    def difference(means: Floats) -> Floats:
        return _scores(means[:, :width], statistic) - _scores(means[:, width:], statistic)

    differences = difference(_means(both, resamples, seed))
    value = float(difference(both.mean(0, keepdims=True))[0])
    low, high = _percentiles(differences, level)
    return Difference(value, low, high, _p_value(differences))


def bootstrap_rows(rows: Floats, statistic: RowStatistic, resamples: int = 300, seed: int = 0) -> Interval:
    """95 % percentile interval of a statistic of the rows themselves.

    Args:
        rows: `[N]` or `[N, k]`.
        statistic: the score of a set of rows; NaN where a set has none, which is then left out of the percentiles.
        resamples: number of resampled sets.
        seed: of the resampled sets.
    """
    scores = np.array([statistic(rows[drawn]) for drawn in _resampled_rows(len(rows), resamples, seed)])
    low, high = np.nanquantile(scores, _ROW_LEVELS).tolist()
    return Interval(statistic(rows), low, high)


def paired_bootstrap_rows(
    first: Floats,
    second: Floats,
    statistics: tuple[RowStatistic, RowStatistic],
    resamples: int = 300,
    seed: int = 0,
) -> Difference:
    """95 % interval of the difference first - second of two statistics of rows; both are resampled alike.

    Args:
        first: `[N]` or `[N, k]`.
        second: the same samples in the same order.
        statistics: the score of a set of rows of `first`, and that of a set of rows of `second`.
        resamples: number of resampled sets.
        seed: of the resampled sets.
    """
    of_first, of_second = statistics
    differences = np.array(
        [
            of_first(first[drawn]) - of_second(second[drawn])
            for drawn in _resampled_rows(len(first), resamples, seed)
        ]
    )
    low, high = np.nanquantile(differences, _ROW_LEVELS).tolist()
    return Difference(of_first(first) - of_second(second), low, high, _p_value(differences))


def _table(values: ArrayLike) -> Floats:
    """values as `[N, k]`, k = 1 for `[N]`."""
    table = np.asarray(values, np.float64)
    if table.ndim not in (1, 2) or not len(table):
        raise UsageError(f"values {table.shape}: expected [N] or [N, k] with at least one sample")
    if not np.isfinite(table).all():
        raise UsageError("values: some are not finite")
    return table.reshape(len(table), -1)


def _means(table: Floats, resamples: int, seed: int) -> Floats:
    """The means `[R, k]` of R sets of N samples drawn with replacement from `table` `[N, k]`."""
    count = len(table)
    random = np.random.default_rng(np.random.Philox(seed))
    means = np.empty((resamples, table.shape[1]))
    chunk = max(1, _CHUNK // count)  # sets at a time
    for start in range(0, resamples, chunk):
        sets = min(chunk, resamples - start)
        # How often each sample was drawn into each set, counted by one bincount: set s owns the bins s * N ... s * N +
        # N - 1. The drawn indices [[2, 0, 2], [1, 1, 0]] become the bins [[2, 0, 2], [4, 4, 3]] and the counts
        # [[1, 0, 2], [1, 2, 0]].
        bins = random.integers(count, size=(sets, count)) + np.arange(sets)[:, None] * count  # [sets, N]
        times = np.bincount(bins.ravel(), minlength=sets * count).reshape(sets, count)  # [sets, N]
        means[start : start + sets] = times @ table / count
    return means


def _resampled_rows(count: int, resamples: int, seed: int) -> list[Integers]:
    """Indices `[N]` of each resampled set."""
    random = np.random.default_rng(np.random.Philox(seed))
    return [random.integers(count, size=count) for _ in range(resamples)]


def _scores(means: Floats, statistic: Statistic | None) -> Floats:
    """Scores `[R]` of means `[R, k]`."""
    if statistic is not None:
        return np.asarray(statistic(means), np.float64)
    if means.shape[1] != 1:
        raise UsageError(f"values [N, {means.shape[1]}]: give the `statistic` that makes one score of them")
    return means[:, 0]


def _percentiles(scores: Floats, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise UsageError(f"level={level}: expected a number between 0 and 1, such as 0.95")
    low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _p_value(differences: Floats) -> float:
    against = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (against + 1) / (len(differences) + 1))
