"""A number with its protocol and its interval, and the per-sample values from which both come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from sightloop.data.datasets.leakage import Leaks
from sightloop.metrics import Difference, Statistic, bootstrap_interval, paired_bootstrap
from sightloop.types import Floats, JsonDict, JsonMapping, Region

T = TypeVar("T")
RowStatistic: TypeAlias = Callable[[Floats], float]


@dataclass(frozen=True, slots=True)
class MetricValue:
    """What is reported. low, high: the 95 % interval, None where there is none (the protocol says why)."""

    name: str
    value: float
    low: float | None
    high: float | None
    samples: int
    unit: str
    protocol: str


@dataclass(frozen=True, slots=True)
class MetricTable:
    """One number as its samples make it: the mean of a table `[N]`, a function of its mean `[N, k]`, or of its rows.

    rows: what each row is about (the sample's key first). unit: what a row is, in the plural. sets: how often rows are
    drawn anew for the interval of a function of rows, which is NaN where they cannot tell.
    """

    name: str
    protocol: str
    unit: str
    rows: Sequence[str]
    table: Floats
    of_means: Statistic | None = None
    of_rows: RowStatistic | None = None
    sets: int = 300

    def number(self, seed: int) -> MetricValue:
        """With its bootstrap interval."""
        if self.of_rows is None:
            found = bootstrap_interval(self.table, self.of_means, seed=seed)
            value, low, high = found.value, found.low, found.high
        else:
            value = self.of_rows(self.table)
            drawn = [self.of_rows(self.table[chosen]) for chosen in self._drawn(len(self.table), seed)]
            low, high = _percentiles(drawn)
        return MetricValue(self.name, value, low, high, len(self.table), self.unit, self.protocol)

    def less(self, other: MetricTable, seed: int) -> Difference:
        """This model's number less the other's, over the rows that both have, the same ones drawn for both."""
        places = {row: place for place, row in enumerate(other.rows)}
        mine = [place for place, row in enumerate(self.rows) if row in places]
        theirs = [places[self.rows[place]] for place in mine]
        first, second = self.table[mine], other.table[theirs]
        if self.of_rows is None:
            return paired_bootstrap(first, second, self.of_means, seed=seed)
        ours, theirs_of = self.of_rows, other.of_rows or self.of_rows
        drawn = np.array(
            [ours(first[chosen]) - theirs_of(second[chosen]) for chosen in self._drawn(len(mine), seed)]
        )
        low, high = _percentiles(drawn)
        against = min((drawn <= 0).sum(), (drawn >= 0).sum())
        value = ours(first) - theirs_of(second)
        return Difference(value, low, high, min(1.0, 2 * float(against + 1) / (self.sets + 1)))

    def _drawn(self, count: int, seed: int) -> list[NDArray[np.int64]]:
        random = np.random.default_rng(np.random.Philox(seed))
        return [random.integers(count, size=count) for _ in range(self.sets)]


@dataclass(frozen=True, slots=True)
class ExampleCase:
    """One sample for people. quality: higher is better; disputed: higher is more so; lines: (who, text); marks: regions
    to draw on the image, each with whose it is, "model" or "people"."""

    key: str
    quality: float
    disputed: float
    lines: tuple[tuple[str, str], ...]
    marks: tuple[tuple[str, Region], ...] = ()


@dataclass(frozen=True, slots=True)
class TaskScores:
    """What a task makes of predictions. facts: numbers without interval; not_computed: name -> why.

    ranked: by what the cases are good, and disputed, for people.
    confusion: class names and counts `[true, predicted]`; curves: name -> (x label, y label, points `[n, 2]`).
    """

    measures: tuple[MetricTable, ...]
    facts: tuple[MetricValue, ...] = ()
    not_computed: Mapping[str, str] = field(default_factory=dict[str, str])
    cases: tuple[ExampleCase, ...] = ()
    ranked: str = ""
    confusion: tuple[tuple[str, ...], NDArray[np.int64]] | None = None
    curves: Mapping[str, tuple[str, str, Floats]] = field(default_factory=JsonDict)


@dataclass(frozen=True, slots=True)
class EvalRun:
    """One model's part. about: whose predictions these are, and on what; the first line of its file."""

    about: JsonMapping
    numbers: tuple[MetricValue, ...]
    scored: TaskScores
    failed: Mapping[str, str]

    @property
    def name(self) -> str:
        """The model, as it was named."""
        return str(self.about.get("model", "not said"))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate` returns: iterate for (name, value) pairs.

    runs: one a model. differences: of two models, first less second, with interval and p. leaks: evaluation data
    that is in the training data, where that was given. about: task, data and its fingerprint, seed, version.
    """

    about: JsonMapping
    runs: tuple[EvalRun, ...]
    differences: Mapping[str, Difference] = field(default_factory=dict[str, Difference])
    leaks: Leaks | None = None

    def __iter__(self) -> Iterator[tuple[str, float]]:
        for run in self.runs:
            before = f"{run.name}: " if len(self.runs) > 1 else ""
            for number in run.numbers:
                yield before + number.name, number.value


def remembered(function: Callable[[Floats], T]) -> Callable[[Floats], T]:
    """For statistics that share a costly step: each set of rows goes through it once."""
    known: dict[bytes, T] = {}

    def call(rows: Floats) -> T:
        key = blake2b(np.ascontiguousarray(rows).tobytes()).digest()
        if key not in known:
            known[key] = function(rows)
        return known[key]

    return call


def _percentiles(drawn: Any) -> tuple[float, float]:
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return float(low), float(high)
