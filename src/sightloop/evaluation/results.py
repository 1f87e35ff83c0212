"""Results of an evaluation: numbers with protocol and interval, and the values per sample that they come from.

task.score() -> TaskScores of MetricTable -> EvalRun of MetricValue -> Evaluation
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from html import escape
from typing import TypeVar

import numpy as np

from sightloop.data.datasets.leakage import Leaks
from sightloop.metrics import (
    Difference,
    RowStatistic,
    Statistic,
    bootstrap_interval,
    bootstrap_rows,
    paired_bootstrap,
    paired_bootstrap_rows,
)
from sightloop.types import Floats, Integers, JsonDict, JsonMapping, Region

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MetricValue:
    """A reported number.

    Attributes:
        name: of the metric, "CIDEr".
        value: the number.
        low: lower end of the 95 % interval; None where there is no interval (the protocol gives the reason).
        high: upper end of the interval, or None.
        samples: number of samples it is computed of.
        unit: what a sample is, in the plural: "images", "captions".
        protocol: how it is computed, with the paper, for people.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    samples: int
    unit: str
    protocol: str


@dataclass(frozen=True, slots=True)
class MetricTable:
    """A metric as a function of a table with one row per sample; from it come value, interval and difference.

    The value is the mean of the rows; with `of_means` a function of the mean row; with `of_rows` a function of
    all rows.

    Attributes:
        name: of the metric.
        protocol: how it is computed, for people.
        unit: what a row is, in the plural.
        row_keys: N keys of the rows, by which two models are compared.
        rows: `[N]`, or `[N, k]` with one of the two functions.
        of_means: means `[R, k]` -> scores `[R]`.
        of_rows: rows `[N]` or `[N, k]` -> score; NaN where a resampled set has none.
        resamples: sets drawn for the interval of `of_rows`; 0: no interval and no difference.
    """

    name: str
    protocol: str
    unit: str
    row_keys: Sequence[str]
    rows: Floats
    of_means: Statistic | None = None
    of_rows: RowStatistic | None = None
    resamples: int = 300

    @classmethod
    def constant(
        cls, name: str, protocol: str, unit: str, row_keys: Sequence[str], value: float
    ) -> MetricTable:
        """A number of the whole corpus that resampling the samples would not estimate."""
        rows = np.zeros(len(row_keys))
        return cls(name, protocol, unit, row_keys, rows, of_rows=lambda _: value, resamples=0)

    def evaluate(self, seed: int) -> MetricValue:
        """The value with its bootstrap interval."""
        low: float | None = None
        high: float | None = None
        if self.of_rows is None:
            interval = bootstrap_interval(self.rows, self.of_means, seed=seed)
            value, low, high = interval.value, interval.low, interval.high
        elif self.resamples:
            interval = bootstrap_rows(self.rows, self.of_rows, self.resamples, seed)
            value, low, high = interval.value, interval.low, interval.high
        else:
            value = self.of_rows(self.rows)
        if len(self.rows) < 2 or not (low is not None and high is not None and math.isfinite(low + high)):
            low = high = None  # one row says nothing about how others vary
        return MetricValue(self.name, value, low, high, len(self.rows), self.unit, self.protocol)

    def difference(self, other: MetricTable, seed: int) -> Difference | None:
        """This value minus that of `other`, over the rows that both have; None without resampling on either side."""
        if not (self.resamples and other.resamples):
            return None
        index_of = {key: index for index, key in enumerate(other.row_keys)}
        shared = [index for index, key in enumerate(self.row_keys) if key in index_of]
        first, second = self.rows[shared], other.rows[[index_of[self.row_keys[index]] for index in shared]]
        if self.of_rows is None:
            return paired_bootstrap(first, second, self.of_means, seed=seed)
        statistics = (self.of_rows, other.of_rows or self.of_rows)
        return paired_bootstrap_rows(first, second, statistics, self.resamples, seed)


@dataclass(frozen=True, slots=True)
class ExampleCase:
    """One sample in the gallery of the report.

    Attributes:
        key: of the sample.
        quality: how well the model did; higher is better.
        disputed: how doubtful the result is; higher is more so.
        lines: (source, text) under the image, such as ("model", "a dog").
        marks: (source, region) to draw on the image; source: "model" or "people".
    """

    key: str
    quality: float
    disputed: float
    lines: tuple[tuple[str, str], ...]
    marks: tuple[tuple[str, Region], ...] = ()


