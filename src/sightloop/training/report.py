"""RUN/report.html: charts, captions and warnings of a training run in one self-contained file."""

from __future__ import annotations

import base64
import io
import json
import math
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from html import escape
from pathlib import Path

from PIL import Image

from sightloop.data.atomic import atomic_write
from sightloop.data.images.decode import decode
from sightloop.errors import ImageError
from sightloop.training.events import (
    Calibrated,
    CheckpointSaved,
    Evaluated,
    RunEnded,
    RunStarted,
    SampleSkipped,
    StepDone,
    WarningRaised,
)
from sightloop.training.log import read_log
from sightloop.training.validation import order_metrics
from sightloop.types import Sample

_POINTS = 240  # greatest number of points of a curve
_SHOWN = 6  # evaluations with captions in the report: the first, the last, and some between
_MAX_IMAGES = 40
_MAX_SKIPPED = 200
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 360, 200, 48, 24, 12, 10


def write_report(run: Path) -> Path:
    """Writes RUN/report.html from RUN/metrics.jsonl, recipe.json and samples/, also during a run.

    Returns:
        The path of the report.

    Raises:
        SightloopError: the log is missing or damaged.
    """
    story = _read(run)
    path = run / "report.html"
    atomic_write(path, _page(run, story))
    return path


def sample_path(run: Path, key: str) -> Path:
    """Path of the thumbnail of a sample."""
    return run / "samples" / f"{blake2b(key.encode('utf-8', 'surrogatepass'), digest_size=8).hexdigest()}.jpg"


def write_samples(run: Path, samples: Iterable[Sample], side: int = 160) -> None:
    """Writes thumbnails for the report, at most `side` pixels wide and high; unreadable images are left out."""
    (run / "samples").mkdir(parents=True, exist_ok=True)
    for sample in samples:
        try:
            image = decode(sample.image)
        except ImageError:
            continue
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=80)
        atomic_write(sample_path(run, sample.key), file.getvalue())


@dataclass
class _Curve:
    """Values over steps, and the value at chance level."""

    steps: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))
    chance: float | None = None

    def add(self, step: int, value: float) -> None:
        if math.isfinite(value):
            self.steps.append(step)
            self.values.append(value)

    def points(self) -> list[tuple[float, float]]:
        """At most `_POINTS` means of neighboring values, then the last step."""
        size = max(1, math.ceil(len(self.values) / _POINTS))
        means = [
            (total / len(part), sum(self.values[start : start + size]) / len(part))
            for start in range(0, len(self.values), size)
            for part in [self.steps[start : start + size]]
            for total in [sum(part)]
        ]
        return means if size == 1 else [*means, (self.steps[-1], means[-1][1])]


@dataclass
class _Story:
    """A run, from its log."""

    began: RunStarted | None = None
    ended: RunEnded | None = None
    last: StepDone | None = None
    seconds: float = 0.0
    saved: int | None = None
    curves: dict[str, _Curve] = field(default_factory=dict[str, _Curve])
    figures: dict[str, _Curve] = field(default_factory=dict[str, _Curve])
    written: list[Evaluated] = field(default_factory=list[Evaluated])
    calibrated: Calibrated | None = None
    warnings: list[WarningRaised] = field(default_factory=list[WarningRaised])
    skipped: list[SampleSkipped] = field(default_factory=list[SampleSkipped])


def _read(run: Path) -> _Story:
    story = _Story()
    for event in read_log(run):
        match event:
            case RunStarted():
                story.began = event
            case StepDone():
                _add_step(story, event)
            case Evaluated():
                for name, value in event.values.items():
                    story.figures.setdefault(name, _Curve()).add(event.step, value)
                if event.texts:
                    story.written.append(event)
            case Calibrated():
                story.calibrated = event
            case WarningRaised():
                story.warnings.append(event)
            case SampleSkipped():
                story.skipped.append(event)
            case CheckpointSaved():
                story.saved = event.step
            case RunEnded():
                story.ended = event
    return story


