"""SVG plots with axes, ticks, units and reference lines: curves and histograms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from sightloop.reports.html import Html, element, format_number, join

# Pixels of the drawing and its margins; the browser scales it to the column.
WIDTH, HEIGHT = 380, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 22, 22, 40
_MAX_DOTS = 30  # points of a curve that are drawn as dots too
_MAX_HITS = 60  # points whose value is shown under the pointer


@dataclass(frozen=True, slots=True)
class LinePlot:
    """A curve.

    Attributes:
        title: Name above the plot.
        x_label: Name of the x axis, with its unit in parentheses if it has one.
        y_label: Name of the y axis, likewise.
        points: (x, y) in order of x, finite; at least one.
        value: Shown beside the title; "" for none.
        chance: y at chance level, drawn dashed; None for none.
        diagonal: Whether chance level is the line y = x (of an ROC curve).
        x_range: Ends of the x axis; None for those of the points.
        y_range: Ends of the y axis; None for those of the points, with a margin.
    """

    title: str
    x_label: str
    y_label: str
    points: Sequence[tuple[float, float]]
    value: str = ""
    chance: float | None = None
    diagonal: bool = False
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts in bins of equal width over 0..1.

    Attributes:
        title: Name above the plot.
        x_label: Name of the x axis.
        y_label: Name of the y axis: what is counted.
        counts: Of each bin.
        threshold: x at which a line is drawn; bars from it on are green, those below red.
    """

    title: str
    x_label: str
    y_label: str
    counts: Sequence[int]
    threshold: float


def plots(figures: Sequence[Html]) -> Html:
    """Plots in a grid of as many columns as there is room for; "" for none."""
    return element("div", *figures, class_="plots") if figures else Html("")