@dataclass(frozen=True, slots=True)
class TaskScores:
    """What a task computes of the predictions of one model.

    Attributes:
        metrics: the numbers, in the order of the report.
        not_computed: metric -> reason why it is missing.
        cases: examples for the report.
        ranked: what `quality` and `disputed` of the cases mean, for people.
        confusion: class names, and counts `[true, predicted]`.
        curves: name -> (x label, y label, points `[P, 2]`).
        weights: of the signals of sample and rank, for weights.json; {} for none.
    """

    metrics: tuple[MetricTable, ...]
    not_computed: Mapping[str, str] = field(default_factory=dict[str, str])
    cases: tuple[ExampleCase, ...] = ()
    ranked: str = ""
    confusion: tuple[tuple[str, ...], Integers] | None = None
    curves: Mapping[str, tuple[str, str, Floats]] = field(default_factory=JsonDict)
    weights: JsonMapping = field(default_factory=JsonDict)


@dataclass(frozen=True, slots=True)
class EvalRun:
    """The part of an evaluation that belongs to one model.

    Attributes:
        about: model, weights, data and settings: the header of the predictions file.
        numbers: the metrics.
        scored: examples, curves, confusion, and what was not computed.
        failed: key of a sample that was left out -> reason.
    """

    about: JsonMapping
    numbers: tuple[MetricValue, ...]
    scored: TaskScores
    failed: Mapping[str, str]

    @property
    def name(self) -> str:
        """The model, as the caller named it."""
        return str(self.about.get("model", "not said"))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate` returns; iterate over it for (name, value) pairs.

    Attributes:
        about: task, data and its fingerprint, number of samples, seed, version.
        runs: one per model.
        differences: of two models, metric -> first minus second, with interval and p.
        leaks: evaluation samples that are in the training data; None if no training data was given.
        notes: what the data source left out, for people.
        warnings: of each model that was trained on the evaluation's images, for people.
    """

    about: JsonMapping
    runs: tuple[EvalRun, ...]
    differences: Mapping[str, Difference] = field(default_factory=dict[str, Difference])
    leaks: Leaks | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[tuple[str, float]]:
        for run in self.runs:
            prefix = f"{run.name}: " if len(self.runs) > 1 else ""
            for number in run.numbers:
                yield prefix + number.name, number.value

    def _cells(self) -> list[list[str]]:
        """A head, and a row for each number with its interval and what it is computed of."""
        rows = [
            [
                *([run.name] if len(self.runs) > 1 else []),
                number.name,
                f"{number.value:.4g}",
                "" if number.low is None or number.high is None else f"{number.low:.4g} to {number.high:.4g}",
                f"{number.samples:,} {number.unit}",
            ]
            for run in self.runs
            for number in run.numbers
        ]
        head = [*(["model"] if len(self.runs) > 1 else []), "metric", "value", "95 % interval", "of"]
        return [head, *rows]

    def __repr__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """One table for notebooks."""
        cells = self._cells()
        lines = (
            "".join(f"<{kind}>{escape(text)}</{kind}>" for text in row)
            for row, kind in zip(cells, ["th", *["td"] * (len(cells) - 1)], strict=True)
        )
        return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def memoize_rows(function: Callable[[Floats], T]) -> Callable[[Floats], T]:
    """Caches a function of rows `[N, ...]` by their content, for metrics that share a costly step."""
    results: dict[bytes, T] = {}

    def cached(rows: Floats) -> T:
        digest = blake2b(np.ascontiguousarray(rows).tobytes()).digest()
        if digest not in results:
            results[digest] = function(rows)
        return results[digest]

    return cached


def ratio_of_means(means: Floats) -> Floats:
    """Means `[R, 2]` of numerators and denominators -> ratios `[R]`; NaN where the denominator is 0."""
    whole = means[:, 1]
    return np.divide(means[:, 0], whole, out=np.full(len(whole), np.nan), where=whole > 0)
