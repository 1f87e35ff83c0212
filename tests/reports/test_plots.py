"""Plots: everything lies inside the drawing, ticks are round, axes and chance level are labelled."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightloop.reports.plots import HEIGHT, WIDTH, Histogram, LinePlot, histogram, line_plot, ticks
from tests.reports.test_html import Page

NUMBERS = st.floats(-1e12, 1e12, allow_nan=False) | st.sampled_from([0.0, 1.0, 1e-12, -1e-12, 1e30])


def positions(page: Page) -> list[tuple[float, float]]:
    """Pixels of lines, dots and labels."""
    points: list[tuple[float, float]] = []
    for tag, attributes in page.tags:
        if tag == "polyline":
            points += [tuple(map(float, pair.split(","))) for pair in (attributes["points"] or "").split()]  # type: ignore[misc]
        if tag in ("text", "rect"):
            points.append((float(attributes["x"] or 0), float(attributes["y"] or 0)))
        if tag == "rect":
            left, top, width, height = (
                float(attributes[name] or 0) for name in ("x", "y", "width", "height")
            )
            points.append((left + width, top + height))
    return points


@given(st.lists(NUMBERS, min_size=1, max_size=300), NUMBERS | st.none(), st.integers(0, 10**9))
def test_a_curve_stays_inside(values: list[float], chance: float | None, start: int) -> None:
    points = [(float(start + i), value) for i, value in enumerate(values)]
    page = Page(line_plot(LinePlot("title", "step", "loss (nats)", points, chance=chance)))
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in positions(page))
    assert "step" in page.text
    assert "loss (nats)" in page.text
    assert ("chance" in page.text) == (chance is not None)
    assert not re.search(r"nan|inf", page.text)


@given(NUMBERS, st.floats(1e-6, 1e12))
def test_ticks_are_few_and_inside(low: float, width: float) -> None:
    high = low + width
    if high - low < 1e-6 * max(abs(low), abs(high)):
        return
    found = ticks(low, high)
    assert 2 <= len(found) <= 8
    assert all(low - 1e-6 * width <= tick <= high + 1e-6 * width for tick in found)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ((0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ((0, 100), [0, 20, 40, 60, 80, 100]),
        ((1, 3000), [500, 1000, 1500, 2000, 2500, 3000]),
    ],
)
def test_ticks_are_round(ends: tuple[float, float], expected: list[float]) -> None:
    assert ticks(*ends) == pytest.approx(expected)


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=30), st.floats(0, 1))
def test_bars_stay_inside_and_follow_the_threshold(counts: list[int], threshold: float) -> None:
    drawing = histogram(Histogram("web texts", "ITM probability", "texts", counts, threshold))
    if not any(counts):
        assert drawing == ""
        return
    page = Page(drawing)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in positions(page))
    kinds = [attributes["class"] for tag, attributes in page.tags if tag == "rect"]
    assert kinds == ["good" if (i + 0.5) / len(counts) >= threshold else "bad" for i in range(len(counts))]
    assert "threshold" in page.text
    assert "ITM probability" in page.text


def test_an_roc_curve_has_the_diagonal() -> None:
    points = [(0.0, 0.0), (0.5, 0.8), (1.0, 1.0)]
    axes = {"x_range": (0.0, 1.0), "y_range": (0.0, 1.0)}
    page = Page(
        line_plot(LinePlot("ROC", "false positive rate", "true positive rate", points, diagonal=True, **axes))
    )
    assert page.text.count("chance") == 1
    assert "0.2" in page.text
