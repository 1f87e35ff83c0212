"""The command that measures."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from sightloop.apps.cli.options import Dtype, at_least, whole, words_or_file
from sightloop.apps.cli.output import Column, OutputTable, Screen, say, say_bundled
from sightloop.checkpoints.catalog import BUNDLED
from sightloop.types import Event, JsonDict

if TYPE_CHECKING:
    from sightloop.evaluation.results import EvalRun, Evaluation

_EPILOGUE = (
    "Examples:\n"
    "  sightloop evaluate captions -m Salesforce/blip-image-captioning-base -d captions.json -o report\n"
    "  sightloop evaluate retrieval -m M -d photos --rerank 16 --rerank 128 -o report\n"
    "  sightloop evaluate classify -m A -m B -d classes/ --template clip-7 -o report\n"
    "  sightloop evaluate retrieval --predictions report/predictions.jsonl -d photos --rerank 16"
)


@Parameter(name="*", group=Group("How to measure", sort_key=10))
@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """What a task has no use for is left alone."""

    samples: Annotated[int | None, Parameter(converter=whole)] = None
    """Measure on this many samples, drawn by the seed. Without it: all."""

    seed: Annotated[int | None, Parameter(converter=whole)] = None
    """Of the samples drawn, mismatched pairs, folds, and the resampled sets behind the intervals. Without it: 0."""

    rerank: Annotated[list[int] | None, Parameter(negative=(), consume_multiple=False)] = None
    """retrieval: ITM judges the top k anew; give it again for more. Without it: 16. 0: never."""

    labels: Annotated[str | None, Parameter(metavar="A,B,...|FILE")] = None
    """classify: the classes; without it all labels of the data. detect: what to look for."""

    template: Annotated[list[str] | None, Parameter(negative=(), consume_multiple=False)] = None
    """classify: a sentence with {} for the label, or clip-7 or clip-80, CLIP's own; several are averaged."""

    answer_by: Literal["generate", "rank"] | None = None
    """vqa: answers are written (the default), or ranked among candidates."""

    candidates: Annotated[str | None, Parameter(metavar="A,B,...|FILE")] = None
    """vqa, rank: the answers to choose from. Without it: all answers of the data."""

    judge_by: Literal["itm", "itc"] | None = None
    """matching: the score is the ITM probability (the default), or the cosine of the embeddings."""

    clip: str | None = None
    """captions: an embedding model for CLIPScore and RefCLIPScore, such as openai/clip-vit-base-patch32."""

    prompt: str | None = None
    """captions: the words that every caption starts with."""

    num_beams: Annotated[int | None, Parameter(converter=whole)] = None
    """captions, vqa: beams. Without it: the model's own setting."""

    max_new_tokens: Annotated[int | None, Parameter(converter=whole)] = None
    """captions, vqa: greatest length of a text in tokens."""

    device: str = "auto"
    """auto takes a GPU where there is one; or name it: cpu, cuda, cuda:1, mps."""

    dtype: Dtype = "float32"
    """Number format of the model."""

    batch_size: Annotated[int | None, Parameter(converter=whole)] = None
    """Images in one pass of the model: it changes speed and memory only."""

    workers: Annotated[int, Parameter(converter=whole)] = 2
    """Processes that read and prepare images beside the model."""

    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False
    """Print one JSON object a number, with its protocol, instead of a table."""

    def given(self) -> JsonDict:
        """The options of `sightloop.evaluate` that were set. Raises `UsageError` for values out of range."""
        for name in ("samples", "batch_size", "workers", "num_beams", "max_new_tokens"):
            if (value := getattr(self, name)) is not None:
                at_least(f"--{name.replace('_', '-')}", value, 1)
        decoding = {name: getattr(self, name) for name in ("num_beams", "max_new_tokens")}
        one = self.template is not None and len(self.template) == 1 and "{}" not in self.template[0]
        same = ("samples", "seed", "clip", "prompt", "device", "dtype", "batch_size", "workers")
        given = {name: getattr(self, name) for name in same} | {
            "rerank": None if self.rerank is None else [k for k in self.rerank if k],
            "labels": None if self.labels is None else words_or_file("--labels", self.labels),
            "templates": self.template[0] if one and self.template else self.template,
            "mode": self.answer_by,
            "candidates": None if self.candidates is None else words_or_file("--candidates", self.candidates),
            "judge": self.judge_by,
            "decoding": {name: value for name, value in decoding.items() if value is not None} or None,
        }
        return {name: value for name, value in given.items() if value is not None}


_MEASURING = EvaluateOptions()
TaskName = Literal[
    "captions", "retrieval", "classify", "vqa", "matching", "features", "detect", "locate", "segment"
]
# What a model must be able to do for a task.
_JOBS = {
    "captions": "caption",
    "retrieval": "rank",
    "classify": "classify",
    "vqa": "answer",
    "matching": "match",
    "features": "embed",
}


