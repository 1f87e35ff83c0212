"""Weights of the signals of which a no-match score is made, learned from an index's own captions.

Which signal tells a text whose image is there from one whose image is not depends on the model: the best normalized
cosine where it is sharp, the mean of the five best where it is not, and both stand out less for a text that resembles
every image. So a logistic regression learns their weights from the background texts, with their own images (present)
and without (absent). It is kept only if it ranks texts that it has not seen better than the plain score does.

The null must not be scored by weights that were fitted to it: each fifth of the texts is scored by the weights of the
other four.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np

from sightloop.types import Floats, Integers

ScoreKind: TypeAlias = Literal["itm", "itc"]

ITC_SIGNALS: Final = ("best", "best five", "mean", "spread")
ITM_SIGNALS: Final = ("best five judged", "best judged", *ITC_SIGNALS)
# The signal that is the score where nothing was learned.
_PLAIN: Final[dict[ScoreKind, int]] = {"itc": 1, "itm": 0}
NOTHING: Final = -1e9  # score of a text for which there is no image

_MIN_TEXTS = 100
_FOLDS = 5
_RIDGE = 10.0
_STEPS = 25


@dataclass(frozen=True, slots=True, eq=False)
class ScoreWeights:
    """Weights of the signals.

    Args:
        values: of each signal, float64 `[s]`.
        bias: added.
    """

    values: Floats
    bias: float = 0.0

    @classmethod
    def plain(cls, kind: ScoreKind) -> ScoreWeights:
        """Those of the score that needs no learning: the mean of the five best."""
        signals = ITM_SIGNALS if kind == "itm" else ITC_SIGNALS
        return cls((np.arange(len(signals)) == _PLAIN[kind]).astype(np.float64))

    def scores(self, signals: Floats) -> Floats:
        """Scores `[n]` of signals `[n, s]`; `NOTHING` where one is not finite."""
        is_known = np.atleast_1d(np.isfinite(signals).all(axis=1))
        return np.where(is_known, np.where(is_known[:, None], signals, 0) @ self.values + self.bias, NOTHING)


def area(present: Floats, absent: Floats) -> float:
    """Area under the ROC curve, of scores `[m]` and `[n]`: the probability that a present text scores higher."""
    order = np.sort(absent)
    below = np.searchsorted(order, present, "left") + np.searchsorted(order, present, "right")
    return float(below.mean() / 2 / len(absent))


def learn_scores(kind: ScoreKind, absent: Floats, present: Floats) -> tuple[ScoreWeights, Floats, Floats]:
    """Weights, and the scores of the texts that they were learned from, each by weights that have not seen it.

    Args:
        kind: of the score.
        absent: signals of m texts without their own images, `[m, s]`.
        present: signals of the same texts with them, `[m, s]`; `[0, s]` where they have none: nothing is learned.

    Returns:
        Weights, scores of absent `[m]`, scores of present `[m]` or `[0]`.
    """
    plain = ScoreWeights.plain(kind)
    scored = plain.scores(absent), plain.scores(present)
    if len(present) != len(absent) or len(present) < _MIN_TEXTS:
        return plain, *scored
    fold = np.arange(len(absent)) % _FOLDS
    learned = np.zeros(len(absent)), np.zeros(len(absent))
    for number in range(_FOLDS):
        weights = _fit(absent[fold != number], present[fold != number])
        for scores, signals in zip(learned, (absent, present), strict=True):
            scores[fold == number] = weights.scores(signals[fold == number])
    if area(learned[1], learned[0]) <= area(scored[1], scored[0]):
        return plain, *scored
    return _fit(absent, present), *learned


def _fit(absent: Floats, present: Floats) -> ScoreWeights:
    """Logistic regression by Newton's method, with a penalty on the weights of standardized signals."""
    signals = np.concatenate([absent, present])
    is_present: Integers = np.repeat([0, 1], [len(absent), len(present)])
    is_known = np.isfinite(signals).all(axis=1)
    signals, is_present = signals[is_known], is_present[is_known]
    if not len(signals):
        return ScoreWeights(np.zeros(absent.shape[1]))
    center, spread = signals.mean(axis=0), signals.std(axis=0) + 1e-9
    inputs = np.concatenate([(signals - center) / spread, np.ones((len(signals), 1))], axis=1)
    penalty = np.diag([_RIDGE] * signals.shape[1] + [1e-3])
    weights = np.zeros(inputs.shape[1])
    for _ in range(_STEPS):
        odds = (inputs @ weights).clip(-30, 30)
        share = 1 / (1 + np.exp(-odds))
        gradient = inputs.T @ (share - is_present) + penalty @ weights
        curvature = (inputs * (share * (1 - share))[:, None]).T @ inputs + penalty
        step = np.linalg.solve(curvature, gradient)
        weights -= step
        if np.abs(step).max() < 1e-8:
            break
    # Scaled so that absent texts score 0 with a spread of 1: those of different folds are compared with each other.
    values = weights[:-1] / spread
    scores = signals[is_present == 0] @ values
    unit = max(float(scores.std()), 1e-9)
    return ScoreWeights(values / unit, float(-scores.mean() / unit))
