"""Reports of an evaluation: report.json for programs, report.html for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
from PIL import Image, ImageDraw

from sightloop.data.datasets.leakage import Leaks
from sightloop.data.images.decode import decode, read_file
from sightloop.errors import ImageError
from sightloop.evaluation.dataset import EvalDataset
from sightloop.evaluation.results import EvalRun, Evaluation, ExampleCase, MetricValue, TaskScores
from sightloop.metrics import Difference
from sightloop.reports import html
from sightloop.reports.html import Html, Tile
from sightloop.reports.plots import LinePlot, line_plot, plots
from sightloop.types import Floats, Integers, JsonDict

_GALLERY_SIZE = 8  # images per gallery
_IMAGE_SIDE = 250  # pixels of the longer side
_MARK_COLORS = {"people": "#3c3", "model": "#e33", "A": "#e33", "B": "#36f"}
_LEGEND = " On the images: people green, the model red; where there are two, A red and B blue."
_MAX_CLASSES = 60
_MAX_LISTED = 200
_MAX_TILES = 4
# Metrics at the top of a report before others.
_MAIN_METRICS = ("CIDEr", "CLIPScore", "SPICE", "BLEU-4", "image-to-text recall@1", "text-to-image recall@1")
_MAX_POINTS = 300  # of a curve
# (x axis, y axis) of curves for which guessing gives the line y = x.
_ROC_AXES = ("false positive rate", "true positive rate")
_CHANCE = {"precision": 0.5}  # y axis -> chance level: matching has as many true pairs as false ones
_STYLE = """
.matrix table{font-size:11px}.matrix td{padding:0;min-width:1.7em;width:1.7em;height:1.7em;text-align:center}
.matrix th{font-size:11px;padding:0 4px;border:0;vertical-align:bottom}
.matrix th.down{writing-mode:vertical-rl;padding:4px 0}
"""


def as_json(result: Evaluation) -> str:
    """report.json: numbers at full precision, what was not computed or left out, confusion, differences, leaks."""
    runs = [
        {
            "about": dict(run.about),
            "numbers": [asdict(number) for number in run.numbers],
            "not_computed": dict(run.scored.not_computed),
            "failed": dict(run.failed),
        }
        | (
            {"confusion": {"labels": run.scored.confusion[0], "counts": run.scored.confusion[1].tolist()}}
            if run.scored.confusion
            else {}
        )
        for run in result.runs
    ]
    report: JsonDict = {"about": dict(result.about), "runs": runs, "notes": list(result.notes)}
    if result.differences:
        report["differences"] = {name: asdict(value) for name, value in result.differences.items()}
    if result.warnings:
        report["warnings"] = list(result.warnings)
    if result.leaks is not None:
        report["leaks"] = asdict(result.leaks)
    return json.dumps(report, indent=1) + "\n"


def as_html(result: Evaluation, dataset: EvalDataset) -> str:
    """report.html: metrics, curves, confusion matrix, and galleries of images; protocols and settings are folded.

    Args:
        result: of one or two models.
        dataset: source of the images: the best, the worst and the most disputed of each model, and those on which two
            models differ most.
    """
    about = result.about
    names = " and ".join(run.name for run in result.runs)
    parts: list[object] = []
    if len(result.runs) == 1:
        parts.append(html.tiles(_tiles(result.runs[0].numbers)))
    parts += [html.warning(f"{text}.") for text in result.warnings]
    if result.leaks is not None and (summary := result.leaks.summary()):
        parts.append(html.warning(f"Copies in the training data: {summary}"))
    if len(result.runs) > 1:
        parts.append(_comparison(result, dataset))
    for run in result.runs:
        parts.append(_run_section(run, result, dataset))
    if result.leaks is not None:
        copies = len(result.leaks.images) + len(result.leaks.captions)
        parts.append(
            html.details(
                f"Copies in the training data: {copies:,}", _leaks_table(result.leaks) or "None found."
            )
        )
    if result.notes:
        summary = f"Notes on the data: {len(result.notes):,}"
        parts.append(html.details(summary, html.items(result.notes, _MAX_LISTED)))
    shared = {name: value for name, value in about.items() if name not in ("task", "data")}
    parts.append(html.details("Settings of the evaluation", html.settings(shared)))
    samples = about.get("samples")
    count = f" \u00b7 {samples:,} samples" if isinstance(samples, int) else ""
    return html.page(f"{about['task']} on {about['data']}", f"{names}{count}", *parts, style=_STYLE)


def _run_section(run: EvalRun, result: Evaluation, dataset: EvalDataset) -> Html:
    own = {
        name: value
        for name, value in run.about.items()
        if name not in {*result.about, "sightloop", "options"}
    }
    failed = [f"{key}: {reason}" for key, reason in run.failed.items()]
    scored = run.scored
    return html.section(
        run.name,
        html.warning(f"{len(failed):,} left out: their images or annotations cannot be read.")
        if failed
        else "",
        _metrics_table(run.numbers, scored.not_computed),
        html.details(f"{len(failed):,} left out", html.items(failed, _MAX_LISTED)) if failed else "",
        html.details(
            "Protocol",
            html.table(
                ["metric", "protocol"], [[n.name, n.protocol] for n in run.numbers], text_columns=(0, 1)
            ),
            html.note("Intervals: 95 %, by bootstrap over the samples with the evaluation's seed."),
        ),
        html.details("Settings of the model", html.settings(own)),
        plots([_curve_figure(name, *curve) for name, curve in scored.curves.items()]),
        _confusion_table(*scored.confusion) if scored.confusion is not None else "",
        _example_galleries(scored, dataset),
    )


def _tiles(numbers: Sequence[MetricValue]) -> list[Tile]:
    by_name = {number.name: number for number in numbers}
    names = dict.fromkeys([name for name in _MAIN_METRICS if name in by_name] + list(by_name))
    shown = [by_name[name] for name in list(names)[:_MAX_TILES]]
    return [Tile(each.name, _format_value(each.value), _interval(each.low, each.high)) for each in shown]


def _format_value(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}".removesuffix(".00")


def _metrics_table(numbers: Sequence[MetricValue], not_computed: Mapping[str, str]) -> Html:
    rows: list[list[object]] = [
        [
            number.name,
            html.element("b", _format_value(number.value)),
            _interval(number.low, number.high),
            f"{number.samples:,} {number.unit}",
        ]
        for number in numbers
    ]
    for name, reason in not_computed.items():
        rows.append([name, None, "", f"not computed: {reason}"])
    return html.table(["metric", "value", "95 % interval", "computed over"], rows, text_columns=(0, 3))


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{_format_value(low)} to {_format_value(high)}"


def _comparison(result: Evaluation, dataset: EvalDataset) -> Html:
    first, second = result.runs
    other = {number.name: number for number in second.numbers}
    rows: list[list[object]] = []
    for number in first.numbers:
        if number.name not in other:
            continue
        difference = result.differences.get(number.name)
        cells = ["", ""] if difference is None else [_signed(difference), f"{difference.p:.4f}"]
        rows.append(
            [number.name, _format_value(number.value), _format_value(other[number.name].value), *cells]
        )
    table = html.table(
        ["metric", f"A: {first.name}", f"B: {second.name}", "A \u2212 B (95 % interval)", "p"], rows
    )
    first_cases, second_cases = ({case.key: case for case in run.scored.cases} for run in result.runs)
    quality_gap = {
        key: case.quality - second_cases[key].quality
        for key, case in first_cases.items()
        if key in second_cases
    }
    by_gap = sorted(quality_gap, key=quality_gap.__getitem__)
    legend = _LEGEND if any(case.marks for case in first.scored.cases) else ""
    ranked = f" Images by {first.scored.ranked}." if first.scored.ranked else ""
    parts = [table, html.note(f"p: paired bootstrap over the same samples, two-sided.{ranked}{legend}")]
    for heading, keys, sign in (("A is better", by_gap[::-1], 1), ("B is better", by_gap, -1)):
        if chosen := [key for key in keys[:_GALLERY_SIZE] if sign * quality_gap[key] > 0]:
            gallery = _gallery([_merge_cases(first_cases[key], second_cases[key]) for key in chosen], dataset)
            parts += [html.element("h3", heading), gallery]
    return html.section("A against B", *parts)


def _merge_cases(first: ExampleCase, second: ExampleCase) -> ExampleCase:
    """The cases of two models for one image; lines that both have are shown once."""
    own = [
        (f"{letter} {source}", text)
        for letter, case, other in (("A", first, second), ("B", second, first))
        for source, text in case.lines
        if (source, text) not in other.lines
    ]
    shared = [line for line in first.lines if line in second.lines]
    predicted = [
        (letter, region)
        for letter, case in (("A", first), ("B", second))
        for source, region in case.marks
        if source == "model"
    ]
    references = [mark for mark in first.marks if mark[0] == "people"]
    return ExampleCase(first.key, 0.0, 0.0, (*own, *shared), (*references, *predicted))


def _signed(difference: Difference) -> str:
    return f"{difference.value:+.4f} ({difference.low:+.4f} to {difference.high:+.4f})"


def _leaks_table(leaks: Leaks) -> Html:
    rows = [
        [
            leak.evaluation,
            leak.train,
            f"{leak.similarity:.3f}",
            f"{'the same' if leak.exact else 'nearly the same'} {leak.text or 'image'}",
        ]
        for leak in [*leaks.images, *leaks.captions][:_MAX_LISTED]
    ]
    return (
        html.table(["evaluation", "training", "similarity", "copy"], rows, text_columns=(0, 1, 3))
        if rows
        else Html("")
    )


def _curve_figure(name: str, x_label: str, y_label: str, points: Floats) -> Html:
    """A plot of a curve `[P, 2]` in the unit square, with at most about 300 of its points."""
    step = max(1, len(points) // _MAX_POINTS)
    kept = np.concatenate([points[::step], points[-1:]])  # [p, 2]
    return line_plot(
        LinePlot(
            title=name,
            x_label=x_label,
            y_label=y_label,
            points=[(x, y) for x, y in kept.tolist()],
            chance=_CHANCE.get(y_label),
            diagonal=(x_label, y_label) == _ROC_AXES,
            x_range=(0.0, 1.0),
            y_range=(0.0, 1.0),
        )
    )


def _confusion_table(labels: Sequence[str], counts: Integers) -> Html:
    """The confusion matrix `[true, predicted]`; of more than 60 classes, those that are confused most often."""
    # Errors of a class: its images taken for others, and others taken for it.
    errors = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()  # [C]
    chosen = np.sort(np.argsort(-errors, kind="stable")[:_MAX_CLASSES]).tolist()
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    colors = ("190,40,30", "20,120,60")  # errors red, diagonal green
    head = html.element(
        "tr", html.element("th"), *(html.element("th", labels[j], class_="down") for j in chosen)
    )
    rows = [
        html.element(
            "tr",
            html.element("th", labels[i]),
            *(
                html.element(
                    "td",
                    counts[i, j] or "",
                    style=f"background:rgba({colors[int(i == j)]},{share[i, j]:.2f})",
                )
                for j in chosen
            ),
        )
        for i in chosen
    ]
    subset = (
        "" if len(chosen) == len(labels) else f" ({len(chosen)} of {len(labels)} classes, the most confused)"
    )
    table = html.element("div", html.element("table", head, *rows), class_="wide matrix")
    return html.join([html.element("h3", f"Confusion: true label down, predicted across{subset}"), table])


def _example_galleries(scored: TaskScores, dataset: EvalDataset) -> Html:
    if not (cases := scored.cases):
        return Html("")
    by_quality = sorted(cases, key=lambda case: -case.quality)
    by_dispute = sorted(cases, key=lambda case: -case.disputed)
    galleries = {
        "Worst": by_quality[::-1][:_GALLERY_SIZE],
        "Most disputed": by_dispute[:_GALLERY_SIZE],
        "Best": by_quality[:_GALLERY_SIZE],
    }
    legend = _LEGEND if any(case.marks for case in cases) else ""
    parts = [html.note(f"Worst and best by {scored.ranked}.{legend}")]
    for name, chosen in galleries.items():
        parts += [html.element("h3", name), _gallery(chosen, dataset)]
    return html.join(parts)


def _gallery(cases: Sequence[ExampleCase], dataset: EvalDataset) -> Html:
    figures: list[Html] = []
    for case in cases:
        lines = (html.element("p", html.element("b", source), " ", text) for source, text in case.lines)
        figures.append(html.figure(_inline_image(case, dataset), case.key, *lines))
    return html.gallery(figures)


def _inline_image(case: ExampleCase, dataset: EvalDataset) -> Html:
    """The image as a small JPEG in the page, with its marks; the reason if it can no longer be read."""
    try:
        source = dataset.image(case.key)
        image = decode(source if isinstance(source, bytes) else read_file(str(source)))
    except ImageError as error:
        return html.paragraph(error)
    scale = min(1.0, _IMAGE_SIDE / max(image.size))
    image.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for mark, region in case.marks:
        left, top, right, bottom = region.box
        for outline in region.polygons or ((left, top, right, top, right, bottom, left, bottom),):
            corners = [coordinate * scale for coordinate in (*outline, *outline[:2])]
            draw.line(corners, _MARK_COLORS[mark], 2)
    return html.inline_image(image, _IMAGE_SIDE)
