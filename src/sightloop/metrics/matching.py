"""Matching metrics: how well a score separates matching pairs from others; curves, calibration, thresholds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sightloop.errors import UsageError
from sightloop.types import Floats

_BINS = 15  # of the calibration error (Guo et al. 2017)
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 1e-3, 1e3


@dataclass(frozen=True, slots=True)
class MatchingCurves:
    """ROC and precision-recall curves: one point per threshold, P points, float64 `[P]` each.

    The first point takes no pair as a match (threshold inf), the last all of them.

    Attributes:
        thresholds: in descending order; a score equal to the threshold is taken as a match.
        false_positive_rate: share of the other pairs that are taken as matches.
        recall: share of the matches that are taken, the true positive rate.
        precision: share of matches among the pairs taken; 1 at the first point.
    """

    thresholds: Floats
    false_positive_rate: Floats
    recall: Floats
    precision: Floats


def matching_scores(
    scores: ArrayLike,
    labels: ArrayLike,
    threshold: float | None = None,
    false_match_cost: float = 1.0,
    missed_match_cost: float = 1.0,
    logits: bool = False,
) -> dict[str, float]:
    """Metrics of a score of pairs.

    Args:
        scores: `[N]`, higher for a match: probabilities, logits or cosines.
        labels: `[N]`, 1 or True for a match, 0 or False for another pair.
        threshold: of `accuracy`; a score equal to it is a match. Default 0.5, for logits 0.
        false_match_cost: cost of another pair taken as a match.
        missed_match_cost: cost of a match that is not taken.
        logits: scores are logits of the probability of a match.

    Returns:
        `roc_auc`: area under the ROC curve; ties count half.
        `average_precision`: sum of precision x gain in recall over thresholds; ties enter together.
        `accuracy`: share of pairs on the right side of `threshold`.
        `recommended_threshold`: the one with the least cost; of equal ones the middle of the widest gap between scores.
        `false_match_rate`, `missed_match_rate`, `accuracy_at_recommended`, `cost_at_recommended` (per pair): there.
        For probabilities (all scores within 0..1) and logits also
        `ece`: expected calibration error, 15 bins of equal width (Guo et al. 2017);
        `temperature`: divisor of the logits with the least log loss; 1: calibrated, above 1: overconfident;
        `ece_calibrated`: the calibration error with that temperature, on the same pairs.

    Raises:
        UsageError: shapes that differ, scores that are not finite, labels other than 0 and 1, or only one of them.
    """
    values, is_match = _checked(scores, labels)
    limit = (0.0 if logits else 0.5) if threshold is None else threshold
    curves = matching_curves(values, is_match)
    result = {
        "roc_auc": roc_auc(curves),
        "average_precision": float((np.diff(curves.recall) * curves.precision[1:]).sum()),
        "accuracy": float(((values >= limit) == is_match).mean()),
    }
    result |= _recommended(curves, is_match, false_match_cost, missed_match_cost)
    if logits or (values.min() >= 0 and values.max() <= 1):
        pair_logits = values if logits else _logit(values)
        temperature = fit_temperature(pair_logits, is_match)
        result["ece"] = calibration_error(_sigmoid(pair_logits) if logits else values, is_match)
        result["temperature"] = temperature
        result["ece_calibrated"] = calibration_error(_sigmoid(pair_logits / temperature), is_match)
    return result


def matching_curves(scores: ArrayLike, labels: ArrayLike) -> MatchingCurves:
    """ROC and precision-recall curves of scores `[N]` and labels `[N]`, a point for every different score.

    Scores 0.9, 0.5, 0.5, 0.1 with labels 1, 0, 1, 0 have the points

        threshold   inf   0.9   0.5   0.1
        taken         0     1     3     4
        recall        0   1/2     1     1
        precision     1     1   2/3   1/2
    """
    values, is_match = _checked(scores, labels)
    order = np.argsort(-values, kind="stable")
    ranked, hits = values[order], is_match[order]
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # end of every run of equal scores
    taken = last + 1
    true = np.cumsum(hits)[last]
    return MatchingCurves(
        np.append(np.inf, ranked[last]),
        np.append(0.0, (taken - true) / (~is_match).sum()),
        np.append(0.0, true / is_match.sum()),
        np.append(1.0, true / taken),
    )


def roc_auc(curves: MatchingCurves) -> float:
    """Area under the ROC curve: the probability that a match scores higher than another pair, ties counted half."""
    heights = (curves.recall[1:] + curves.recall[:-1]) / 2
    return float((np.diff(curves.false_positive_rate) * heights).sum())


def equal_error_threshold(scores: ArrayLike, labels: ArrayLike) -> float:
    """Threshold at the equal error rate: the false positive rate is as near as possible to the false negative rate.

    Of several such thresholds the highest, in the middle of the gap between two scores.

    Args:
        scores: `[N]`, higher for a match.
        labels: `[N]`, 1 for a match, 0 for another pair.
    """
    curves = matching_curves(scores, labels)
    # |false positive rate - false negative rate|: 1 where nothing is taken, and where all is
    gap = np.abs(curves.recall + curves.false_positive_rate - 1)
    best = 1 + int(np.argmin(gap[1:]))
    return float(curves.thresholds[best : best + 2].mean())


def calibration_error(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Expected calibration error (Guo et al. 2017): |mean probability - share of matches| over 15 equal bins of 0..1.

    Bins are weighted by their number of pairs.

    Args:
        probabilities: `[N]`, 0..1, of a match.
        labels: `[N]`, 1 for a match, 0 for another pair.
    """
    values, is_match = np.asarray(probabilities, np.float64), np.asarray(labels, bool)
    bins = np.minimum((values * _BINS).astype(np.int64), _BINS - 1)
    gap = np.bincount(bins, values - is_match, _BINS)  # [bins], sum of (probability - label)
    return float(np.abs(gap).sum() / len(values))


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """The temperature T in 0.001..1000 for which sigmoid(logits / T) has the least log loss.

    The loss is convex in 1 / T, so the sign change of its slope is found by bisection of log(1 / T).

    Args:
        logits: `[N]`.
        labels: `[N]`, 1 for a match, 0 for another pair.
    """
    values, target = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    low, high = np.log(1 / _MAX_TEMPERATURE), np.log(1 / _MIN_TEMPERATURE)
    for _ in range(60):
        middle = (low + high) / 2
        slope = (values * (_sigmoid(values * np.exp(middle)) - target)).sum()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return float(np.exp(-(low + high) / 2))


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    """scores as float64 `[N]` and labels as bool `[N]`."""
    values, targets = np.asarray(scores, np.float64), np.asarray(labels)
    if values.ndim != 1 or values.shape != targets.shape:
        raise UsageError(f"scores {values.shape} and labels {targets.shape}: expected twice [N]")
    if not np.isfinite(values).all():
        raise UsageError("scores: some are not finite")
    is_match = targets == 1
    if not ((targets == 0) | is_match).all():
        raise UsageError("labels: expected 1 (a match) or 0 (another pair) for every pair")
    if is_match.all() or not is_match.any():
        raise UsageError("labels: need at least one match and one other pair")
    return values, is_match


