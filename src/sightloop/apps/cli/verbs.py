"""The commands `sightloop ask`, `classify` and `embed`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from sightloop.apps.cli.checks import check_texts, checkpoint_files, fine_tuned_labels, read_ahead
from sightloop.apps.cli.common import (
    Paths,
    check_model,
    list_images,
    models_for,
    report_without_images,
    run_verb,
    start_reading,
)
from sightloop.apps.cli.options import (
    DeviceListOptions,
    RuntimeOptions,
    check_at_least,
    integer,
    parse_entries,
)
from sightloop.apps.cli.output import RESUME_HINT, Column, OutputTable, ProgressReporter
from sightloop.apps.cli.ranking_options import WritingOptions
from sightloop.apps.cli.tables import RowMaker, TableOptions, TableRun, Verb
from sightloop.checkpoints.hub import weights_identity
from sightloop.errors import UsageError
from sightloop.ranking.options import RankedText
from sightloop.types import Failed, JsonDict, Pixels, Skipped

if TYPE_CHECKING:
    from sightloop.annotation.runner import ImageReader
    from sightloop.inference.model import Model
    from sightloop.types import Floats32

_DECODING, _RUNTIME, _TABLE, _DEVICES = (
    WritingOptions(),
    RuntimeOptions(),
    TableOptions(),
    DeviceListOptions(),
)

_EPILOGUES = {
    "ask": (
        "Examples:\n"
        "  sightloop ask photos -m Salesforce/blip-vqa-base -q 'how many people are there?'\n"
        "  sightloop ask photos -m M -q 'is it day or night?' --candidates day,night --json\n"
        "  sightloop ask photos -m M -q 'how many people are there?' --out answers.csv\n"
        "  sightloop ask clips -m M -q 'what is the man doing?' --frames 8"
    ),
    "classify": (
        "Examples:\n"
        "  sightloop classify photos -m openai/clip-vit-base-patch32 --labels cat,dog,bird\n"
        "  sightloop classify photos -m M --labels classes.txt --templates 'a sketch of a {}.' --top 5\n"
        "  sightloop classify photos -m run/model --out labels.csv"
    ),
    "embed": (
        "Examples:\n"
        "  sightloop embed photos -m openai/clip-vit-base-patch32 --out photos.npy\n"
        "  sightloop embed photos -m M --out photos.parquet"
    ),
}


def ask(
    *paths: Paths,
    questions: Annotated[
        list[str], Parameter(name=["--questions", "-q"], negative=(), consume_multiple=False)
    ],
    candidates: Annotated[str | None, Parameter(metavar="A,B,...|FILE")] = None,
    frames: Annotated[int, Parameter(converter=integer)] = 16,
    output: TableOptions = _TABLE,
    decoding: WritingOptions = _DECODING,
    runtime: RuntimeOptions = _RUNTIME,
) -> int:
    """Answer questions about every image or video (visual question answering).

    Args:
        questions: A question; repeat the option for several. Each image is encoded once for all questions.
        candidates: Rank these answers instead of generating one: a,b,c or a file with one per line.
            Default: generate.
        frames: Frames of each video that the model reads, one after another in time; 16 as in BLIP's video question
            answering.
    """
    options = decoding.as_kwargs()
    check_at_least("--frames", frames, 1)
    if decoding.samples is not None and candidates is not None:
        raise UsageError("--candidates and --samples: answers are chosen from a list or drawn, not both.")
    choices = None if candidates is None else parse_entries("--candidates", candidates)
    check_texts("--questions", questions)
    check_model("answer", runtime)

    def process(model: Model) -> tuple[Verb[list[str]], RowMaker[list[str]]]:
        def verb(images: list[Pixels]) -> list[list[str]]:
            # Every image with every question; the model encodes each distinct image of a batch once.
            pairs = [image for image in images for _ in questions]
            ranked = {"details": True} if decoding.samples is not None and runtime.json else {}
            answers = model.answer(pairs, questions * len(images), candidates=choices, **options, **ranked)
            return [answers[i : i + len(questions)] for i in range(0, len(answers), len(questions))]

        def shown(_name: str, answers: list[str]) -> tuple[list[JsonDict], list[JsonDict]]:
            rows: list[JsonDict] = [
                {"question": q, "answer": str(a)} for q, a in zip(questions, answers, strict=True)
            ]
            if not runtime.json:
                return rows, rows
            details = [a.as_json() if isinstance(a, RankedText) else {} for a in answers]
            shown = [{**own, **row} for row, own in zip(rows, details, strict=True)]
            return rows, [{name: value for name, value in row.items() if name != "text"} for row in shown]

        return verb, shown

    columns = [Column("name"), Column("question"), Column("answer", 24)]
    settings = {"questions": questions, "candidates": choices, "decoding": options, "frames": frames}
    run = TableRun(
        "answer",
        "answering",
        ("name", "question", "answer"),
        settings,
        _has_all(questions),
        videos=True,
        reader=lambda model: _reader_of_frames(model, frames),
    )
    return run.run(paths, output, runtime, OutputTable(columns, as_json=runtime.json), process)


def classify(
    *paths: Paths,
    labels: Annotated[str | None, Parameter(metavar="A,B,...|FILE")] = None,
    templates: Annotated[list[str] | None, Parameter(negative=(), consume_multiple=False)] = None,
    top: Annotated[int | None, Parameter(converter=integer)] = None,
    activation: Literal["softmax", "sigmoid"] | None = None,
    output: TableOptions = _TABLE,
    runtime: RuntimeOptions = _RUNTIME,
) -> int:
    """Classify every image: zero-shot with your labels, or with the classes that a model was fine-tuned on.

    Args:
        labels: Labels: a,b,c or a file with one per line.
            Default: the classes that the model was fine-tuned on (`sightloop train classify`).
        templates: A prompt with {} in place of the label; repeat the option to average the embeddings of several.
            Default: "a photo of a {}."
        top: Number of labels shown, the most probable first. Default: 3 in the table, all with --json.
        activation: softmax: probabilities over the labels that sum to 1; sigmoid: of each label by itself (SigLIP).
            Default: as the model was trained.
    """
    names, prompts = _check_labels(labels, templates, top)
    check_model("classify", runtime)
    if names is None and not fine_tuned_labels(runtime.source):
        raise UsageError(f"--labels: {runtime.source} was not fine-tuned on classes; give labels.")

    def process(model: Model) -> tuple[Verb[list[float]], RowMaker[list[float]]]:
        if not (shown_labels := names or model.labels):
            raise UsageError(f"--labels: {model.name} was not fine-tuned on classes; give labels.")
        # Classes that were learned have a softmax always; labels have what the model was trained with.
        is_default = names is not None and activation is None
        used_activation = model.activation if is_default else activation or "softmax"

        def verb(images: list[Pixels]) -> list[list[float]]:
            return model.classify(images, names, prompts, activation=activation).tolist()

        def shown(_name: str, values: list[float]) -> tuple[list[JsonDict], list[JsonDict]]:
            ranked = sorted(zip(values, shown_labels, strict=True), key=lambda pair: -pair[0])
            best = ranked[: top or 3]
            written = [
                {"label": label, "probability": float(f"{value:.6g}"), "activation": used_activation}
                for value, label in best
            ]
            if not runtime.json:
                return written, [{"label": label, "probability": value} for value, label in best]
            probabilities = {label: value for value, label in ranked[:top]}
            first = {"label": ranked[0][1], "activation": used_activation, "probabilities": probabilities}
            return written, [first]

        return verb, shown

    columns = [Column("name"), Column("label", _width(names or ["x" * 20])), Column("probability", 11, True)]
    settings = {"labels": names, "templates": prompts, "activation": activation, "top": top}
    written = ("name", "label", "probability", "activation")
    run = TableRun("classify", "classifying", written, settings, _has_labels(output, names), True)
    return run.run(paths, output, runtime, OutputTable(columns, as_json=runtime.json), process)


def embed(
    *paths: Paths, out: Annotated[Path, Parameter(metavar="FILE")], runtime: DeviceListOptions = _DEVICES
) -> int:
    """Embed every image as a vector of unit length, for search and comparison.

    Args:
        out: FILE.npy (float32, one row per image; the names go to FILE.names.txt) or FILE.parquet (columns name and
            embedding). Written completely or not at all; replaces an existing file, unless that was made of the same
            model and images. The same command resumes an interrupted run.
    """
    from sightloop.annotation.result_table import EmbeddingFile, EmbeddingJournal

    runtime.names()
    check_model("embed", runtime)
    file = EmbeddingFile(out, runtime.source, _origin(paths, runtime))
    inputs = read_ahead(paths, videos=True)
    if inputs.images is None:
        return report_without_images("embedding", inputs)
    if file.is_current:
        with ProgressReporter("embedding", OutputTable([])) as progress:
            for item in chain(inputs.events, inputs.images):
                progress.event(Skipped(item, "it is embedded already") if isinstance(item, str) else item)
            progress.message(f"{out}: holds the embeddings of these images by {runtime.source} already.")
        return progress.status
    with ExitStack() as stack:
        journal = stack.enter_context(closing(EmbeddingJournal(out, repr(_settings(runtime)))))
        start_reading()
        model = models_for(stack, "embed", runtime)

        def verb(images: list[Pixels]) -> list[Floats32]:
            return list(model.embed_images(images))  # n rows [d]; [q, d] of a BLIP-2

        progress = stack.enter_context(ProgressReporter("embedding", OutputTable([]), RESUME_HINT))
        waiting = (
            Skipped(item, "it is embedded already") if isinstance(item, str) and item in journal else item
            for item in inputs.images
        )
        remaining = replace(inputs, images=waiting)
        for event in run_verb(progress, runtime, model, remaining, verb, journal.note_skipped):
            journal.add(event.name, event.value)
        with file:
            for name in journal.images:
                file.add([name], journal.vectors(name)[None])  # [1, d]
            if progress.counts["failed"]:
                file.forget()
        journal.remove()
        if file.rows:
            progress.message(f"{out}: {file.rows:,} rows.")
        elif progress.counts.total():
            progress.message(f"{out}: not written, because no image was embedded.")
    return progress.status


def _reader_of_frames(model: Model, count: int) -> ImageReader:
    """Reader of images, and of so many frames of each video as BLIP chooses them."""
    from sightloop.data.video.sampling import blip

    return model.encoder.sampling(blip(count)).preprocessor


def _has_all(questions: Sequence[str]) -> Callable[[list[JsonDict]], bool]:
    """Whether the rows of an image have an answer to every question."""
    return lambda rows: {row.get("question") for row in rows} >= set(questions)


def _has_labels(output: TableOptions, names: Sequence[str] | None) -> Callable[[list[JsonDict]], bool]:
    """Whether an image has rows.

    Raises:
        UsageError: The rows have labels that are none of these: other labels were asked for.
    """

    def has_rows(rows: list[JsonDict]) -> bool:
        other = next((row.get("label") for row in rows if names and row.get("label") not in names), None)
        if other is not None:
            raise UsageError(
                f"--out {output.out}: has the label {other!r}, which is not among --labels; name another file, or "
                "replace it with --write overwrite."
            )
        return bool(rows)

    return has_rows


def _origin(paths: Sequence[str], runtime: RuntimeOptions) -> str:
    """Digest of what embeddings are made of; "" if that is not all there."""
    from sightloop.annotation.result_table import digest_of_files

    folders = [] if runtime.lora is None else [runtime.lora]
    settings = _settings(runtime)[:4]
    try:
        files = [
            *checkpoint_files(runtime.source),
            *(file for each in folders for file in sorted(each.iterdir())),
        ]
        items = list(list_images(paths, videos=True))
        if any(isinstance(item, Failed) for item in items):
            return ""
        return digest_of_files(settings, [*files, *(item for item in items if isinstance(item, str))])
    except OSError:
        return ""


def _settings(runtime: RuntimeOptions) -> tuple[object, ...]:
    """What decides the embedding of an image."""
    weights = weights_identity(runtime.source, runtime.lora)
    return runtime.source, runtime.dtype, runtime.quantize, runtime.max_pixels, weights


def _check_labels(
    labels: str | None, templates: list[str] | None, top: int | None
) -> tuple[list[str] | None, tuple[str, ...]]:
    """The labels, None for those of the model, and the templates of `classify`.

    Raises:
        UsageError: A value is wrong, or options contradict each other.
    """
    names = None if labels is None else parse_entries("--labels", labels)
    if names is not None and len(names) < 2:
        raise UsageError(
            "--labels: give at least two; the probability of a single one is always 1 (`match` scores one text)."
        )
    if templates and names is None:
        raise UsageError("--templates: needs --labels; the classes of a fine-tuned model have no templates.")
    prompts = tuple(templates or ("a photo of a {}.",))
    for prompt in prompts:
        if "{}" not in prompt:
            raise UsageError(f"--templates {prompt!r}: put {{}} where the label goes.")
    if top is not None and top < 1:
        raise UsageError(f"--top {top}: must be at least 1.")
    return names, prompts


def _width(texts: Sequence[str]) -> int:
    """Width of a column that holds the texts: that of the longest, 5 to 40 characters."""
    return min(max(5, *map(len, texts)), 40)


COMMANDS = {verb: _EPILOGUES[verb.__name__] for verb in (ask, classify, embed)}