def _add_step(story: _Story, event: StepDone) -> None:
    story.last = event
    story.seconds += event.seconds
    numbers = {"loss": event.loss, **event.values, "learning rate": event.lr}
    if event.seconds > 0:
        numbers["samples per second"] = event.samples / event.seconds
    for name, value in numbers.items():
        curve = story.curves.setdefault(name, _Curve())
        curve.add(event.step, value)
        curve.chance = event.chances.get(name, curve.chance)  # a step without the term has no chance level


def _page(run: Path, story: _Story) -> str:
    name = story.began.recipe if story.began else "training"
    title = escape(f"{name} \u00b7 {run.resolve().name}")
    terms = {k: c for k, c in story.curves.items() if c.chance is not None or k == "loss"}
    facts = {k: c for k, c in story.curves.items() if k not in terms}
    body = [
        f"<header><h1>{title}</h1><p class=status>{escape(_status(story))}</p></header>",
        _tiles(story, {name for name, curve in terms.items() if curve.chance is not None}),
        _warnings(story.warnings),
        _charts("Losses", "dashed: chance level", {_loss_name(k): c for k, c in terms.items()}, "lower"),
        f"<section><p>{escape(story.calibrated.summary())}.</p></section>" if story.calibrated else "",
        _charts("Evaluation", "on the evaluation data", story.figures, "figure"),
        _texts(run, story.written),
        _charts("Facts of the training", "", facts, "fact"),
        _skipped(story.skipped),
        _recipe(run / "recipe.json"),
    ]
    return (
        f'<!doctype html>\n<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + f"\n</main><script>{_SCRIPT}</script></body></html>\n"
    )


def _loss_name(term: str) -> str:
    return term if term == "loss" else f"{term} loss"


def _status(story: _Story) -> str:
    if story.ended is not None:
        return f"finished after {story.ended.step:,} steps"
    step = story.last.step if story.last else 0
    steps = f" of {story.began.steps:,}" if story.began else ""
    saved = "no checkpoint yet" if story.saved is None else f"last checkpoint at step {story.saved:,}"
    return f"not finished: step {step:,}{steps}, {saved}"


def _tiles(story: _Story, terms: Collection[str]) -> str:
    """Sizes, loss, and the metrics, those of the trained terms first."""
    tiles: list[tuple[str, str]] = []
    if story.began is not None:
        began = story.began
        tiles += [
            ("samples", f"{began.samples:,}"),
            ("batch", f"{began.batch:,}"),
            ("parameters", _short(began.parameters)),
            *([("of them trained", _short(began.trainable))] if began.trainable < began.parameters else []),
        ]
    if story.last is not None:
        tiles += [("epochs", f"{story.last.epoch:.4g}"), ("loss", _number(story.last.loss))]
        tiles += [("time in steps", _clock(story.seconds))]
    figures = {name: curve for name, curve in story.figures.items() if curve.values}
    tiles += [(name, _number(figures[name].values[-1])) for name in order_metrics(figures, terms)[:4]]
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in tiles)
    return f"<section class=tiles>{cells}</section>"


def _warnings(warnings: Sequence[WarningRaised]) -> str:
    if not warnings:
        return "<section><p class=fine>No warnings.</p></section>"
    rows = "".join(
        f"<li{' class=over' if w.over else ''}>"
        f"<b>step {w.step:,} \u00b7 {escape(w.about)}</b> {escape(w.text)}</li>"
        for w in warnings
    )
    return f"<section class=warnings><h2>Warnings</h2><ul>{rows}</ul></section>"


def _charts(heading: str, note: str, curves: Mapping[str, _Curve], kind: str) -> str:
    drawn = "".join(_chart(name, curve, kind) for name, curve in curves.items() if curve.values)
    if not drawn:
        return ""
    small = f" <small>{escape(note)}</small>" if note else ""
    return f"<section><h2>{escape(heading)}{small}</h2><div class=charts>{drawn}</div></section>"


