"""POPE: does a model say yes to objects that are not there? (Li et al. 2023, "Evaluating Object Hallucination")."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sightloop.errors import UsageError
from sightloop.types import Floats

_NO = frozenset(("No", "not", "no"))
_VOWELS = "aeiou"


def pope_question(name: str) -> str:
    """The question for an object: "Is there a dog in the image?", "Is there an apple in the image?"."""
    return f"Is there {'an' if name[:1].lower() in _VOWELS else 'a'} {name} in the image?"


def says_yes(answer: str) -> bool:
    """Whether an answer counts as yes: unless "No", "not" or "no" is a word of its first sentence.

    As in POPE's code: the sentence ends at the first full stop, commas are dropped, words are what single spaces part.
    So "no, there is none" is no, and "NO", "No!" and "" are yes.
    """
    return _NO.isdisjoint(answer.split(".", 1)[0].replace(",", "").split(" "))


def pope_counts(answers: Sequence[str], truths: Sequence[bool]) -> Floats:
    """Outcomes of answers, float64 `[N, 4]`, one 1 a row: (hit, false alarm, miss, correct rejection)."""
    if len(answers) != len(truths):
        raise UsageError(f"{len(answers)} answers but {len(truths)} truths")
    counts = np.zeros((len(answers), 4))
    for row, answer, truth in zip(counts, answers, truths, strict=True):
        row[(0 if truth else 1) if says_yes(answer) else (2 if truth else 3)] = 1
    return counts


def pope_metrics(counts: Floats) -> dict[str, Floats]:
    """Metrics of outcomes.

    Args:
        counts: `[R, 4]`: how many, or what share, are hits, false alarms, misses and correct rejections.

    Returns:
        `accuracy`, `precision` (of "yes"; NaN if it was never said), `recall` (NaN without a present object), `F1` and
        `yes ratio`, `[R]` each.
    """
    hit, alarm, miss, rejection = np.asarray(counts, np.float64).T
    total = hit + alarm + miss + rejection
    return {
        "accuracy": _share(hit + rejection, total),
        "precision": _share(hit, hit + alarm),
        "recall": _share(hit, hit + miss),
        "F1": _share(2 * hit, 2 * hit + alarm + miss),
        "yes ratio": _share(hit + alarm, total),
    }


def pope_scores(answers: Sequence[str], truths: Sequence[bool]) -> dict[str, float]:
    """Metrics of answers to "Is there a {} in the image?", see `pope_metrics`.

    Args:
        answers: N answers in the words of a model.
        truths: for each whether the object is there.

    Raises:
        UsageError: no answer, or lengths that differ.
    """
    if not len(answers):
        raise UsageError("answers: there is none; give at least one")
    counts = pope_counts(answers, truths).sum(0, keepdims=True)
    return {name: float(values[0]) for name, values in pope_metrics(counts).items()}


def _share(part: Floats, whole: Floats) -> Floats:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
