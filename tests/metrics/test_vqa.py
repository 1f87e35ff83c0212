"""VQA accuracy: equal to the official script's. vqa_answers.json holds drawn answers as that script normalised them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightloop import UsageError
from sightloop.metrics import vqa
from sightloop.metrics.vqa import (
    exact_match,
    normalize_answer,
    vqa_accuracies,
    vqa_accuracy,
    wups,
    wups_not_computed,
)

KNOWN: list[tuple[str, str]] = json.loads(Path(__file__).with_name("vqa_answers.json").read_text("utf-8"))


def test_answers_are_normalised_as_officially() -> None:
    assert [(text, normalize_answer(text)) for text, _ in KNOWN] == [
        (text, expected) for text, expected in KNOWN
    ]


def slow_accuracy(prediction: str, answers: list[str]) -> float:
    """The definition, word for word: leave one answer out, compare with the rest, mean."""
    answers = [answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers]
    prediction = prediction.replace("\n", " ").replace("\t", " ").strip()
    if len(set(answers)) > 1:
        answers, prediction = [normalize_answer(answer) for answer in answers], normalize_answer(prediction)
    scores = []
    for left_out in range(len(answers)):
        rest = answers[:left_out] + answers[left_out + 1 :]
        scores.append(min(1, sum(answer == prediction for answer in rest) / 3))
    return sum(scores) / len(scores)


@given(st.lists(st.sampled_from(KNOWN[:20] + KNOWN[-10:]), min_size=2, max_size=5), st.data())
def test_accuracy_is_the_definition(pool: list[tuple[str, str]], data: st.DataObject) -> None:
    texts = [text for pair in pool for text in pair]
    questions = [
        (
            data.draw(st.sampled_from(texts)),
            data.draw(st.lists(st.sampled_from(texts), min_size=1, max_size=10)),
        )
        for _ in range(3)
    ]
    expected = [slow_accuracy(*question) for question in questions]
    predictions, answers = [p for p, _ in questions], [a for _, a in questions]
    np.testing.assert_allclose(vqa_accuracies(predictions, answers), expected, rtol=1e-12)
    assert vqa_accuracy(predictions, answers)["accuracy"] == pytest.approx(np.mean(expected))


@pytest.mark.parametrize(("matches", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_matches_of_ten(matches: int, expected: float) -> None:
    answers = ["yes"] * matches + [f"no{i}" for i in range(10 - matches)]
    assert vqa_accuracy(["yes"], [answers])["accuracy"] == pytest.approx(expected)


def test_nothing_is_normalized_where_all_agree() -> None:
    assert vqa_accuracy(["a dog"], [["dog"] * 10])["accuracy"] == 0
    assert vqa_accuracy(["a dog"], [["dog"] * 9 + ["cat"]])["accuracy"] == 1


def test_accuracy_of_every_question_type() -> None:
    predictions = {"q1": "yes", "q2": "2", "q3": "no"}
    answers = {"q3": ["yes", "no"], "q1": ["yes"] * 10, "q2": ["two", "two", "two", "2", "x"]}
    scores = vqa_accuracy(predictions, answers, {"q1": "binary", "q2": "number", "q3": "binary"})
    binary = (1 + (1 / 3) / 2) / 2
    assert scores["accuracy[binary]"] == pytest.approx(binary)
    assert scores["accuracy[number]"] == pytest.approx(1)
    assert scores["overall"] == round(100 * (2 * binary + 1) / 3, 2)
    with pytest.raises(UsageError, match="question type"):
        vqa_accuracy(predictions, answers, {"q1": "binary"})
    with pytest.raises(UsageError, match="3 samples but 1"):
        vqa_accuracy(predictions, answers, ["binary"])


def test_exact_match() -> None:
    assert exact_match(["The dog.", "two", "x"], [["dog"], ["3", "2"], ["y"]]) == pytest.approx(2 / 3)


def near(one: str, other: str) -> float:
    return {("cat", "dog"): 0.92, ("car", "cat"): 0.5}.get((min(one, other), max(one, other)), 0.0)


@pytest.mark.parametrize(
    ("prediction", "answer", "threshold", "expected"),
    [
        ("cat", "cat", 0.9, 1.0),
        ("Cat", " cat ", 0.9, 1.0),
        ("cat", "dog", 0.9, 0.92),
        ("cat", "car", 0.9, 0.05),
        ("cat", "car", 0.0, 0.5),
        ("cat, dog", "dog, cat", 0.9, 1.0),
        ("cat", "cat, dog", 0.9, 0.92),
        ("cat, car", "cat", 0.0, 0.5),
    ],
)
def test_wups(prediction: str, answer: str, threshold: float, expected: float) -> None:
    score = wups([prediction], [[answer]], threshold, similarity=near)
    assert score == pytest.approx(expected)
    assert wups([prediction], [["zzz", answer]], threshold, similarity=near) == pytest.approx(expected)


class _NoWordNet:
    def ensure_loaded(self) -> None:
        raise LookupError


def test_wups_without_wordnet_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vqa, "_wordnet", _NoWordNet)
    assert "nltk.downloader wordnet" in (wups_not_computed() or "")
    with pytest.raises(UsageError, match="WordNet is not installed"):
        wups(["cat"], [["dog"]])

    def absent() -> Any:
        raise ImportError

    monkeypatch.setattr(vqa, "_wordnet", absent)
    assert ".[evaluate]" in (wups_not_computed() or "")


def test_words_are_as_near_as_wordnet_says() -> None:
    if reason := wups_not_computed():
        pytest.skip(reason)
    assert wups(["dog"], [["cat"]], threshold=0) == pytest.approx(0.857, abs=0.01)
