"""Matching: curves, areas, calibration and thresholds equal to their definitions, counted out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sightloop import UsageError
from sightloop.metrics.matching import (
    calibration_error,
    equal_error_threshold,
    fit_temperature,
    matching_curves,
    matching_scores,
)

pairs = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 1)), min_size=2, max_size=30)


def drawn(values: list[tuple[int, int]]) -> tuple[list[float], list[int]]:
    labels = [label for _, label in values]
    assume(0 < sum(labels) < len(labels))
    return [value / 8 for value, _ in values], labels


@given(pairs)
def test_areas_are_their_definitions(values: list[tuple[int, int]]) -> None:
    scores, labels = drawn(values)
    result = matching_scores(scores, labels)
    wins = [
        (a > b) + (a == b) / 2
        for a, match in zip(scores, labels, strict=True)
        for b, other in zip(scores, labels, strict=True)
        if match and not other
    ]
    assert result["roc_auc"] == pytest.approx(np.mean(wins))
    precision, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        taken = [label for score, label in zip(scores, labels, strict=True) if score >= threshold]
        recall = sum(taken) / sum(labels)
        precision += (recall - before) * sum(taken) / len(taken)
        before = recall
    assert result["average_precision"] == pytest.approx(precision)
    right = [(score >= 0.5) == bool(label) for score, label in zip(scores, labels, strict=True)]
    assert result["accuracy"] == pytest.approx(np.mean(right))


@given(pairs, st.sampled_from([0.2, 1.0, 7.0]))
def test_no_threshold_costs_less_than_the_recommended(values: list[tuple[int, int]], price: float) -> None:
    scores, labels = drawn(values)
    result = matching_scores(scores, labels, false_match_cost=price, missed_match_cost=2)

    def cost(threshold: float) -> tuple[float, float, float]:
        false = sum(s >= threshold and not y for s, y in zip(scores, labels, strict=True))
        missed = sum(s < threshold and y for s, y in zip(scores, labels, strict=True))
        return (price * false + 2 * missed) / len(scores), false, missed

    least, false, missed = cost(result["recommended_threshold"])
    assert least == pytest.approx(result["cost_at_recommended"], abs=1e-12)
    assert least <= min(cost(t / 16)[0] for t in range(-1, 19)) + 1e-12
    assert result["missed_match_rate"] == pytest.approx(missed / sum(labels))
    assert result["false_match_rate"] == pytest.approx(false / (len(labels) - sum(labels)))
    assert result["accuracy_at_recommended"] == pytest.approx(1 - (false + missed) / len(labels))


@given(pairs)
def test_balanced_is_as_near_to_equal_shares_as_any_threshold(values: list[tuple[int, int]]) -> None:
    scores, labels = drawn(values)

    def lean(threshold: float) -> float:
        taken = [score >= threshold for score in scores]
        kept = np.mean([t for t, y in zip(taken, labels, strict=True) if y])
        dropped = np.mean([not t for t, y in zip(taken, labels, strict=True) if not y])
        return abs(float(kept - dropped))

    assert lean(equal_error_threshold(scores, labels)) == pytest.approx(
        min(lean(t / 16) for t in range(-1, 19)), abs=1e-12
    )


def test_the_threshold_lies_in_the_middle_of_the_widest_gap() -> None:
    assert matching_scores([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1])["recommended_threshold"] == pytest.approx(0.5)


def test_equal_error_threshold_is_the_middle_of_its_gap() -> None:
    assert equal_error_threshold([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1]) == pytest.approx(0.5)
    assert equal_error_threshold([0.5, 0.5], [0, 1]) == 0.5


def test_curves_begin_with_nothing_and_end_with_everything() -> None:
    curves = matching_curves([0.9, 0.5, 0.5, 0.1], [1, 0, 1, 0])
    assert curves.thresholds.tolist() == [np.inf, 0.9, 0.5, 0.1]
    assert curves.recall.tolist() == [0, 0.5, 1, 1]
    assert curves.false_positive_rate.tolist() == [0, 0, 0.5, 1]
    np.testing.assert_allclose(curves.precision, [1, 1, 2 / 3, 0.5])


def test_calibration_is_what_the_bins_say() -> None:
    probabilities = np.random.default_rng(0).random(500)
    labels = np.random.default_rng(1).random(500) < 0.3
    expected = 0.0
    for low in range(15):
        inside = (probabilities * 15 >= low) & (probabilities * 15 < low + 1)
        expected += inside.mean() * abs(probabilities[inside].mean() - labels[inside].mean())
    assert calibration_error(probabilities, labels) == pytest.approx(expected)
    assert calibration_error([1.0, 0.0], [1, 0]) == 0


@pytest.mark.parametrize("temperature", [0.25, 1.0, 6.0])
def test_the_temperature_is_found_again(temperature: float) -> None:
    random = np.random.default_rng(2)
    honest = random.normal(0, 2, 40_000)
    labels = random.random(len(honest)) < 1 / (1 + np.exp(-honest))
    fitted = fit_temperature(honest * temperature, labels)
    assert fitted == pytest.approx(temperature, rel=0.05)
    result = matching_scores(honest * temperature, labels, logits=True)
    assert result["temperature"] == fitted
    assert result["ece_calibrated"] < 0.02
    probabilities = 1 / (1 + np.exp(-honest))
    assert matching_scores(probabilities, labels)["temperature"] == pytest.approx(1, rel=0.05)


@given(pairs)
def test_no_temperature_has_less_loss(values: list[tuple[int, int]]) -> None:
    scores, labels = drawn(values)
    logits, y = np.array(scores) * 6 - 3, np.array(labels)
    best = fit_temperature(logits, y)

    def loss(temperature: float) -> float:
        return float(np.logaddexp(0, np.where(y == 1, -logits, logits) / temperature).sum())

    assert all(
        loss(best) <= loss(best * factor) + 1e-9 for factor in (0.9, 1.1) if 1e-3 < best * factor < 1e3
    )


def test_scores_that_are_no_probabilities_have_no_calibration() -> None:
    result = matching_scores([-0.2, 0.3, 0.1], [0, 1, 0])
    assert {"ece", "temperature", "ece_calibrated"}.isdisjoint(result)
    assert result["roc_auc"] == 1


@pytest.mark.parametrize(
    ("scores", "labels", "says"),
    [
        ([0.1], [0, 1], "expected twice"),
        ([0.1, np.nan], [0, 1], "finite"),
        ([0.1, 0.2], [0, 2], "labels"),
        ([0.1, 0.2], [1, 1], "at least one"),
    ],
)
def test_what_does_not_fit_is_said(scores: Any, labels: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        matching_scores(scores, labels)
