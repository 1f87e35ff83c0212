"""Reports of an evaluation: report.json for programs, report.html for people, one file without scripts or links."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape

import numpy as np
from PIL import Image, ImageDraw

from sightloop.data.datasets.leakage import Leaks
from sightloop.data.images.decode import decode, read_file
from sightloop.errors import ImageError
from sightloop.evaluation.dataset import EvalDataset
from sightloop.evaluation.results import Evaluation, ExampleCase, MetricValue, TaskScores
from sightloop.metrics import Difference
from sightloop.types import Floats, Integers, JsonDict, JsonMapping

_GALLERY_SIZE = 8  # images per gallery
_IMAGE_SIDE = 250  # pixels of the longer side
_MARK_COLORS = {"people": "#3c3", "model": "#e33", "A": "#e33", "B": "#36f"}
_LEGEND = " On the images: people green, the model red; where there are two, A red and B blue."
_MAX_CLASSES = 60
_MAX_LISTED = 200
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 70em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .7em; text-align: left; vertical-align: top }
th { border-bottom: 1px solid #999 } td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.p, .note { color: #666; font-size: 13px } h1, h2, p, th, figcaption { overflow-wrap: anywhere }
.cases { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 1em } b { font-weight: 600 }
figure { margin: 0 } figcaption { font-size: 13px } img { max-width: 100%; display: block } svg { background: #fafafa }
.matrix td { padding: 0; width: 1.6em; height: 1.6em; text-align: center; font-size: 11px }
.matrix th { font: 11px sans-serif; padding: 0 .3em; border: 0 }
"""


def as_json(result: Evaluation) -> str:
    """report.json: all numbers at full precision, what was not computed, failures, confusion, differences, leaks."""
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
    report: JsonDict = {"about": dict(result.about), "runs": runs}
    if result.differences:
        report["differences"] = {name: asdict(value) for name, value in result.differences.items()}
    if result.leaks is not None:
        report["leaks"] = asdict(result.leaks)
    return json.dumps(report, indent=1) + "\n"


def as_html(result: Evaluation, dataset: EvalDataset) -> str:
    """report.html: the numbers with their protocols, curves, confusion matrix, and galleries of images.

    Args:
        result: of one or two models.
        dataset: source of the images: the best, the worst and the most disputed of each model, and those on which two
            models differ most.
    """
    about = result.about
    parts = [
        f"<h1>{_text(about['task'])} on {_text(about['data'])}</h1>",
        _settings({name: value for name, value in about.items() if name not in ("task", "data")}),
    ]
    if result.leaks is not None:
        parts.append(
            f"<h2>Copies in the training data</h2><p>{_text(result.leaks.summary() or 'None found.')}</p>"
        )
    if len(result.runs) > 1:
        parts.append(_comparison(result, dataset))
    for run in result.runs:
        own = {
            name: value for name, value in run.about.items() if name not in {*about, "sightloop", "options"}
        }
        parts += [
            f"<h2>{_text(run.name)}</h2>",
            _settings(own),
            _metrics_table(run.numbers, run.scored.not_computed),
        ]
        if run.failed:
            listed = "".join(
                f"<li>{_text(k)}: {_text(v)}</li>" for k, v in list(run.failed.items())[:_MAX_LISTED]
            )
            parts.append(
                f"<h3>{len(run.failed):,} left out: their images cannot be read</h3><ul>{listed}</ul>"
            )
        parts.append(_figures(run.scored))
        parts.append(_example_galleries(run.scored, dataset))
    if result.leaks:
        parts.append(f"<h2>The copies</h2>{_leaks_table(result.leaks)}")
    title = f"{_text(about['task'])}: {_text(', '.join(run.name for run in result.runs))}"
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</html>\n"
    )


def _text(value: object) -> str:
    return escape(str(value).encode("utf-8", "backslashreplace").decode())


