"""report.json for programs, report.html for people: one file, readable without a network and without scripts."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sightloop.data.images.decode import decode, read_file
from sightloop.errors import ImageError
from sightloop.evaluation.dataset import EvalDataset
from sightloop.evaluation.results import Evaluation, ExampleCase, MetricValue, TaskScores
from sightloop.types import JsonDict, JsonMapping

_SHOWN = 8  # images of a kind
_SIDE = 250  # px
_COLOURS = {"people": "#3c3", "model": "#e33", "A": "#e33", "B": "#36f"}
_LEGEND = " On the images: people green, the model red; where there are two, A red and B blue."
_MOST_CLASSES = 60
_MOST_NAMED = 200
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 70em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .7em; text-align: left; vertical-align: top }
th { border-bottom: 1px solid #999 } td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.p, .how { color: #666; font-size: 13px } h1, h2, p, th, figcaption { overflow-wrap: anywhere }
.cases { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 1em } b { font-weight: 600 }
figure { margin: 0 } figcaption { font-size: 13px } img { max-width: 100%; display: block } svg { background: #fafafa }
.matrix td { padding: 0; width: 1.6em; height: 1.6em; text-align: center; font-size: 11px }
.matrix th { font: 11px sans-serif; padding: 0 .3em; border: 0 }
"""


def as_json(result: Evaluation) -> str:
    """Everything that was measured; numbers as they are."""
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
    whole: JsonDict = {"about": dict(result.about), "runs": runs}
    if result.differences:
        whole["differences"] = {name: asdict(value) for name, value in result.differences.items()}
    if result.leaks is not None:
        whole["leaks"] = asdict(result.leaks)
    return json.dumps(whole, indent=1) + "\n"


def as_html(result: Evaluation, material: EvalDataset) -> str:
    """The same, with images: the best, the worst and the most disputed of each model, and where two differ."""
    about = result.about
    parts = [
        f"<h1>{_text(about['task'])} on {_text(about['data'])}</h1>",
        _facts({name: value for name, value in about.items() if name not in ("task", "data")}),
    ]
    if result.leaks is not None:
        parts.append(
            f"<h2>Copies in the training data</h2><p>{_text(result.leaks.summary() or 'None found.')}</p>"
        )
    if len(result.runs) > 1:
        parts.append(_comparison(result, material))
    for run in result.runs:
        own = {
            name: value for name, value in run.about.items() if name not in {*about, "sightloop", "options"}
        }
        parts += [f"<h2>{_text(run.name)}</h2>", _facts(own), _numbers(run.numbers, run.scored.not_computed)]
        if run.failed:
            named = "".join(
                f"<li>{_text(k)}: {_text(v)}</li>" for k, v in list(run.failed.items())[:_MOST_NAMED]
            )
            parts.append(
                f"<h3>{len(run.failed):,} left out: their images cannot be read</h3><ul>{named}</ul>"
            )
        parts.append(_figures(run.scored))
        parts.append(_pictures(run.scored, material))
    if result.leaks:
        parts.append(f"<h2>The copies</h2>{_leaks(result.leaks)}")
    title = f"{_text(about['task'])}: {_text(', '.join(run.name for run in result.runs))}"
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</html>\n"
    )


def _text(value: object) -> str:
    return escape(str(value).encode("utf-8", "backslashreplace").decode())


def _facts(facts: JsonMapping) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, dict):
            value = ", ".join(f"{k} {shown(v)}" for k, v in value.items() if v) or "the defaults"
        text = value if isinstance(value, str) else json.dumps(value)
        return text if len(text) < 400 else text[:400] + " ..."

    lines = (f"{_text(name.replace('_', ' '))}: {_text(shown(value))}" for name, value in facts.items())
    return f"<p>{'<br>'.join(lines)}</p>"


def _value(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}".removesuffix(".00")