def _chart(name: str, curve: _Curve, kind: str) -> str:
    points = curve.points()
    values = [value for _, value in points] + ([] if curve.chance is None else [curve.chance])
    low, high = min(values), max(values)
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = low - pad if low < 0 or low - pad >= 0 else 0.0, high + pad
    first, last = points[0][0], points[-1][0]

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * ((step - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)

    end = _WIDTH - _RIGHT
    parts = [
        f'<path class=grid d="M{_LEFT} {y(tick):.1f}H{end}"/>'
        f"<text x={_LEFT - 6} y={y(tick) + 4:.1f} text-anchor=end>{_number(tick)}</text>"
        for tick in _ticks(low, high)
    ]
    parts += [
        f"<text x={_LEFT} y={_HEIGHT - 6}>{curve.steps[0]:,.0f}</text>",
        f"<text x={end} y={_HEIGHT - 6} text-anchor=end>{last:,.0f}</text>" if last > first else "",
    ]
    if curve.chance is not None:
        at = y(curve.chance)
        below = 12 if at < _TOP + 14 else -4
        parts.append(f'<path class=chance d="M{_LEFT} {at:.1f}H{end}"/>')
        label = f"chance {_number(curve.chance)}"
        parts.append(f"<text class=chance x={end} y={at + below:.1f} text-anchor=end>{label}</text>")
    line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    parts.append(f'<polyline class=line points="{line}"/>')
    if len(points) <= 30:
        parts += [f"<circle cx={x(step):.1f} cy={y(value):.1f} r=2.5 />" for step, value in points]
    hover = escape(json.dumps([[round(s), _number(v), round(x(s), 1), round(y(v), 1)] for s, v in points]))
    label = escape(f"{name}: {_number(points[0][1])} to {_number(points[-1][1])}")
    return (
        f"<figure class={kind}><figcaption>{escape(name)} <b>{_number(curve.values[-1])}</b></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role=img aria-label="{label}" data-points="{hover}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers between low and high."""
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= max(factor for factor in (1, 2, 5) if factor * step <= (high - low) / 3)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _texts(run: Path, written: Sequence[Evaluated]) -> str:
    if not written:
        return ""
    count = min(_SHOWN, len(written))
    shown = [written[round(i * (len(written) - 1) / max(1, count - 1))] for i in range(count)]
    columns = [(evaluated.step, dict(evaluated.texts)) for evaluated in shown]
    keys = list(dict.fromkeys(key for _, texts in reversed(columns) for key in texts))[:_MAX_IMAGES]
    head = "".join(f"<th>step {step:,}</th>" for step, _ in columns)
    rows = "".join(
        f"<tr><th>{_thumbnail(sample_path(run, key))}<span>{escape(key)}</span></th>"
        + "".join(f"<td>{escape(texts.get(key, ''))}</td>" for _, texts in columns)
        + "</tr>"
        for key in keys
    )
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<section><h2>Captions over time</h2><div class=wide>{table}</div></section>"


def _thumbnail(path: Path) -> str:
    if not path.is_file():
        return ""
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def _skipped(skipped: Sequence[SampleSkipped]) -> str:
    if not skipped:
        return ""
    rows = "".join(f"<li>{escape(s.key)}: {escape(s.reason)}</li>" for s in skipped[:_MAX_SKIPPED])
    more = f"<li>and {len(skipped) - _MAX_SKIPPED:,} more</li>" if len(skipped) > _MAX_SKIPPED else ""
    heading = f"<summary>{len(skipped):,} samples skipped</summary>"
    return f"<section><details>{heading}<ul>{rows}{more}</ul></details></section>"


def _recipe(path: Path) -> str:
    if not path.is_file():
        return ""
    text = path.read_text("utf-8", "replace")
    return f"<section><details><summary>Recipe</summary><pre>{escape(text)}</pre></details></section>"


def _number(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e")


def _short(count: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--soft:#6a737d;--rule:#e3e6ea;--card:#f6f7f9;
--line:#2563c9;
--good:#1a7f4b;--bad:#b3261e;--alarm:#fdecea}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e4e7eb;--soft:#959da6;--rule:#2c3238;
--card:#1c2126;
--line:#6ea8ff;--good:#57c58a;--bad:#ff8a80;--alarm:#3a1d1b}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
main{max-width:1200px;margin:0 auto;padding:24px 20px 60px}h1{font-size:24px;margin:0}h2{font-size:17px;
margin:32px 0 10px}
small,.status{color:var(--soft);font-weight:400;font-size:13px}.status{margin:2px 0 0}
.tiles{display:flex;flex-wrap:wrap;gap:10px;margin-top:18px}
.tiles div{background:var(--card);border-radius:8px;padding:8px 14px}.tiles b{display:block;font-size:18px}
.tiles span{color:var(--soft);font-size:12px}.fine{color:var(--good)}
.warnings ul{list-style:none;margin:0;padding:0}.warnings li{background:var(--alarm);
border-left:4px solid var(--bad);
border-radius:4px;padding:8px 12px;margin:6px 0;overflow-wrap:anywhere}
.warnings .over,.warnings .over b{background:none;border-color:var(--good);color:var(--good)}
.warnings b{color:var(--bad);
margin-right:6px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(270px,1fr));gap:14px}
figure{margin:0;background:var(--card);border-radius:8px;padding:10px 12px 4px}figcaption{font-size:13px;
color:var(--soft)}
figcaption b{color:var(--ink);float:right}svg{width:100%;height:auto;display:block;
font:10.5px system-ui,sans-serif}
svg text{fill:var(--soft)}.grid{stroke:var(--rule)}.line{fill:none;stroke:var(--line);stroke-width:1.8;
stroke-linejoin:round}
circle{fill:var(--line)}.figure .line{stroke:var(--good)}.figure circle{fill:var(--good)}
path.chance{stroke:var(--bad);stroke-dasharray:5 4;opacity:.8}text.chance{fill:var(--bad)!important}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13px}
th,td{border-bottom:1px solid var(--rule);padding:8px 10px;
text-align:left;vertical-align:top;min-width:130px}tbody th{font-weight:400;color:var(--soft);max-width:180px;
overflow-wrap:anywhere}img{display:block;max-width:140px;border-radius:4px}details{margin-top:14px}
summary{cursor:pointer}
pre{background:var(--card);padding:12px;border-radius:8px;overflow-x:auto;font-size:12.5px}
"""

# Shows the value under the pointer; the report works without it.
_SCRIPT = """
for(const svg of document.querySelectorAll("svg[data-points]")){const points=JSON.parse(svg.dataset.points);
const make=n=>svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg",n));
const dot=make("circle"),say=make("text");
dot.setAttribute("r",3.5);const show=on=>{dot.style.display=say.style.display=on?"":"none"};show(false);
svg.addEventListener("pointerleave",()=>show(false));svg.addEventListener("pointermove",e=>{
const box=svg.getBoundingClientRect(),at=(e.clientX-box.left)/box.width*360;
const p=points.reduce((a,b)=>Math.abs(b[2]-at)<Math.abs(a[2]-at)?b:a);show(true);
dot.setAttribute("cx",p[2]);dot.setAttribute("cy",p[3]);say.setAttribute("x",p[2]>250?p[2]-6:p[2]+6);
say.setAttribute("text-anchor",p[2]>250?"end":"start");say.setAttribute("y",Math.max(20,p[3]-8));
say.textContent="step "+p[0].toLocaleString("en")+": "+p[1];say.style.fill="var(--ink)"})}
"""