def _settings(settings: JsonMapping) -> str:
    def shown(value: object) -> str:
        if isinstance(value, dict):
            value = ", ".join(f"{k} {shown(v)}" for k, v in value.items() if v) or "the defaults"
        text = value if isinstance(value, str) else json.dumps(value)
        return text if len(text) < 400 else text[:400] + " ..."

    lines = (f"{_text(name.replace('_', ' '))}: {_text(shown(value))}" for name, value in settings.items())
    return f"<p>{'<br>'.join(lines)}</p>"


def _format_value(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}".removesuffix(".00")


def _metrics_table(numbers: Sequence[MetricValue], not_computed: Mapping[str, str]) -> str:
    rows = [
        f'<tr><td>{_text(n.name)}<td class="n"><b>{_format_value(n.value)}</b><td class="n">{_interval(n.low, n.high)}'
        f'<td class="n">{n.samples:,} {_text(n.unit)}<td class="p">{_text(n.protocol)}'
        for n in numbers
    ]
    rows += [
        f'<tr><td>{_text(name)}<td class="n">-<td><td><td class="p">not computed: {_text(reason)}'
        for name, reason in not_computed.items()
    ]
    head = "<tr><th>number<th>value<th>95 % interval<th>over<th>protocol"
    return f"<table>{head}{''.join(rows)}</table><p>Intervals: bootstrap over the samples, by the seed above.</p>"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{_format_value(low)} to {_format_value(high)}"


def _comparison(result: Evaluation, dataset: EvalDataset) -> str:
    first, second = result.runs
    other = {number.name: number for number in second.numbers}
    rows: list[str] = []
    for number in first.numbers:
        if number.name not in other:
            continue
        difference = result.differences.get(number.name)
        cells = (
            "<td><td>"
            if difference is None
            else f'<td class="n">{_signed(difference)}<td class="n">{difference.p:.4f}'
        )
        rows.append(
            f'<tr><td>{_text(number.name)}<td class="n">{_format_value(number.value)}'
            f'<td class="n">{_format_value(other[number.name].value)}{cells}'
        )
    names = f"<th>A: {_text(first.name)}<th>B: {_text(second.name)}"
    table = f"<table><tr><th>number{names}<th>A - B (95 %)<th>p{''.join(rows)}</table>"
    first_cases, second_cases = ({case.key: case for case in run.scored.cases} for run in result.runs)
    quality_gap = {
        key: case.quality - second_cases[key].quality
        for key, case in first_cases.items()
        if key in second_cases
    }
    by_gap = sorted(quality_gap, key=quality_gap.__getitem__)
    legend = _LEGEND if any(case.marks for case in first.scored.cases) else ""
    note = f"p: paired bootstrap over the same samples, two-sided. Images by {_text(first.scored.ranked)}.{legend}"
    parts = [f'<h2>A against B</h2>{table}<p class="note">{note}</p>']
    for heading, keys, sign in (("A does better", by_gap[::-1], 1), ("B does better", by_gap, -1)):
        if chosen := [key for key in keys[:_GALLERY_SIZE] if sign * quality_gap[key] > 0]:
            gallery = _gallery([_merge_cases(first_cases[key], second_cases[key]) for key in chosen], dataset)
            parts.append(f"<h3>{heading}</h3>{gallery}")
    return "".join(parts)


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


def _leaks_table(leaks: Leaks) -> str:
    rows = [
        f'<tr><td>{_text(leak.evaluation)}<td>{_text(leak.train)}<td class="n">{leak.similarity:.3f}'
        f"<td>{'the same' if leak.exact else 'nearly'} {_text(leak.text or 'image')}"
        for leak in [*leaks.images, *leaks.captions][:_MAX_LISTED]
    ]
    head = "<tr><th>evaluation<th>training<th>similarity<th>what"
    return f"<table>{head}{''.join(rows)}</table>" if rows else ""


def _figures(scored: TaskScores) -> str:
    parts = [_curve_figure(name, *curve) for name, curve in scored.curves.items()]
    if scored.confusion is not None:
        parts.append(_confusion_table(*scored.confusion))
    return "".join(parts)