def evaluate(
    task: TaskName,
    *,
    data: Annotated[list[str], Parameter(alias="-d", negative=(), consume_multiple=True)],
    model: Annotated[list[str] | None, Parameter(alias="-m", negative=(), consume_multiple=False)] = None,
    predictions: Annotated[list[Path] | None, Parameter(negative=(), consume_multiple=False)] = None,
    out: Annotated[Path | None, Parameter(alias="-o", metavar="FOLDER")] = None,
    train_data: Annotated[list[str] | None, Parameter(negative=(), consume_multiple=True)] = None,
    measuring: EvaluateOptions = _MEASURING,
) -> int:
    """Measure a model on your data: every number with its protocol and its 95 % interval.

    OUT holds report.html and report.json, and predictions.jsonl, which grows
    as the model works: the same command goes on where it was stopped, and
    --predictions scores the file again without the model.

    Parameters
    ----------
    task
        What is measured: captions against those that people wrote; retrieval of images by captions and back; classify
        without training; vqa; matching, which score is a match; features, for k-NN and a linear probe; detect; locate,
        boxes of phrases; segment, their outlines.
    data
        A folder, CSV, JSONL, Parquet or COCO file, or tar shards; several are joined.
    model
        A hub id, a folder or a file; two are compared. Without it: nano, which comes with the package.
    predictions
        Score this file instead of a model; twice to compare two.
    out
        Where the report and the predictions go.
    train_data
        Look for copies of the evaluation's images and captions in this data.
    """
    options = measuring.given()
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from sightloop.evaluation.evaluate import evaluate as run

    with ExitStack() as stack:
        screens = _Screens(stack)
        result = run(
            task,
            data,
            model=model or ([] if predictions else _bundled(task)),
            predictions=predictions or (),
            out=out,
            train_data=train_data,
            on_sample=screens.see,
            **options,
        )
    _show(result, as_json=measuring.json)
    for key, reason in _failed(result).items():
        if key not in screens.named:
            say(f"failed: {key}: {reason}")
    if failed := _failed(result):
        say(f"{len(failed):,} left out of {result.about['samples']:,}: their images cannot be read.")
    if result.leaks is not None:
        say(result.leaks.summary() or "No copies of this data in the training data.")
    if out is not None:
        say(f"{out / 'report.html'}: all numbers, what each means, and images.")
    return 1 if failed else 0


def _bundled(task: str) -> list[str]:
    if task not in _JOBS:
        return []
    say_bundled(_JOBS[task])
    return [BUNDLED]


class _Screens:
    """One screen for each phase, one after the other."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._phase = ""
        self._screen: Screen | None = None
        self.named: set[str] = set()

    def see(self, phase: str, total: int, event: Event[Any]) -> None:
        if self._screen is None or phase != self._phase:
            self._stack.close()
            self._phase = phase
            say(f"{phase} ...")
            again = "The same command goes on from here, if it has --out."
            self._screen = self._stack.enter_context(Screen(phase, OutputTable([]), again))
            self._screen.count_ahead(lambda: total)
        self._screen.event(event)
        self.named.add(event.name)


def _failed(result: Evaluation) -> Mapping[str, str]:
    return {key: reason for run in result.runs for key, reason in run.failed.items()}


def _show(result: Evaluation, *, as_json: bool) -> None:
    if as_json:
        rows = OutputTable([], as_json=True)
        for run in result.runs:
            for number in run.numbers:
                rows.row({"model": run.name} | asdict(number))
            for name, why in run.scored.not_computed.items():
                rows.row({"model": run.name, "name": name, "value": None, "not_computed": why})
        for name, gap in result.differences.items():
            rows.row({"name": f"{name}, A - B"} | asdict(gap))
        return
    if len(result.runs) == 1:
        _table(result.runs[0])
    else:
        _side_by_side(result)
    for name, why in {
        name: why for run in result.runs for name, why in run.scored.not_computed.items()
    }.items():
        say(f"{name}: not computed: {why}.")


def _table(run: EvalRun) -> None:
    rows = OutputTable(
        [Column("number"), Column("value", 9, True), Column("95 % interval", 20), Column("over", 18)]
    )
    for number in run.numbers:
        interval = "" if number.low is None else f"{number.low:.4f} to {number.high:.4f}"
        over = f"{number.samples:,} {number.unit}"
        rows.row({"number": number.name, "value": number.value, "95 % interval": interval, "over": over})


def _side_by_side(result: Evaluation) -> None:
    first, second = result.runs
    rows = OutputTable(
        [
            Column("number"),
            *(Column(name, 9, True) for name in "AB"),
            Column("A - B (95 %)", 28),
            Column("p", 6, True),
        ]
    )
    other = {number.name: number.value for number in second.numbers}
    for number in first.numbers:
        if number.name in other:
            gap = result.differences.get(number.name)
            words = "" if gap is None else f"{gap.value:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})"
            p = "" if gap is None else f"{gap.p:.3f}"
            values = {"A": number.value, "B": other[number.name]}
            rows.row({"number": number.name, **values, "A - B (95 %)": words, "p": p})
    say(f"A: {first.name}; B: {second.name}; p: paired bootstrap, two-sided.")


COMMANDS = {evaluate: _EPILOGUE}
