"""The command `sightloop evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from sightloop.apps.cli.checks import (
    check_capability,
    check_checkpoint,
    check_data,
    check_output_folder,
)
from sightloop.apps.cli.common import prepare_threads
from sightloop.apps.cli.options import (
    BatchSizeOption,
    Dtype,
    check_at_least,
    integer,
    option_name,
    parse_entries,
    read_lines,
)
from sightloop.apps.cli.output import (
    RESUME_HINT,
    Column,
    OutputTable,
    ProgressReporter,
    print_bundled_notice,
    print_failure,
    print_message,
    say_if_slow,
)
from sightloop.checkpoints.catalog import BUNDLED
from sightloop.errors import UnsupportedError, UsageError
from sightloop.evaluation.task_names import TASK_DESCRIPTIONS, TaskName
from sightloop.types import Bits, Event, JsonDict

if TYPE_CHECKING:
    from sightloop.evaluation.results import EvalRun, Evaluation

_EPILOGUE = "\n".join(
    [
        "Tasks:",
        *(f"  {name:<10} {description}" for name, description in TASK_DESCRIPTIONS.items()),
        "",
        "Examples:",
        "  sightloop evaluate captions -m Salesforce/blip-image-captioning-base -d captions.json -o report",
        "  sightloop evaluate retrieval -m M -d photos --rerank 16 --rerank 128 -o report",
        "  sightloop evaluate classify -m A -m B -d classes/ --templates clip-7 -o report",
        "  sightloop evaluate retrieval --predictions report/predictions.jsonl -d photos --rerank 16",
    ]
)


@Parameter(
    name="*", group=Group("Evaluation", help="A task ignores the options of other tasks.", sort_key=10)
)
@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """Options of `sightloop.evaluate`, under the same names. None leaves the default of `evaluate`."""

    samples: Annotated[int | None, Parameter(converter=integer)] = None
    """Evaluate a random subset of this number of samples. Default: all samples."""

    seed: Annotated[int | None, Parameter(converter=integer)] = None
    """Random seed of the subset, of mismatched pairs, of folds and of the bootstrap intervals. Default: 0."""

    rerank: Annotated[list[int] | None, Parameter(negative=(), consume_multiple=False)] = None
    """retrieval: re-rank the top k of each query by ITM; repeat the option for several k, 0 for ITC
    alone. Default: 16."""

    labels: Annotated[str | None, Parameter(metavar="A,B,...|FILE")] = None
    """classify: the classes. Default: all labels of the data. detect: the objects to look for. Default: all."""

    templates: Annotated[list[str] | None, Parameter(negative=(), consume_multiple=False)] = None
    """classify: a prompt with {} in place of the label, or clip-7 or clip-80 of the CLIP paper; repeat the option to
    average several prompts. Default: 'a photo of a {}.'"""

    answer_by: Literal["generate", "rank"] | None = None
    """vqa, videoqa: generate answers, or rank candidates. Default: generate."""

    candidates: Annotated[str | None, Parameter(metavar="A,B,...|FILE")] = None
    """vqa, videoqa with --answer-by rank: the answers to rank. Default: all answers of the data."""

    score_by: Literal["likelihood", "itm", "both"] | None = None
    """dialogue, pope: score an answer by its likelihood, or by ITM of a text with it, or by their sum (dialogue).
    Default: dialogue: by both if the model was trained for dialogues, by likelihood if it answers, else by ITM; pope:
    answers are written."""

    history: Annotated[int | None, Parameter(converter=integer)] = None
    """dialogue: how many of the rounds before a question are read with it, after the caption; 0 for the question alone.
    Default: all."""

    objects: Annotated[Path | None, Parameter(metavar="FILE")] = None
    """chair: what to look for in captions, one line an object: dog: puppy, hound. Default: the 80 objects of COCO."""

    match_by: Literal["itm", "itc"] | None = None
    """matching: score pairs by ITM probability, or by the cosine of their embeddings (ITC). Default: itm."""

    rank_samples: Annotated[int | None, Parameter(converter=integer)] = None
    """vqa, videoqa, dialogue, pope, chair: also draw this many texts and rank them, for a table of whether that helps
    and weights.json for `ask`, `caption` and `chat`. captions: draw this many texts and keep the best one. draw: draw
    this many images of each text, for the best of them by --rank-by. Default: off."""

    rank_by: Annotated[str | None, Parameter(metavar="MODEL")] = None
    """With --rank-samples: the model that judges. Default: the evaluated one."""

    clip: str | None = None
    """captions, draw: embedding model for CLIPScore, such as openai/clip-vit-base-patch32; of drawings also for CMMD
    and MMD. Default: none of these is computed."""

    prompt: str | None = None
    """captions, chair: beginning of every caption. Default: none."""

    num_beams: Annotated[int | None, Parameter(converter=integer)] = None
    """captions, chair, pope, vqa, videoqa: number of beams; 1 is greedy decoding. Default: the checkpoint's setting."""

    max_new_tokens: Annotated[int | None, Parameter(converter=integer)] = None
    """captions, chair, pope, vqa, videoqa: maximum length of a text in tokens. Default: the checkpoint's setting."""

    device: str = "auto"
    """cpu, cuda, cuda:N, xpu, mps, or auto: a GPU if there is one."""

    dtype: Dtype = "float32"
    """Precision of weights and activations. auto: the lowest that this machine multiplies natively and whose error is
    known."""

    quantize: Bits | None = None
    """Quantize the weights of a language model (int8, int4), or weights and activations of another (int8). Default:
    off."""

    batch_size: BatchSizeOption = None
    """Images per forward pass, or auto: as many as fit the memory. Changes speed and memory, not results. Default: 8 on
    a CPU, 32 on a GPU."""

    workers: Annotated[int, Parameter(converter=integer)] = 2
    """Processes that decode and preprocess images."""

    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False
    """Print one JSON object per metric, with its protocol, instead of a table."""

    def as_kwargs(self) -> JsonDict:
        """The options that were given, as keyword arguments of `sightloop.evaluate`.

        Raises:
            UsageError: A value is out of range.
        """
        for name in ("samples", "batch_size", "workers", "num_beams", "max_new_tokens"):
            if isinstance(value := getattr(self, name), int):
                check_at_least(option_name(name), value, 1)
        if self.history is not None:
            check_at_least("--history", self.history, 0)
        names = "samples seed answer_by match_by score_by history rank_samples rank_by clip prompt"
        unchanged = [*names.split(), "device", "dtype", "quantize", "batch_size", "workers"]
        decoding = {name: getattr(self, name) for name in ("num_beams", "max_new_tokens")}
        options = {name: getattr(self, name) for name in unchanged} | {
            "rerank": None if self.rerank is None else [k for k in self.rerank if k],
            "labels": None if self.labels is None else parse_entries("--labels", self.labels),
            "objects": None if self.objects is None else read_lines("--objects", self.objects),
            "templates": self._templates(),
            "candidates": None if self.candidates is None else parse_entries("--candidates", self.candidates),
            "decoding": {name: value for name, value in decoding.items() if value is not None} or None,
        }
        return {name: value for name, value in options.items() if value is not None}

    def _templates(self) -> str | list[str] | None:
        """The prompts, or the name of a set of prompts: a single value without {}."""
        if self.templates is not None and len(self.templates) == 1 and "{}" not in self.templates[0]:
            return self.templates[0]
        return self.templates