def _curve_figure(name: str, x_label: str, y_label: str, points: Floats) -> str:
    """An SVG of a curve `[P, 2]` in the unit square, with about 300 of its points."""
    step = max(1, len(points) // 300)
    kept = np.concatenate([points[::step], points[-1:]])
    line = " ".join(f"{20 + 220 * x:.1f},{230 - 220 * y:.1f}" for x, y in kept)
    return (
        f'<figure style="width:260px;display:inline-block"><svg width="250" height="250"><path d="M20 10V230H240" '
        f'fill="none" stroke="#999"/><polyline points="{line}" fill="none" stroke="#15c" stroke-width="1.5"/></svg>'
        f"<figcaption>{_text(name)}: {_text(y_label)} over {_text(x_label)}</figcaption></figure>"
    )


def _confusion_table(labels: Sequence[str], counts: Integers) -> str:
    """The confusion matrix `[true, predicted]`; of more than 60 classes, those that are confused most often."""
    # Errors of a class: its images taken for others, and others taken for it.
    errors = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()  # [C]
    chosen = np.sort(np.argsort(-errors, kind="stable")[:_MAX_CLASSES])
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    colors = ("190,40,30", "20,120,60")  # errors red, diagonal green
    head = "".join(f'<th style="writing-mode:vertical-rl">{_text(labels[j])}' for j in chosen)
    rows = [
        f"<tr><th>{_text(labels[i])}"
        + "".join(
            f'<td style="background:rgba({colors[int(i == j)]},{share[i, j]:.2f})">{counts[i, j] or ""}'
            for j in chosen
        )
        for i in chosen
    ]
    note = (
        "" if len(chosen) == len(labels) else f" ({len(chosen)} of {len(labels)} classes, the most confused)"
    )
    table = f'<table class="matrix"><tr><th>{head}{"".join(rows)}</table>'
    return f"<h3>Confusion: true label down, predicted across{note}</h3>{table}"


def _example_galleries(scored: TaskScores, dataset: EvalDataset) -> str:
    if not (cases := scored.cases):
        return ""
    by_quality = sorted(cases, key=lambda case: -case.quality)
    by_dispute = sorted(cases, key=lambda case: -case.disputed)
    galleries = {
        "Worst": by_quality[::-1][:_GALLERY_SIZE],
        "Most disputed": by_dispute[:_GALLERY_SIZE],
        "Best": by_quality[:_GALLERY_SIZE],
    }
    legend = _LEGEND if any(case.marks for case in cases) else ""
    note = f'<p class="note">Worst and best by {_text(scored.ranked)}.{legend}</p>'
    return note + "".join(f"<h3>{name}</h3>{_gallery(chosen, dataset)}" for name, chosen in galleries.items())


def _gallery(cases: Sequence[ExampleCase], dataset: EvalDataset) -> str:
    figures: list[str] = []
    for case in cases:
        lines = "".join(f"<br><b>{_text(source)}</b> {_text(text)}" for source, text in case.lines)
        figures.append(
            f"<figure>{_inline_image(case, dataset)}<figcaption>{_text(case.key)}{lines}</figcaption></figure>"
        )
    return f'<div class="cases">{"".join(figures)}</div>'


def _inline_image(case: ExampleCase, dataset: EvalDataset) -> str:
    """The image as a small JPEG in the page, with its marks; the reason if it can no longer be read."""
    try:
        source = dataset.image(case.key)
        image = decode(source if isinstance(source, bytes) else read_file(str(source)))
    except ImageError as error:
        return f"<p>{_text(error)}</p>"
    scale = min(1.0, _IMAGE_SIDE / max(image.size))
    image.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for mark, region in case.marks:
        left, top, right, bottom = region.box
        for outline in region.polygons or ((left, top, right, top, right, bottom, left, bottom),):
            corners = [coordinate * scale for coordinate in (*outline, *outline[:2])]
            draw.line(corners, _MARK_COLORS[mark], 2)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'
