"""Answers by sample and rank as part of the VQA evaluation: does ranking help, by which signal, with how many samples?

The weights of the signals are fitted here, on the questions of one half of the images for those of the other half; what
goes into weights.json is fitted on all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import NamedTuple

import numpy as np

from sightloop.data.rng import generator
from sightloop.evaluation.results import MetricTable
from sightloop.metrics import exact_match
from sightloop.ranking.options import ABSTENTION, SIGNALS, RankWeights
from sightloop.types import Floats, JsonDict, JsonMapping

_SIZES = (1, 4, 16, 64)
_FITTED = "fitted weights"
_RIDGE = 1e-2  # on weights of standardized signals, in questions
_STEPS = 50  # of Newton's method, which needs about ten


class DrawnAnswer(NamedTuple):
    """A distinct answer of a question.

    Attributes:
        text: what was said.
        draws: which samples said so.
        signals: of the candidate, without votes.
        right: whether it equals an answer of people.
    """

    text: str
    draws: tuple[int, ...]
    signals: Mapping[str, float]
    right: float


class RankedQuestion(NamedTuple):
    """A question with its candidates; `greedy`: whether the answer of greedy search is right."""

    row_key: str
    image: str
    drawn: list[DrawnAnswer]
    greedy: float


def as_record(candidates: Sequence[JsonMapping]) -> list[JsonDict]:
    """Candidates as a line of the predictions keeps them."""
    kept = ("text", "draws", "signals", "dropped")
    return [{name: candidate[name] for name in kept} for candidate in candidates]


def ranked_question(
    row_key: str, image: str, record: Sequence[JsonMapping], answers: Sequence[str], greedy: float
) -> RankedQuestion:
    """A question from a line of the predictions; dropped candidates are left out.

    Args:
        row_key: of the question.
        image: key of its image.
        record: as of `as_record`.
        answers: of people.
        greedy: whether the answer of greedy search is right.
    """
    drawn = [
        DrawnAnswer(
            str(one["text"]),
            tuple(one["draws"]),
            {name: float(value) for name, value in one["signals"].items() if name != "votes"},
            exact_match([str(one["text"])], [list(answers)]),
        )
        for one in record
        if not one["dropped"]
    ]
    return RankedQuestion(row_key, image, drawn, greedy)


def ranking_metrics(questions: Sequence[RankedQuestion], samples: int) -> tuple[list[MetricTable], JsonDict]:
    """The table that says whether ranking helps, and the weights to rank with.

    Args:
        questions: all of them.
        samples: how many answers were drawn.

    Returns:
        Exact match for each number of samples and each signal alone, and with fitted weights; the gain over greedy
        search, question by question. The weights as JSON values; {} where every candidate is right or every one wrong.
    """
    row_keys = [question.row_key for question in questions]
    sizes = sorted({n for n in _SIZES if n < samples} | {samples})
    signals = [name for name in SIGNALS if name == "votes" or any(_has(name, each) for each in questions)]
    tables: list[MetricTable] = []
    for n in sizes:
        folds = _fold_weights(questions, n)
        for name in [*signals, _FITTED] if n > 1 else signals[:1]:
            weights = [
                RankWeights(**{other: float(other == name) for other in SIGNALS})
                if name != _FITTED
                else folds[_fold(each.image)]
                for each in questions
            ]
            if any(each is None for each in weights):
                continue
            rows = np.array(
                [_winner(each, n, own).right for each, own in zip(questions, weights, strict=True) if own]
            )
            label = f"{n} samples by {name}" if n > 1 else "1 sample"
            protocol = "exact match of the answer kept of those drawn (top-k 40)"
            tables.append(MetricTable(f"exact match[{label}]", protocol, "questions", row_keys, rows))
            if n == samples:
                gain = rows - np.array([each.greedy for each in questions])
                name_of_gain = f"gain over greedy search[{label}]"
                tables.append(
                    MetricTable(
                        name_of_gain, f"{protocol} less that of greedy search", "questions", row_keys, gain
                    )
                )
    final = fit_weights(questions, samples)
    return tables, {} if final is None else asdict(final)


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


def _first(question: RankedQuestion, n: int) -> list[tuple[DrawnAnswer, float]]:
    """The candidates among the first n samples, each with the logarithm of its share of them."""
    counts = [sum(draw < n for draw in one.draws) for one in question.drawn]
    return [(one, math.log(count / n)) for one, count in zip(question.drawn, counts, strict=True) if count]


def _winner(question: RankedQuestion, n: int, weights: RankWeights) -> DrawnAnswer:
    """The candidate with the highest score; the first drawn of equal ones."""
    candidates = _first(question, n)
    if not candidates:
        return DrawnAnswer(ABSTENTION, (), {}, 0.0)
    scores = [weights.score({**one.signals, "votes": votes}) for one, votes in candidates]
    best = max(range(len(scores)), key=lambda i: (scores[i], -min(candidates[i][0].draws)))
    return candidates[best][0]


def _fold_weights(questions: Sequence[RankedQuestion], n: int) -> list[RankWeights | None]:
    """For each half of the images, weights that are fitted on the other half."""
    return [fit_weights([each for each in questions if _fold(each.image) != fold], n) for fold in (0, 1)]


def _fold(image: str) -> int:
    return int(generator(0, "fold", image).integers(2))


def _has(name: str, question: RankedQuestion) -> bool:
    return any(name in one.signals for one in question.drawn)
