"""The commands `sightloop ask`, `classify`, `match` and `embed`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from sightloop.apps.cli.checks import check_texts, checkpoint_files, fine_tuned_labels, read_ahead
from sightloop.apps.cli.common import (
    Paths,
    check_model,
    list_images,
    model_for,
    report_without_images,
    run_verb,
)
from sightloop.apps.cli.options import DecodingOptions, RuntimeOptions, integer, parse_entries
from sightloop.apps.cli.output import Column, OutputTable, ProgressReporter
from sightloop.errors import UsageError
from sightloop.types import Failed, Pixels, Skipped

if TYPE_CHECKING:
    from sightloop.types import Floats32

_DECODING, _RUNTIME = DecodingOptions(), RuntimeOptions()

_EPILOGUES = {
    "ask": (
        "Examples:\n"
        "  sightloop ask photos -m Salesforce/blip-vqa-base -q 'how many people are there?'\n"
        "  sightloop ask photos -m M -q 'is it day or night?' --candidates day,night --json"
    ),
    "classify": (
        "Examples:\n"
        "  sightloop classify photos -m openai/clip-vit-base-patch32 --labels cat,dog,bird\n"
        "  sightloop classify photos -m M --labels classes.txt --templates 'a sketch of a {}.' --top 5\n"
        "  sightloop classify photos -m run/model"
    ),
    "match": (
        "Examples:\n  sightloop match photo.jpg 'a dog on a beach' 'a cat' -m Salesforce/blip-itm-base-coco"
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
    decoding: DecodingOptions = _DECODING,
    runtime: RuntimeOptions = _RUNTIME,
) -> int:
    """Answer questions about every image (visual question answering).

    Args:
        questions: A question; repeat the option for several. Each image is encoded once for all questions.
        candidates: Rank these answers instead of generating one: a,b,c or a file with one per line.
            Default: generate.
    """
    options = decoding.as_kwargs()
    choices = None if candidates is None else parse_entries("--candidates", candidates)
    check_texts("--questions", questions)
    check_model("answer", runtime)
    inputs = read_ahead(paths)
    if inputs.images is None:
        return report_without_images("answering", inputs)
    model = model_for("answer", runtime)

    def verb(images: list[Pixels]) -> list[list[str]]:
        # Every image with every question; the model encodes each distinct image of a batch once.
        pairs = [image for image in images for _ in questions]
        answers = model.answer(pairs, questions * len(images), candidates=choices, **options)
        return [answers[i : i + len(questions)] for i in range(0, len(answers), len(questions))]

    columns = [Column("name"), Column("question"), Column("answer", 24)]
    with ProgressReporter("answering", OutputTable(columns, as_json=runtime.json)) as progress:
        for event in run_verb(progress, runtime, model, inputs, verb):
            for question, answer in zip(questions, event.value, strict=True):
                progress.row({"name": event.name, "question": question, "answer": answer})
    return progress.status


def classify(
    *paths: Paths,
    labels: Annotated[str | None, Parameter(metavar="A,B,...|FILE")] = None,
    templates: Annotated[list[str] | None, Parameter(negative=(), consume_multiple=False)] = None,
    top: Annotated[int | None, Parameter(converter=integer)] = None,
    activation: Literal["softmax", "sigmoid"] | None = None,
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
    inputs = read_ahead(paths)
    if inputs.images is None:
        return report_without_images("classifying", inputs)
    model = model_for("classify", runtime)
    if not (shown_labels := names or model.labels):
        raise UsageError(f"--labels: {model.name} was not fine-tuned on classes; give labels.")
    count = top or (len(shown_labels) if runtime.json else 3)
    # Classes that were learned have a softmax always; labels have what the model was trained with.
    used_activation = (
        model.activation if names is not None and activation is None else activation or "softmax"
    )

    def verb(images: list[Pixels]) -> list[list[float]]:
        return model.classify(images, names, prompts, activation=activation).tolist()

    heading = "probability" if used_activation == "softmax" else used_activation
    columns = [Column("name"), Column("label", _width(shown_labels)), Column(heading, 11, True)]
    with ProgressReporter("classifying", OutputTable(columns, as_json=runtime.json)) as progress:
        for event in run_verb(progress, runtime, model, inputs, verb):
            best = sorted(zip(event.value, shown_labels, strict=True), key=lambda pair: -pair[0])[:count]
            if runtime.json:
                progress.row(
                    {
                        "name": event.name,
                        "label": best[0][1],
                        "activation": used_activation,
                        "probabilities": {label: probability for probability, label in best},
                    }
                )
                continue
            for probability, label in best:
                progress.row({"name": event.name, "label": label, heading: probability})
    return progress.status


def match(
    image: Annotated[str, Parameter(name="IMAGE")],
    /,
    *texts: Annotated[str, Parameter(name="TEXTS", required=True)],
    runtime: RuntimeOptions = _RUNTIME,
) -> int:
    """Score how well texts describe one image: the image-text matching (ITM) probability of each, 0 to 1.

    Args:
        image: An image file.
        texts: One or more texts, each in quotes.
    """
    if not texts:
        raise UsageError("TEXTS: give at least one text.")
    check_texts("TEXTS", texts)
    if os.path.isdir(image):
        raise UsageError(f"{image}: is a folder; `match` takes one image.")
    check_model("match", runtime)
    inputs = read_ahead([image])
    if inputs.images is None:
        return report_without_images("matching", inputs)
    model = model_for("match", runtime)

    def verb(images: list[Pixels]) -> list[list[float]]:
        return [model.match(pixels, list(texts)).tolist() for pixels in images]

    columns = [Column("text", _width(texts)), Column("match", 6, True)]
    with ProgressReporter("matching", OutputTable(columns, as_json=runtime.json)) as progress:
        for event in run_verb(progress, runtime, model, inputs, verb):
            for text, probability in zip(texts, event.value, strict=True):
                progress.row({"name": event.name, "text": text, "match": probability})
    return progress.status


def embed(
    *paths: Paths, out: Annotated[Path, Parameter(metavar="FILE")], runtime: RuntimeOptions = _RUNTIME
) -> int:
    """Embed every image as a vector of unit length, for search and comparison.

    Args:
        out: FILE.npy (float32, one row per image; the names go to FILE.names.txt) or FILE.parquet (columns name and
            embedding). Written completely or not at all; replaces an existing file, unless that was made of the same
            model and images.
    """
    from sightloop.annotation.embedding_file import EmbeddingFile

    check_model("embed", runtime)
    file = EmbeddingFile(out, runtime.source, _origin(paths, runtime))
    inputs = read_ahead(paths)
    if inputs.images is None:
        return report_without_images("embedding", inputs)
    if file.is_current:
        with ProgressReporter("embedding", OutputTable([])) as progress:
            for item in chain(inputs.events, inputs.images):
                progress.event(Skipped(item, "it is embedded already") if isinstance(item, str) else item)
            progress.message(f"{out}: holds the embeddings of these images by {runtime.source} already.")
        return progress.status
    model = model_for("embed", runtime)

    def verb(images: list[Pixels]) -> list[Floats32]:
        return list(model.embed_images(images))  # n rows [d]; [q, d] of a BLIP-2

    with ProgressReporter("embedding", OutputTable([])) as progress:
        with file:
            for event in run_verb(progress, runtime, model, inputs, verb):
                file.add([event.name], event.value[None])  # [1, d]
            if progress.counts["failed"]:
                file.forget()
        if file.rows:
            progress.message(f"{out}: {file.rows:,} rows.")
        elif progress.counts.total():
            progress.message(f"{out}: not written, because no image was embedded.")
    return progress.status


def _origin(paths: Sequence[str], runtime: RuntimeOptions) -> str:
    """Digest of what embeddings are made of; "" if that is not all there."""
    from sightloop.annotation.embedding_file import digest_of_files

    folders = [] if runtime.lora is None else [runtime.lora]
    settings = (runtime.source, runtime.dtype, runtime.quantize, runtime.max_pixels)
    try:
        files = [
            *checkpoint_files(runtime.source),
            *(file for each in folders for file in sorted(each.iterdir())),
        ]
        items = list(list_images(paths))
        if any(isinstance(item, Failed) for item in items):
            return ""
        return digest_of_files(settings, [*files, *(item for item in items if isinstance(item, str))])
    except OSError:
        return ""


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


COMMANDS = {verb: _EPILOGUES[verb.__name__] for verb in (ask, classify, match, embed)}
