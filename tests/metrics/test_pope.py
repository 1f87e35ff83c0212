"""POPE's rule for answers and its metrics against a few-line reference."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from sightloop.errors import UsageError
from sightloop.metrics import pope_metrics, pope_question, pope_scores, says_yes

WORDS = [
    "yes",
    "no",
    "No",
    "NO",
    "not",
    "there",
    "is",
    "a",
    "dog",
    "no,",
    "not.",
    ".",
    "nothing",
    "",
    "\n",
    "none",
]


def reference(answers: list[str], truths: list[bool]) -> dict[str, float]:
    said = []
    for answer in answers:
        sentence = answer[: answer.find(".")] if "." in answer else answer
        words = sentence.replace(",", "").split(" ")
        said.append(not ("No" in words or "not" in words or "no" in words))
    pairs = list(zip(said, truths, strict=True))
    hits, alarms = pairs.count((True, True)), pairs.count((True, False))
    misses, rejections = pairs.count((False, True)), pairs.count((False, False))
    precision = hits / (hits + alarms) if hits + alarms else math.nan
    recall = hits / (hits + misses) if hits + misses else math.nan
    both = hits + (alarms + misses) / 2
    return {
        "accuracy": (hits + rejections) / len(pairs),
        "precision": precision,
        "recall": recall,
        "F1": hits / both if both else math.nan,
        "yes ratio": (hits + alarms) / len(pairs),
    }


def test_thousand_random_sets_of_answers_equal_the_reference() -> None:
    draw = random.Random(0)
    for case in range(1000):
        count = draw.randint(1, 12)
        answers = [" ".join(draw.choices(WORDS, k=draw.randint(0, 5))) for _ in range(count)]
        truths = [draw.random() < (0.5, 0.0, 1.0)[case % 3] for _ in range(count)]
        assert pope_scores(answers, truths) == pytest.approx(
            reference(answers, truths), abs=1e-12, nan_ok=True
        )


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("no", False),
        ("No, there is no dog.", False),
        ("there is not", False),
        ("Yes, there is. It is not small.", True),
        ("nothing", True),
        ("", True),
        ("NO", True),  # as in POPE's code
    ],
)
def test_answers(answer: str, yes: bool) -> None:
    assert says_yes(answer) is yes


def test_questions() -> None:
    assert pope_question("dog") == "Is there a dog in the image?"
    assert pope_question("apple") == "Is there an apple in the image?"


def test_shares_give_the_metrics_of_counts() -> None:
    counts = np.array([[3.0, 1, 2, 4], [0, 0, 5, 5]])
    for name, values in pope_metrics(counts).items():
        assert pope_metrics(counts / 10)[name] == pytest.approx(values, nan_ok=True), name
    assert pope_metrics(counts)["F1"].tolist() == [6 / 9, 0]


def test_wrong_arguments_raise() -> None:
    with pytest.raises(UsageError, match="at least one"):
        pope_scores([], [])
    with pytest.raises(UsageError, match="2 answers but 1 truths"):
        pope_scores(["a", "b"], [True])
