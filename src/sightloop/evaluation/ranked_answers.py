"""Texts by sample and rank as part of an evaluation: does ranking help, by which signal, with how many samples?

What a text counts for is the task's: whether an answer is right, yes or no to an object, objects that a caption makes
up. The weights of the signals are fitted here, on the questions of one half of the images for those of the other half;
what goes into weights.json is fitted on all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from sightloop.data.rng import generator
from sightloop.evaluation.results import MetricTable
from sightloop.metrics import Statistic
from sightloop.ranking.options import ABSTENTION, SIGNALS, RankWeights
from sightloop.types import Floats, JsonDict, JsonMapping

_SIZES = (1, 4, 16, 64)
_GREEDY, _DEFAULT, _FITTED = "greedy search", "default weights", "fitted weights"
_RIDGE = 1e-2  # on weights of standardized signals, in questions
_STEPS = 50  # of Newton's method, which needs about ten


class TextCounts(NamedTuple):
    """What a text counts for.

    Attributes:
        counts: that the measures of a task are made of, such as hits and misses.
        right: 1 where it is right, else 0: what the weights are fitted to.
    """

    counts: tuple[float, ...]
    right: float


CountText: TypeAlias = "Callable[[str], TextCounts]"


@dataclass(frozen=True, slots=True)
class Measure:
    """A metric of kept texts.

    Args:
        name: of the metric.
        protocol: how it is computed, for people.
        unit: what a row is, in the plural.
        columns: of the counts, which of them it is made of.
        of_means: their means `[R, k]` -> values `[R]`; None for the mean of one column.
        less_is_better: whether a smaller value is the better one.
    """

    name: str
    protocol: str
    unit: str
    columns: tuple[int, ...] = (0,)
    of_means: Statistic | None = None
    less_is_better: bool = False

    def table(self, label: str, keys: Sequence[str], rows: Floats) -> MetricTable:
        """The metric of texts chosen in one way; rows `[N, k]`: their counts."""
        own = rows[:, list(self.columns)]
        values = own[:, 0] if self.of_means is None else own
        return MetricTable(
            f"{self.name}[{label}]", self.protocol, self.unit, keys, values, of_means=self.of_means
        )

    def gain(self, label: str, keys: Sequence[str], rows: Floats, greedy: Floats) -> MetricTable:
        """What texts chosen in one way, counts `[N, k]`, have over those of greedy search, paired row by row."""
        better, worse = (greedy, rows) if self.less_is_better else (rows, greedy)
        first, second = better[:, list(self.columns)], worse[:, list(self.columns)]
        how = "that of greedy search less it" if self.less_is_better else "less that of greedy search"
        name, protocol = f"{self.name}: gain over greedy search[{label}]", f"{self.protocol}, {how}"
        of_means, width = self.of_means, len(self.columns)
        if of_means is None:
            return MetricTable(name, protocol, self.unit, keys, first[:, 0] - second[:, 0])
        return MetricTable(
            name,
            protocol,
            self.unit,
            keys,
            np.hstack([first, second]),
            of_means=lambda means: of_means(means[:, :width]) - of_means(means[:, width:]),
        )


class DrawnText(NamedTuple):
    """A distinct text that was drawn.

    Attributes:
        text: what was said.
        draws: which samples said so.
        signals: of the candidate, without votes.
        counts: what it counts for.
        right: likewise.
    """

    text: str
    draws: tuple[int, ...]
    signals: Mapping[str, float]
    counts: tuple[float, ...]
    right: float


class RankedQuestion(NamedTuple):
    """What was asked, with its candidates.

    Attributes:
        row_key: of the row of the tables that its counts are added to.
        image: key of its image.
        drawn: the candidates, without dropped ones.
        greedy: counts of the text of greedy search.
        none: counts of `ABSTENTION`, which is said where no candidate is left.
    """

    row_key: str
    image: str
    drawn: list[DrawnText]
    greedy: tuple[float, ...]
    none: tuple[float, ...]


def as_record(candidates: Sequence[JsonMapping]) -> list[JsonDict]:
    """Candidates as a line of the predictions keeps them."""
    kept = ("text", "draws", "signals", "dropped")
    return [{name: candidate[name] for name in kept} for candidate in candidates]


def ranked_question(
    row_key: str, image: str, record: Sequence[JsonMapping], greedy: str, count: CountText
) -> RankedQuestion:
    """A question from a line of the predictions; dropped candidates are left out.

    Args:
        row_key: of the row of the tables that it belongs to.
        image: key of its image.
        record: as of `as_record`.
        greedy: the text of greedy search.
        count: what a text counts for.
    """
    drawn = [
        DrawnText(
            str(one["text"]),
            tuple(one["draws"]),
            {name: float(value) for name, value in one["signals"].items() if name != "votes"},
            *count(str(one["text"])),
        )
        for one in record
        if not one["dropped"]
    ]
    return RankedQuestion(row_key, image, drawn, count(greedy).counts, count(ABSTENTION).counts)


def ranking_metrics(
    questions: Sequence[RankedQuestion], samples: int, measures: Sequence[Measure]
) -> tuple[list[MetricTable], JsonDict]:
    """The table that says whether ranking helps, and the weights to rank with.

    Args:
        questions: all of them; counts of those with one `row_key` are added up.
        samples: how many texts were drawn.
        measures: what is measured.

    Returns:
        Each measure of greedy search, for each number of samples and each signal alone, with default and with fitted
        weights; the gain over greedy search. The weights as JSON values; {} where every candidate is right or every
        one wrong.
    """
    keys = list(dict.fromkeys(question.row_key for question in questions))
    greedy = _by_row(keys, questions, [each.greedy for each in questions])
    chosen = {_GREEDY: greedy}
    sizes = sorted({n for n in _SIZES if n < samples} | {samples})
    signals = [name for name in SIGNALS if name == "votes" or any(_has(name, each) for each in questions)]
    largest: list[str] = []
    for n in sizes:
        folds = _fold_weights(questions, n)
        for name in [*signals, _DEFAULT, _FITTED] if n > 1 else signals[:1]:
            weights = [_weights(name, each, folds) for each in questions]
            if any(own is None for own in weights):
                continue
            label = f"{n} samples by {name}" if n > 1 else "1 sample"
            winners = [_winner(each, n, own) for each, own in zip(questions, weights, strict=True) if own]
            chosen[label] = _by_row(keys, questions, winners)
            largest += [label] if n == samples else []
    tables: list[MetricTable] = []
    for measure in measures:
        tables += [measure.table(label, keys, rows) for label, rows in chosen.items()]
        tables += [measure.gain(label, keys, chosen[label], greedy) for label in largest]
    final = fit_weights(questions, samples)
    return tables, {} if final is None else asdict(final)


def _weights(name: str, question: RankedQuestion, folds: list[RankWeights | None]) -> RankWeights | None:
    if name == _FITTED:
        return folds[_fold(question.image)]
    return RankWeights() if name == _DEFAULT else RankWeights(**{one: float(one == name) for one in SIGNALS})


def _by_row(
    keys: Sequence[str], questions: Sequence[RankedQuestion], counts: Sequence[tuple[float, ...]]
) -> Floats:
    """Counts of questions, added up by `row_key`: `[keys, k]`."""
    row_of = {key: row for row, key in enumerate(keys)}
    rows = np.zeros((len(keys), len(counts[0])))
    np.add.at(rows, [row_of[each.row_key] for each in questions], np.array(counts))
    return rows


def fit_weights(questions: Sequence[RankedQuestion], n: int) -> RankWeights | None:
    """Logistic regression of whether a candidate is right on its signals; the first n samples count.

    Returns:
        Weights with a bias; None where there is nothing to tell apart.
    """
    features: list[list[float]] = []
    right: list[float] = []
    for question in questions:
        for one, votes in _first(question, n):
            signals = {**one.signals, "votes": votes}
            features.append([signals.get(name, 0.0) for name in SIGNALS])
            right.append(one.right)
    if not right or min(right) == max(right):
        return None
    values, labels = np.array(features), np.array(right)
    scale = values.std(axis=0)
    used = scale > 1e-9  # a signal that the judge lacks is always 0
    mean = values.mean(axis=0)
    solution = _logistic((values[:, used] - mean[used]) / scale[used], labels)
    weights = np.zeros(len(SIGNALS))
    weights[used] = solution[1:] / scale[used]
    bias = float(solution[0] - weights @ mean)
    return RankWeights(**dict(zip(SIGNALS, weights.tolist(), strict=True)), bias=bias)


def _logistic(values: Floats, labels: Floats) -> Floats:
    """Ridge logistic regression by Newton's method: values `[N, k]`, labels `[N]` -> bias and weights `[1 + k]`."""
    design = np.column_stack([np.ones(len(values)), values])
    ridge = np.diag([1e-9, *[_RIDGE] * values.shape[1]])
    solution = np.zeros(design.shape[1])
    for _ in range(_STEPS):
        p = 1 / (1 + np.exp(-np.clip(design @ solution, -30, 30)))
        gradient = design.T @ (labels - p) - ridge @ solution
        step = np.linalg.solve((design.T * (p * (1 - p) + 1e-9)) @ design + ridge, gradient)
        solution += step * min(1.0, 5.0 / max(1e-9, float(np.abs(step).max())))
        if np.abs(step).max() < 1e-8:
            break
    return solution


def _first(question: RankedQuestion, n: int) -> list[tuple[DrawnText, float]]:
    """The candidates among the first n samples, each with the logarithm of its share of them."""
    counts = [sum(draw < n for draw in one.draws) for one in question.drawn]
    return [(one, math.log(count / n)) for one, count in zip(question.drawn, counts, strict=True) if count]


def _winner(question: RankedQuestion, n: int, weights: RankWeights) -> tuple[float, ...]:
    """Counts of the candidate with the highest score; of equal ones the first drawn."""
    candidates = _first(question, n)
    if not candidates:
        return question.none
    scores = [weights.score({**one.signals, "votes": votes}) for one, votes in candidates]
    best = max(range(len(scores)), key=lambda i: (scores[i], -min(candidates[i][0].draws)))
    return candidates[best][0].counts


def _fold_weights(questions: Sequence[RankedQuestion], n: int) -> list[RankWeights | None]:
    """For each half of the images, weights that are fitted on the other half."""
    return [fit_weights([each for each in questions if _fold(each.image) != fold], n) for fold in (0, 1)]


def _fold(image: str) -> int:
    return int(generator(0, "fold", image).integers(2))


def _has(name: str, question: RankedQuestion) -> bool:
    return any(name in one.signals for one in question.drawn)
