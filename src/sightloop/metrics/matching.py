"""How well a score tells matches from others: curves, calibration, a threshold and what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sightloop.errors import UsageError
from sightloop.types import Floats

_BINS = 15  # of the calibration error, as Guo et al. 2017
_COLDEST, _HOTTEST = 1e-3, 1e3  # temperatures that a fit may give


@dataclass(frozen=True, slots=True)
class MatchingCurves:
    """One point a threshold, from "nothing is a match" (threshold inf) to "everything is"; float64 [P].

    recall is also the true positive rate; precision is 1 at the first point.
    """

    thresholds: Floats
    false_positive_rate: Floats
    recall: Floats
    precision: Floats


def matching_scores(
    scores: Any,
    labels: Any,
    threshold: float | None = None,
    false_match_cost: float = 1.0,
    missed_match_cost: float = 1.0,
    logits: bool = False,
) -> dict[str, float]:
    """What a score of pairs is worth; scores: [N], higher for a match; labels: [N], 1 or true for a match.

    `roc_auc` counts ties as half; `average_precision` is the sum of precision x gain in recall over thresholds (ties
    enter together); `accuracy` at `threshold` (default 0.5, for logits 0; a score equal to it is a match).

    `recommended_threshold` has the least cost, `false_match_cost` for each pair wrongly taken and `missed_match_cost`
    for each match lost; of thresholds of equal cost, the middle of the widest gap between scores. What it costs:
    `false_match_rate` of the others, `missed_match_rate` of the matches, `accuracy_at_recommended`, and
    `cost_at_recommended` a pair.

    Where scores are probabilities (all within 0..1) or logits: `ece`, the expected calibration error (15 bins of equal
    width; Guo et al. 2017) of the probability of a match; `temperature`, which divides the logits so that the log loss
    is least (1: calibrated, above: scores are too sure); `ece_calibrated`, the error with it, on the same pairs. Other
    scores (cosines) have none of these three.

    Raises UsageError where shapes differ, a score is no finite number, or labels are not 0 and 1, both of them there.
    """
    values, match = _checked(scores, labels)
    limit = (0.0 if logits else 0.5) if threshold is None else threshold
    curves = matching_curves(values, match)
    result = {
        "roc_auc": roc_area(curves),
        "average_precision": float((np.diff(curves.recall) * curves.precision[1:]).sum()),
        "accuracy": float(((values >= limit) == match).mean()),
    }
    result |= _recommended(curves, match, false_match_cost, missed_match_cost)
    if logits or (values.min() >= 0 and values.max() <= 1):
        odds = values if logits else _odds(values)
        temperature = fitted_temperature(odds, match)
        result["ece"] = calibration_error(_probability(odds) if logits else values, match)
        result["temperature"] = temperature
        result["ece_calibrated"] = calibration_error(_probability(odds / temperature), match)
    return result


def matching_curves(scores: Any, labels: Any) -> MatchingCurves:
    """The ROC and precision-recall curves, a point for every different score."""
    values, match = _checked(scores, labels)
    order = np.argsort(-values, kind="stable")
    ranked, hits = values[order], match[order]
    last = np.append(
        np.flatnonzero(np.diff(ranked)), len(ranked) - 1
    )  # the last of every run of equal scores
    taken = last + 1
    true = np.cumsum(hits)[last]
    return MatchingCurves(
        np.append(np.inf, ranked[last]),
        np.append(0.0, (taken - true) / (~match).sum()),
        np.append(0.0, true / match.sum()),
        np.append(1.0, true / taken),
    )


def roc_area(curves: MatchingCurves) -> float:
    """The area under recall over the false positive rate: how often a match scores higher than what is none."""
    heights = (curves.recall[1:] + curves.recall[:-1]) / 2
    return float((np.diff(curves.false_positive_rate) * heights).sum())


def balanced_threshold(scores: Any, labels: Any) -> float:
    """The score from which on as large a share of the matches is taken as is left of the others (equal error rates).

    Of the thresholds that come nearest to that, the first from above, in the middle of the gap between two scores.
    """
    curves = matching_curves(scores, labels)
    lean = np.abs(
        curves.recall + curves.false_positive_rate - 1
    )  # 1 where nothing is taken, and where all is
    best = 1 + int(np.argmin(lean[1:]))
    return float(curves.thresholds[best : best + 2].mean())


def calibration_error(probabilities: Any, labels: Any) -> float:
    """Expected calibration error: |mean probability - share of matches| of 15 equal bins of 0..1, weighted by size."""
    values, match = np.asarray(probabilities, np.float64), np.asarray(labels, bool)
    bins = np.minimum((values * _BINS).astype(np.int64), _BINS - 1)
    gap = np.bincount(bins, values - match, _BINS)
    return float(np.abs(gap).sum() / len(values))


def fitted_temperature(logits: Any, labels: Any) -> float:
    """The temperature T (0.001..1000) for which sigmoid(logits / T) has the least log loss.

    The loss is convex in 1 / T, so the place where its slope changes sign is found by halving.
    """
    values, match = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    low, high = np.log(1 / _HOTTEST), np.log(1 / _COLDEST)
    for _ in range(60):
        middle = (low + high) / 2
        slope = (values * (_probability(values * np.exp(middle)) - match)).sum()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return float(np.exp(-(low + high) / 2))


def _checked(scores: Any, labels: Any) -> tuple[Floats, NDArray[np.bool_]]:
    values, given = np.asarray(scores, np.float64), np.asarray(labels)
    if values.ndim != 1 or values.shape != given.shape:
        raise UsageError(f"scores {values.shape} and labels {given.shape}: expected twice [N]")
    if not np.isfinite(values).all():
        raise UsageError("scores: some are no finite numbers")
    match = given == 1
    if not ((given == 0) | match).all():
        raise UsageError("labels: expected 1 (a match) or 0 (none) for every pair")
    if match.all() or not match.any():
        raise UsageError("labels: need at least one match and one pair that is none")
    return values, match


def _recommended(
    curves: MatchingCurves, match: NDArray[np.bool_], false_match_cost: float, missed_match_cost: float
) -> dict[str, float]:
    matches, others = int(match.sum()), int((~match).sum())
    taken, lost = curves.false_positive_rate, 1 - curves.recall
    cost = (false_match_cost * taken * others + missed_match_cost * lost * matches) / len(match)
    # The threshold of a point may lie anywhere down to the next lower score; beyond the ends, there is no room.
    levels = curves.thresholds.copy()
    levels[0] = np.nextafter(levels[1], np.inf)
    room = np.append(levels[:-1] - levels[1:], 0.0)
    room[0] = 0.0
    near = np.isclose(cost, cost.min(), rtol=1e-12, atol=1e-15)
    best = int(np.argmax(np.where(near, room, -1.0)))
    threshold = levels[best] - room[best] / 2
    right = 1 - (taken[best] * others + lost[best] * matches) / len(match)
    return {
        "recommended_threshold": float(threshold),
        "false_match_rate": float(taken[best]),
        "missed_match_rate": float(lost[best]),
        "accuracy_at_recommended": float(right),
        "cost_at_recommended": float(cost[best]),
    }


def _odds(probabilities: Floats) -> Floats:
    # As far from 0 and 1 as float32, in which scores come, can tell.
    clipped = np.clip(probabilities, 1e-7, 1 - 1e-7)
    return np.log(clipped) - np.log1p(-clipped)


def _probability(logits: Floats) -> Floats:
    return 0.5 + 0.5 * np.tanh(0.5 * logits)