_OPTIONS = EvaluateOptions()
# Capability that a task needs.
_CAPABILITIES: dict[TaskName, str] = {
    "captions": "caption",
    "retrieval": "rank",
    "videos": "rank",
    "classify": "classify",
    "vqa": "answer",
    "videoqa": "answer",
    "matching": "match",
    "features": "embed",
    "detect": "detect",
    "locate": "locate",
    "segment": "segment",
    "dialogue": "answer",
    "pope": "answer",
    "chair": "caption",
    "draw": "draw",
}


def evaluate(
    task: Annotated[TaskName, Parameter(name="TASK")],
    /,
    *,
    data: Annotated[list[str], Parameter(alias="-d", negative=(), consume_multiple=True)],
    model: Annotated[list[str] | None, Parameter(alias="-m", negative=(), consume_multiple=False)] = None,
    predictions: Annotated[list[Path] | None, Parameter(negative=(), consume_multiple=False)] = None,
    out: Annotated[Path | None, Parameter(alias="-o", metavar="FOLDER")] = None,
    train_data: Annotated[list[str] | None, Parameter(negative=(), consume_multiple=True)] = None,
    options: EvaluateOptions = _OPTIONS,
) -> int:
    """Evaluate a model on your data: metrics with protocol, sample count and 95 % bootstrap interval.

    The output folder gets report.html, report.json and predictions.jsonl. Predictions are written as they are made: an
    interrupted run is resumed by the same command, and --predictions computes the metrics again without the model.

    Args:
        task: The task, see below.
        data: Folder, CSV, JSONL, Parquet or COCO file, or .tar shards; several are concatenated. For videos and
            videoqa: the file of captions or questions, and the folder of videos.
        model: Hub id, folder or weights file; repeat the option to compare two models. Default: nano, which comes with
            the package; it cannot detect, locate and segment.
        predictions: Score this predictions.jsonl instead of a model; repeat the option to compare two.
        out: Output folder. Default: nothing is written.
        train_data: Search this training data for copies of the evaluation's images and captions. Default: no search.
    """
    kwargs = options.as_kwargs()
    _check_sources(task, data, model, predictions, train_data, out, options)
    prepare_threads()
    with say_if_slow("starting ..."):
        from sightloop.evaluation.evaluate import evaluate as run_evaluate

    with ExitStack() as stack:
        reporters = _PhaseReporters(stack)
        result = run_evaluate(
            task,
            data,
            model=model or ([] if predictions else _bundled_model(task)),
            predictions=predictions or (),
            out=out,
            train_data=train_data,
            on_sample=reporters.on_sample,
            **kwargs,
        )
    _print_result(result, as_json=options.json)
    failed = _failed(result)
    for key, reason in failed.items():
        if key not in reporters.reported:
            print_failure(f"failed: {key}: {reason}")
    _print_notes(result, len(failed))
    if out is not None:
        print_message(f"{out / 'report.html'}: all metrics with protocol, and images.")
    return 1 if failed else 0


