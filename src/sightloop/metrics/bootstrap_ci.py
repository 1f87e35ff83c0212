"""Bootstrap intervals (Efron and Tibshirani 1993): how far a score would move on other samples of the same kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from sightloop.errors import UsageError
from sightloop.types import Floats

# From means over samples [R, k] to scores [R].
Statistic: TypeAlias = Callable[[Floats], Floats]

_CHUNK = 1 << 22  # numbers drawn at a time


@dataclass(frozen=True, slots=True)
class Interval:
    """A score with its percentile interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    """How much higher the first model scores than the second, on the same samples.

    p: two-sided, twice the share of sets (the real one counted among them) on which the difference has the other sign
    or none; never 0.
    """

    value: float
    low: float
    high: float
    p: float


def bootstrap_interval(
    values: Any,
    statistic: Statistic | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The percentile interval of a mean over samples, or of a function of means.

    values: [N], one number a sample, or [N, k] with a `statistic` that makes scores [R] of the means [R, k] of R
    resampled sets. BLEU-4 for one: `bootstrap_interval(scored.bleu_counts, lambda means: bleu(means * N)[:, 3])`.
    The same seed draws the same sets whenever N is the same.
    """
    table = _table(values)
    drawn = _scores(_means(table, resamples, seed), statistic)
    low, high = _percentiles(drawn, level)
    return Interval(float(_scores(table.mean(0, keepdims=True), statistic)[0]), low, high)


def paired_bootstrap(
    first: Any,
    second: Any,
    statistic: Statistic | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """The interval of the difference first - second of two models; the same samples are drawn for both (Koehn 2004).

    first, second: as `values` of `bootstrap_interval`, sample by sample in the same order.
    """
    one, other = _table(first), _table(second)
    if one.shape != other.shape:
        raise UsageError(f"first {one.shape} and second {other.shape}: expected scores of the same samples")
    both = np.concatenate([one, other], 1)
    width = one.shape[1]

    def difference(means: Floats) -> Floats:
        return _scores(means[:, :width], statistic) - _scores(means[:, width:], statistic)

    drawn = difference(_means(both, resamples, seed))
    value = float(difference(both.mean(0, keepdims=True))[0])
    low, high = _percentiles(drawn, level)
    against = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return Difference(value, low, high, min(1.0, 2 * (against + 1) / (resamples + 1)))


def _table(values: Any) -> Floats:
    table = np.asarray(values, np.float64)
    if table.ndim not in (1, 2) or not len(table):
        raise UsageError(f"values {table.shape}: expected [N] or [N, k] with at least one sample")
    if not np.isfinite(table).all():
        raise UsageError("values: some are no finite numbers")
    return table.reshape(len(table), -1)


def _means(table: Floats, resamples: int, seed: int) -> Floats:
    """The means [R, k] of R sets of N samples drawn with replacement."""
    count = len(table)
    random = np.random.default_rng(np.random.Philox(seed))
    means = np.empty((resamples, table.shape[1]))
    rows = max(1, _CHUNK // count)
    for start in range(0, resamples, rows):
        here = min(rows, resamples - start)
        places = random.integers(count, size=(here, count)) + np.arange(here)[:, None] * count
        times = np.bincount(places.ravel(), minlength=here * count).reshape(here, count)
        means[start : start + here] = times @ table / count
    return means


def _scores(means: Floats, statistic: Statistic | None) -> Floats:
    if statistic is not None:
        return np.asarray(statistic(means), np.float64)
    if means.shape[1] != 1:
        raise UsageError(f"values [N, {means.shape[1]}]: say by `statistic` which score they make")
    return means[:, 0]


def _percentiles(drawn: Floats, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise UsageError(f"level={level}: expected a number between 0 and 1, as 0.95")
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