def _numbers(numbers: Sequence[MetricValue], missing: Mapping[str, str]) -> str:
    rows = [
        f'<tr><td>{_text(n.name)}<td class="n"><b>{_value(n.value)}</b><td class="n">{_interval(n.low, n.high)}'
        f'<td class="n">{n.samples:,} {_text(n.unit)}<td class="p">{_text(n.protocol)}'
        for n in numbers
    ]
    rows += [
        f'<tr><td>{_text(name)}<td class="n">-<td><td><td class="p">not computed: {_text(why)}'
        for name, why in missing.items()
    ]
    head = "<tr><th>number<th>value<th>95 % interval<th>over<th>protocol"
    return f"<table>{head}{''.join(rows)}</table><p>Intervals: bootstrap over the samples, by the seed above.</p>"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{_value(low)} to {_value(high)}"


def _comparison(result: Evaluation, material: EvalDataset) -> str:
    first, second = result.runs
    other = {number.name: number for number in second.numbers}
    rows: list[str] = []
    for number in first.numbers:
        if number.name not in other:
            continue
        gap = result.differences.get(number.name)
        said = "<td><td>" if gap is None else f'<td class="n">{_signed(gap)}<td class="n">{gap.p:.4f}'
        rows.append(
            f'<tr><td>{_text(number.name)}<td class="n">{_value(number.value)}'
            f'<td class="n">{_value(other[number.name].value)}{said}'
        )
    names = f"<th>A: {_text(first.name)}<th>B: {_text(second.name)}"
    table = f"<table><tr><th>number{names}<th>A - B (95 %)<th>p{''.join(rows)}</table>"
    mine, theirs = ({case.key: case for case in run.scored.cases} for run in result.runs)
    both = [key for key in mine if key in theirs]
    gaps = sorted(both, key=lambda key: mine[key].quality - theirs[key].quality)
    legend = _LEGEND if any(case.marks for case in first.scored.cases) else ""
    said = f"p: paired bootstrap over the same samples, two-sided. Images by {_text(first.scored.ranked)}.{legend}"
    parts = [f'<h2>A against B</h2>{table}<p class="how">{said}</p>']
    for words, keys in (("A does better", gaps[::-1]), ("B does better", gaps)):
        sign = 1 if words[0] == "A" else -1
        chosen = [k for k in keys[:_SHOWN] if sign * (mine[k].quality - theirs[k].quality) > 0]
        if chosen:
            gallery = _gallery([_both(mine[k], theirs[k]) for k in chosen], material)
            parts.append(f"<h3>{words}</h3>{gallery}")
    return "".join(parts)


def _both(first: ExampleCase, second: ExampleCase) -> ExampleCase:
    """What both models have of one image; what is the same stands once."""
    own = [
        (f"{letter} {who}", text)
        for letter, case, other in (("A", first, second), ("B", second, first))
        for who, text in case.lines
        if (who, text) not in other.lines
    ]
    shared = [line for line in first.lines if line in second.lines]
    found = [
        (letter, region)
        for letter, case in (("A", first), ("B", second))
        for who, region in case.marks
        if who == "model"
    ]
    known = [mark for mark in first.marks if mark[0] == "people"]
    return ExampleCase(first.key, 0.0, 0.0, (*own, *shared), (*known, *found))


def _signed(gap: Any) -> str:
    return f"{gap.value:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})"


def _leaks(leaks: Any) -> str:
    rows = [
        f'<tr><td>{_text(leak.evaluation)}<td>{_text(leak.train)}<td class="n">{leak.similarity:.3f}'
        f"<td>{'the same' if leak.exact else 'nearly'} {_text(leak.text or 'image')}"
        for leak in [*leaks.images, *leaks.captions][:_MOST_NAMED]
    ]
    head = "<tr><th>evaluation<th>training<th>similarity<th>what"
    return f"<table>{head}{''.join(rows)}</table>" if rows else ""