@dataclass(frozen=True, slots=True)
class _Axes:
    """Map from values to pixels."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        first, last = self.x_range
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * ((value - first) / (last - first) if last > first else 0.5)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return _TOP + (HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)

    def draw(self, x_label: str, y_label: str) -> Html:
        """Axis lines, ticks with their values, and labels."""
        bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
        parts: list[Html] = []
        for tick in ticks(*self.y_range):
            y = round(self.y(tick), 1)
            parts.append(element("path", d=f"M{_LEFT} {y}H{right}", class_="grid"))
            parts.append(element("text", _tick_text(tick), x=_LEFT - 6, y=y + 4, text_anchor="end"))
        first, last = self.x_range
        for tick in ticks(first, last) if last > first else [first]:
            x = round(self.x(tick), 1)
            parts.append(element("path", d=f"M{x} {bottom}v4", class_="axis"))
            parts.append(element("text", _tick_text(tick), x=x, y=bottom + 16, text_anchor="middle"))
        parts.append(element("path", d=f"M{_LEFT} {_TOP}V{bottom}H{right}", class_="axis"))
        parts.append(element("text", x_label, x=(_LEFT + right) / 2, y=HEIGHT - 5, text_anchor="middle"))
        parts.append(element("text", y_label, x=4, y=12))
        return join(parts)


def line_plot(plot: LinePlot) -> Html:
    """A curve as a figure; the browser shows values under the pointer."""
    axes = _Axes(plot.x_range or (plot.points[0][0], plot.points[-1][0]), plot.y_range or _padded_range(plot))
    pixels = [(round(axes.x(x), 1), round(axes.y(y), 1)) for x, y in plot.points]
    parts = [axes.draw(plot.x_label, plot.y_label)]
    right = WIDTH - _RIGHT
    if plot.chance is not None:
        y = round(axes.y(plot.chance), 1)
        # Above the line, unless the plot ends there or the curve runs through the label.
        near = [py for px, py in pixels if px > right - 90 and y - 18 < py <= y]
        label_y = y + 13 if y < _TOP + 16 or near else y - 5
        label = f"chance {format_number(plot.chance)}"
        parts.append(element("path", d=f"M{_LEFT} {y}H{right}", class_="chance"))
        parts.append(element("text", label, x=right, y=round(label_y, 1), text_anchor="end", class_="chance"))
    if plot.diagonal:
        start, end = (axes.x(0), axes.y(0)), (axes.x(1), axes.y(1))
        parts.append(
            element("path", d=f"M{start[0]:.1f} {start[1]:.1f}L{end[0]:.1f} {end[1]:.1f}", class_="chance")
        )
        label_x, label_y = round(axes.x(0.66), 1), round(axes.y(0.58), 1)
        parts.append(element("text", "chance", x=label_x, y=label_y, class_="chance"))
    parts.append(element("polyline", points=" ".join(f"{x},{y}" for x, y in pixels), class_="line"))
    if len(pixels) <= _MAX_DOTS:
        parts += [element("circle", cx=x, cy=y, r=2.5, class_="dot") for x, y in pixels]
    parts.append(_hits(plot, pixels))
    return _figure(plot.title, plot.value, _summary(plot), join(parts))


def _hits(plot: LinePlot, pixels: Sequence[tuple[float, float]]) -> Html:
    """Invisible strips with the value as tooltip, at evenly chosen points."""
    count = min(_MAX_HITS, len(pixels))
    chosen = [round(i * (len(pixels) - 1) / max(1, count - 1)) for i in range(count)]
    edges = [
        _LEFT,
        *((pixels[a][0] + pixels[b][0]) / 2 for a, b in pairwise(chosen)),
        WIDTH - _RIGHT,
    ]
    strips: list[Html] = []
    for place, index in enumerate(chosen):
        x, y = plot.points[index]
        tooltip = element("title", f"{plot.x_label} {_tick_text(x)}: {format_number(y)}")
        left, width = round(edges[place], 1), round(max(0.0, edges[place + 1] - edges[place]), 1)
        height = HEIGHT - _TOP - _BOTTOM
        strips.append(element("rect", tooltip, x=left, y=_TOP, width=width, height=height, class_="hit"))
    return join(strips)


def histogram(bars: Histogram) -> Html:
    """A histogram as a figure; "" if all counts are 0."""
    if not any(bars.counts):
        return Html("")
    axes = _Axes((0.0, 1.0), (0.0, max(bars.counts) * 1.06))
    count = len(bars.counts)
    parts = [axes.draw(bars.x_label, bars.y_label)]
    for place, number in enumerate(bars.counts):
        low, high = place / count, (place + 1) / count
        kind = "good" if (low + high) / 2 >= bars.threshold else "bad"
        x, y = axes.x(low), axes.y(number)
        parts.append(
            element(
                "rect",
                element("title", f"{low:.2f} to {high:.2f}: {number:,}"),
                x=round(x + 0.5, 1),
                y=round(y, 1),
                width=round(axes.x(high) - x - 1, 1),
                height=round(HEIGHT - _BOTTOM - y, 1),
                class_=kind,
            )
        )
    x = round(axes.x(bars.threshold), 1)
    anchor, shift = ("end", -4) if bars.threshold > 0.5 else ("start", 4)
    label = f"threshold {bars.threshold:g}"
    parts.append(element("path", d=f"M{x} {_TOP}V{HEIGHT - _BOTTOM}", class_="chance"))
    parts.append(element("text", label, x=x + shift, y=_TOP + 9, text_anchor=anchor, class_="chance"))
    total = f"{sum(bars.counts):,}"
    return _figure(bars.title, total, f"{bars.title}: {total}", join(parts))


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers in low..high (low < high)."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= max(factor for factor in (1, 2, 5) if factor * step <= (high - low) / 3 * (1 + 1e-9))
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _tick_text(value: float) -> str:
    """1234 -> "1,234", 0.1 + 0.2 -> "0.3"."""
    if abs(value) < 1e5 and value == round(value):
        return f"{value:,.0f}"
    return format_number(value)


def _padded_range(plot: LinePlot) -> tuple[float, float]:
    """Range of the values and the chance level with a margin, which does not cross zero."""
    values = [y for _, y in plot.points] + ([] if plot.chance is None else [plot.chance])
    low, high = min(values), max(values)
    # Means of equal numbers differ by rounding.
    margin = (high - low) * 0.06 if high - low > 1e-9 * abs(high) else abs(high) * 0.1 or 1.0
    return (low - margin if low < 0 or low - margin >= 0 else 0.0), high + margin


def _summary(plot: LinePlot) -> str:
    first, last = plot.points[0][1], plot.points[-1][1]
    return f"{plot.title}: {format_number(first)} to {format_number(last)}"


def _figure(title: str, value: str, label: str, drawing: Html) -> Html:
    caption = element("figcaption", element("span", title), element("b", value) if value else "")
    svg = element("svg", drawing, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)
    return element("figure", caption, svg)
