"""RUN/report.html: charts, captions, drawings and warnings of a training run in one self-contained file."""

from __future__ import annotations

import io
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from PIL import Image

from sightloop.data.atomic import atomic_write
from sightloop.data.images.decode import decode
from sightloop.errors import ImageError
from sightloop.reports import html
from sightloop.reports.html import Html, Tile
from sightloop.reports.plots import LinePlot, line_plot, plots
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
_MAX_TILES = 4  # metrics at the top of the report
# Names of curves -> names for people; unit of the y axis.
_LABELS = {"gradient_norm": "gradient norm", "logit_scale": "logit scale (log)"}
_UNITS = {"samples per second": "samples/s"}
_COIN_FLIP = 0.5  # ITM accuracy at chance level: as many true pairs as false ones


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
        _write_thumbnail(sample_path(run, sample.key), image, side)


def write_drawings(
    run: Path, step: int, drawings: Sequence[tuple[str, Image.Image]], side: int = 160
) -> None:
    """Writes drawings of the captions of samples, (key, image), at a step of a run, for the report."""
    if drawings:
        (run / "samples").mkdir(parents=True, exist_ok=True)
    for key, image in drawings:
        _write_thumbnail(_drawing_path(run, key, step), image.convert("RGB"), side)


def _drawing_path(run: Path, key: str, step: int) -> Path:
    path = sample_path(run, key)
    return path.with_name(f"{path.stem}-step-{step:06d}.jpg")


def _write_thumbnail(path: Path, image: Image.Image, side: int) -> None:
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    atomic_write(path, file.getvalue())


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
    metrics: dict[str, _Curve] = field(default_factory=dict[str, _Curve])
    evaluations: list[Evaluated] = field(default_factory=list[Evaluated])
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
                    story.metrics.setdefault(name, _Curve()).add(event.step, value)
                if event.texts or event.drawn:
                    story.evaluations.append(event)
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
    terms = {k: c for k, c in story.curves.items() if c.chance is not None or k == "loss"}
    facts = {k: c for k, c in story.curves.items() if k not in terms}
    return html.page(
        f"{name} \u00b7 {run.resolve().name}",
        _status(story),
        html.tiles(_tiles(story, terms)),
        _warnings(story.warnings),
        _plots("Metrics", "On the evaluation data, by training step.", story.metrics, ""),
        html.section("ITM threshold", html.paragraph(f"{story.calibrated.summary()}."))
        if story.calibrated
        else "",
        _plots("Losses", "By training step. Dashed: the loss of a model that guesses.", terms, "loss (nats)"),
        _texts(run, [each for each in story.evaluations if each.texts]),
        _drawings(run, [each for each in story.evaluations if each.drawn]),
        _plots("Optimization", "By training step.", facts, ""),
        html.details(
            f"{len(story.skipped):,} samples skipped",
            html.items([f"{s.key}: {s.reason}" for s in story.skipped]),
        )
        if story.skipped
        else "",
        _recipe(run / "recipe.json"),
        style=_STYLE,
    )


def _status(story: _Story) -> str:
    if story.ended is not None:
        return f"finished after {story.ended.step:,} steps"
    step = story.last.step if story.last else 0
    steps = f" of {story.began.steps:,}" if story.began else ""
    saved = "no checkpoint yet" if story.saved is None else f"last checkpoint at step {story.saved:,}"
    return f"not finished: step {step:,}{steps}, {saved}"


def _tiles(story: _Story, terms: Mapping[str, _Curve]) -> list[Tile]:
    """The metrics of the run's objectives first, then loss, time, and size of data and model."""
    measured = {name: curve for name, curve in story.metrics.items() if curve.values}
    tiles = [
        Tile(name, html.format_number(measured[name].values[-1]), f"step {measured[name].steps[-1]:,.0f}")
        for name in order_metrics(measured, terms)[:_MAX_TILES]
    ]
    if story.last is not None:
        tiles.append(Tile("loss", html.format_number(story.last.loss), f"step {story.last.step:,}"))
        tiles.append(
            Tile("training time", html.format_duration(story.seconds), f"{story.last.epoch:.4g} epochs")
        )
    if story.began is not None:
        began = story.began
        tiles.append(Tile("training samples", f"{began.samples:,}", f"batch {began.batch:,}"))
        frozen = "" if began.trainable == began.parameters else f"of {html.format_count(began.parameters)}"
        tiles.append(Tile("trained parameters", html.format_count(began.trainable), frozen))
    return tiles