def _figures(scored: TaskScores) -> str:
    parts = [_curve(name, *curve) for name, curve in scored.curves.items()]
    if scored.confusion is not None:
        parts.append(_matrix(*scored.confusion))
    return "".join(parts)


def _curve(name: str, across: str, up: str, points: NDArray[np.float64]) -> str:
    step = max(1, len(points) // 300)
    kept = np.concatenate([points[::step], points[-1:]])
    line = " ".join(f"{20 + 220 * x:.1f},{230 - 220 * y:.1f}" for x, y in kept)
    return (
        f'<figure style="width:260px;display:inline-block"><svg width="250" height="250"><path d="M20 10V230H240" '
        f'fill="none" stroke="#999"/><polyline points="{line}" fill="none" stroke="#15c" stroke-width="1.5"/></svg>'
        f"<figcaption>{_text(name)}: {_text(up)} over {_text(across)}</figcaption></figure>"
    )


def _matrix(labels: Sequence[str], counts: NDArray[np.int64]) -> str:
    """Rows are true, columns predicted; of many classes, those that are mistaken most often."""
    wrong = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    chosen = np.sort(np.argsort(-wrong, kind="stable")[:_MOST_CLASSES])
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    colour = ("190,40,30", "20,120,60")
    head = "".join(f'<th style="writing-mode:vertical-rl">{_text(labels[j])}' for j in chosen)
    rows = [
        f"<tr><th>{_text(labels[i])}"
        + "".join(
            f'<td style="background:rgba({colour[int(i == j)]},{share[i, j]:.2f})">{counts[i, j] or ""}'
            for j in chosen
        )
        for i in chosen
    ]
    note = (
        "" if len(chosen) == len(labels) else f" ({len(chosen)} of {len(labels)} classes, the most mistaken)"
    )
    table = f'<table class="matrix"><tr><th>{head}{"".join(rows)}</table>'
    return f"<h3>Confusion: true label down, predicted across{note}</h3>{table}"


def _pictures(scored: TaskScores, material: EvalDataset) -> str:
    if not (cases := scored.cases):
        return ""
    by_quality = sorted(cases, key=lambda case: -case.quality)
    by_dispute = sorted(cases, key=lambda case: -case.disputed)
    kinds = {
        "Worst": by_quality[::-1][:_SHOWN],
        "Most disputed": by_dispute[:_SHOWN],
        "Best": by_quality[:_SHOWN],
    }
    legend = _LEGEND if any(case.marks for case in cases) else ""
    note = f'<p class="how">Worst and best by {_text(scored.ranked)}.{legend}</p>'
    return note + "".join(f"<h3>{name}</h3>{_gallery(some, material)}" for name, some in kinds.items())


def _gallery(cases: Sequence[ExampleCase], material: EvalDataset) -> str:
    figures: list[str] = []
    for case in cases:
        lines = "".join(f"<br><b>{_text(who)}</b> {_text(text)}" for who, text in case.lines)
        figures.append(
            f"<figure>{_inline(case, material)}<figcaption>{_text(case.key)}{lines}</figcaption></figure>"
        )
    return f'<div class="cases">{"".join(figures)}</div>'


def _inline(case: ExampleCase, material: EvalDataset) -> str:
    """The image itself, small, with its marks; a note where it cannot be read any more."""
    try:
        picture = material.picture(case.key)
        image = decode(picture if isinstance(picture, bytes) else read_file(str(picture)))
    except ImageError as error:
        return f"<p>{_text(error)}</p>"
    shrunk = min(1.0, _SIDE / max(image.size))
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    pencil = ImageDraw.Draw(image)
    for whose, region in case.marks:
        left, top, right, bottom = region.box
        for outline in region.polygons or ((left, top, right, top, right, bottom, left, bottom),):
            corners = [coordinate * shrunk for coordinate in (*outline, *outline[:2])]
            pencil.line(corners, _COLOURS[whose], 2)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'