def _print_notes(result: Evaluation, failed: int) -> None:
    """What the numbers must be read with: images left out, copies in the training data, notes of the data."""
    if failed:
        print_failure(f"{failed:,} left out: their images or annotations cannot be read.")
    if result.leaks is not None:
        print_message(result.leaks.summary() or "No copies of this data in the training data.")
    for warning in result.warnings:
        print_failure(f"WARNING: {warning}.")
    for note in result.notes:
        print_message(f"Note: {note}.")


def _check_sources(
    task: TaskName,
    data: list[str],
    models: list[str] | None,
    predictions: list[Path] | None,
    train_data: list[str] | None,
    out: Path | None,
    options: EvaluateOptions,
) -> None:
    """Checks, before torch is loaded, that data, models and files exist and that the models can do the task.

    Raises:
        UsageError: A path is wrong, or models and predictions are both given, or more than two.
        CheckpointError: There is no such model.
        UnsupportedError: A model is known to lack the capability.
    """
    if (models and predictions) or len(models or predictions or ()) > 2:
        raise UsageError("give one or two models, or one or two files of --predictions, not both.")
    for file in predictions or ():
        if not file.is_file():
            raise UsageError(f"--predictions {file}: no such file.")
    check_output_folder("--out", out)
    check_data("--data", data)
    check_data("--train-data", train_data or ())
    if not predictions:
        for source in models or (None,):
            _check_model(task, source, options)
            check_checkpoint(source or BUNDLED)
        if options.clip is not None:
            check_checkpoint(options.clip)