def _recommended(
    curves: MatchingCurves, is_match: NDArray[np.bool_], false_match_cost: float, missed_match_cost: float
) -> dict[str, float]:
    """The threshold of least cost, and the rates, accuracy and cost there."""
    matches, others = int(is_match.sum()), int((~is_match).sum())
    false_rate, missed_rate = curves.false_positive_rate, 1 - curves.recall  # [P]
    cost = (false_match_cost * false_rate * others + missed_match_cost * missed_rate * matches) / len(
        is_match
    )
    # The threshold of a point may be anywhere down to the next lower score: gap is how far. Above the highest and below
    # the lowest score there is no gap. Scores 0.9, 0.5, 0.1: levels 0.9+, 0.9, 0.5, 0.1, gaps 0, 0.4, 0.4, 0.
    levels = curves.thresholds.copy()
    levels[0] = np.nextafter(levels[1], np.inf)
    gap = np.append(levels[:-1] - levels[1:], 0.0)
    gap[0] = 0.0
    cheapest = np.isclose(cost, cost.min(), rtol=1e-12, atol=1e-15)
    best = int(np.argmax(np.where(cheapest, gap, -1.0)))
    threshold = levels[best] - gap[best] / 2
    accuracy = 1 - (false_rate[best] * others + missed_rate[best] * matches) / len(is_match)
    return {
        "recommended_threshold": float(threshold),
        "false_match_rate": float(false_rate[best]),
        "missed_match_rate": float(missed_rate[best]),
        "accuracy_at_recommended": float(accuracy),
        "cost_at_recommended": float(cost[best]),
    }


def _logit(probabilities: Floats) -> Floats:
    # As far from 0 and 1 as float32, in which scores come, can represent.
    clipped = np.clip(probabilities, 1e-7, 1 - 1e-7)
    return np.log(clipped) - np.log1p(-clipped)


def _sigmoid(logits: Floats) -> Floats:
    return 0.5 + 0.5 * np.tanh(0.5 * logits)