def _warnings(warnings: Sequence[WarningRaised]) -> Html:
    if not warnings:
        return html.element("p", "No warnings.", class_="fine")
    return html.section(
        "Warnings",
        *(
            html.element(
                "p",
                html.element("b", f"step {warning.step:,} \u00b7 {warning.about} "),
                warning.text,
                class_="fine" if warning.over else "warning",
            )
            for warning in warnings
        ),
    )


def _plots(heading: str, note: str, curves: Mapping[str, _Curve], y_label: str) -> Html:
    drawn = [_plot(name, curve, y_label) for name, curve in curves.items() if curve.values]
    return html.section(heading, plots(drawn), note=note)


def _plot(name: str, curve: _Curve, y_label: str) -> Html:
    shown = _LABELS.get(name, name)
    chance = _COIN_FLIP if name.startswith("ITM accuracy") else curve.chance
    return line_plot(
        LinePlot(
            title=shown,
            x_label="step",
            y_label=_UNITS.get(name, y_label or shown),
            points=curve.points(),
            value=html.format_number(curve.values[-1]),
            chance=chance,
        )
    )


def _texts(run: Path, evaluations: Sequence[Evaluated]) -> Html:
    """Table of captions: a row for each image, a column for some of the evaluations."""
    columns = [(evaluated.step, dict(evaluated.texts)) for evaluated in _some(evaluations)]
    keys = list(dict.fromkeys(key for _, texts in reversed(columns) for key in texts))[:_MAX_IMAGES]
    if not keys:
        return Html("")
    head = ["image", *(f"step {step:,}" for step, _ in columns)]
    rows = [
        [
            html.join([_thumbnail(sample_path(run, key)), html.element("small", key)]),
            *(texts.get(key, "") for _, texts in columns),
        ]
        for key in keys
    ]
    table = html.table(head, rows, text_columns=range(len(head)))
    return html.section("Generated captions", html.element("div", table, class_="captions"))


def _drawings(run: Path, evaluations: Sequence[Evaluated]) -> Html:
    """Grid of drawings: a row for each caption with its real image, a column for some of the evaluations."""
    shown = _some(evaluations)
    keys = list(dict.fromkeys(key for evaluated in reversed(shown) for key in evaluated.drawn))[:_MAX_IMAGES]
    if not keys:
        return Html("")
    head = ["image of the caption", *(f"step {evaluated.step:,}" for evaluated in shown)]
    rows = [
        [
            html.join([_thumbnail(sample_path(run, key)), html.element("small", key)]),
            *(_thumbnail(_drawing_path(run, key, evaluated.step)) for evaluated in shown),
        ]
        for key in keys
    ]
    table = html.table(head, rows, text_columns=range(len(head)))
    return html.section("Drawings of captions", html.element("div", table, class_="captions"))


def _some(evaluations: Sequence[Evaluated]) -> list[Evaluated]:
    """At most `_SHOWN` evaluations, the first, the last, and some between."""
    count = min(_SHOWN, len(evaluations))
    return [evaluations[round(i * (len(evaluations) - 1) / max(1, count - 1))] for i in range(count)]


def _thumbnail(path: Path) -> Html:
    return html.inline_jpeg(path.read_bytes()) if path.is_file() else Html("")


def _recipe(path: Path) -> Html:
    if not path.is_file():
        return Html("")
    return html.details("Recipe", html.preformatted(path.read_text("utf-8", "replace")))


_STYLE = """
.captions td{min-width:150px}.captions td:first-child{max-width:190px}.captions img{max-width:140px}
"""