def _check_model(task: TaskName, source: str | None, options: EvaluateOptions) -> None:
    """Raises UnsupportedError if a model is known to lack what the task needs with these options."""
    # `matching` by ITC needs no ITM head, and `retrieval` without re-ranking neither.
    capability = {"matching": "embed", "retrieval": "embed", "videos": "embed"}.get(task, _CAPABILITIES[task])
    if task in ("dialogue", "pope") and options.score_by in ("itm", "both"):
        capability = "match"
    try:
        check_capability(source, capability)
    except UnsupportedError:
        if task != "dialogue" or options.score_by is not None:
            raise
        check_capability(source, "match")  # a model that judges scores dialogues too


def _bundled_model(task: TaskName) -> list[str]:
    """The bundled model, with a notice."""
    print_bundled_notice(_CAPABILITIES[task])
    return [BUNDLED]


class _PhaseReporters:
    """One `ProgressReporter` for each phase of an evaluation, one after the other.

    Args:
        stack: Holds the current reporter, and prints its counts when it is closed.
    """

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._phase = ""
        self._reporter: ProgressReporter | None = None
        self.reported: set[str] = set()

    def on_sample(self, phase: str, total: int, event: Event[Any]) -> None:
        """Reports the event of one sample; a new phase starts a new reporter."""
        if self._reporter is None or phase != self._phase:
            self._stack.close()
            self._phase = phase
            print_message(f"{phase} ...")
            hint = f"With --out: {RESUME_HINT[0].lower()}{RESUME_HINT[1:]}"
            self._reporter = self._stack.enter_context(ProgressReporter(phase, OutputTable([]), hint))
            self._reporter.count_ahead(lambda: total)
        self._reporter.event(event)
        self.reported.add(event.name)


def _failed(result: Evaluation) -> Mapping[str, str]:
    """Sample key -> reason, over all models."""
    return {key: reason for run in result.runs for key, reason in run.failed.items()}


def _print_result(result: Evaluation, *, as_json: bool) -> None:
    if as_json:
        rows = OutputTable([], as_json=True)
        for run in result.runs:
            for number in run.numbers:
                rows.row({"model": run.name} | asdict(number))
            for name, why in run.scored.not_computed.items():
                missing = {"value": None, "low": None, "high": None, "not_computed": why}
                rows.row({"model": run.name, "name": name} | missing)
        for name, difference in result.differences.items():
            rows.row({"name": f"{name}, A - B"} | asdict(difference))
        return
    if len(result.runs) == 1:
        _print_run(result.runs[0])
    else:
        _print_comparison(result)
    not_computed = {name: why for run in result.runs for name, why in run.scored.not_computed.items()}
    for name, why in not_computed.items():
        print_message(f"{name}: not computed: {why}.")


def _print_run(run: EvalRun) -> None:
    rows = OutputTable(
        [Column("number"), Column("value", 9, True), Column("95 % interval", 20), Column("over", 18)]
    )
    for number in run.numbers:
        interval = "" if number.low is None else f"{number.low:.4f} to {number.high:.4f}"
        over = f"{number.samples:,} {number.unit}"
        rows.row({"number": number.name, "value": number.value, "95 % interval": interval, "over": over})


def _print_comparison(result: Evaluation) -> None:
    """The metrics of two models side by side, with the paired difference."""
    first, second = result.runs
    rows = OutputTable(
        [
            Column("number"),
            *(Column(name, 9, True) for name in "AB"),
            Column("A - B (95 %)", 28),
            Column("p", 6, True),
        ]
    )
    second_values = {number.name: number.value for number in second.numbers}
    for number in first.numbers:
        if number.name in second_values:
            gap = result.differences.get(number.name)
            interval = "" if gap is None else f"{gap.value:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})"
            p = "" if gap is None else f"{gap.p:.3f}"
            values = {"A": number.value, "B": second_values[number.name]}
            rows.row({"number": number.name, **values, "A - B (95 %)": interval, "p": p})
    print_message(f"A: {first.name}; B: {second.name}; p: paired bootstrap, two-sided.")


COMMANDS = {evaluate: _EPILOGUE}
