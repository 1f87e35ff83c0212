"""The commands `sightloop ask`, `classify`, `match` and `embed`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from sightloop.apps.cli.common import Paths, model_for, run
from sightloop.apps.cli.options import DecodingOptions, MachineOptions, whole, words_or_file
from sightloop.apps.cli.output import Column, OutputTable, Screen
from sightloop.errors import UsageError

_DECODING, _MACHINE = DecodingOptions(), MachineOptions()

_EPILOGUES = {
    "ask": (
        "Examples:\n"
        "  sightloop ask photos -m Salesforce/blip-vqa-base -q 'how many people are there?'\n"
        "  sightloop ask photos -m M -q 'is it day or night?' --candidates day,night --json"
    ),
    "classify": (
        "Examples:\n"
        "  sightloop classify photos -m openai/clip-vit-base-patch32 --labels cat,dog,bird\n"
        "  sightloop classify photos -m M --labels classes.txt --template 'a sketch of a {}.' --top 5\n"
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
    question: Annotated[list[str], Parameter(name=["--question", "-q"], negative=(), consume_multiple=False)],
    candidates: Annotated[str | None, Parameter(metavar="A,B,...|FILE")] = None,
    decoding: DecodingOptions = _DECODING,
    machine: MachineOptions = _MACHINE,
) -> int:
    """Answer questions about every image.

    Parameters
    ----------
    question
        A question; give -q again for more. Each image is read once for all of them.
    candidates
        The answers to choose from: a,b,c or a file with one a line. Without them the model writes its own.
    """
    machine.check()
    options = decoding.given()
    choices = None if candidates is None else words_or_file("--candidates", candidates)
    if any(not text.strip() for text in question):
        raise UsageError("-q: the question is empty.")
    model = model_for("answer", machine)

    def verb(pictures: list[Any]) -> list[list[str]]:
        pairs = [picture for picture in pictures for _ in question]  # the model encodes each image once
        answers = model.answer(pairs, question * len(pictures), candidates=choices, **options)
        return [answers[i : i + len(question)] for i in range(0, len(answers), len(question))]

    columns = [Column("name"), Column("question"), Column("answer", 24)]
    with Screen("answering", OutputTable(columns, as_json=machine.json)) as screen:
        for event in run(screen, machine, model, paths, verb):
            for text, answer in zip(question, event.value, strict=True):
                screen.row({"name": event.name, "question": text, "answer": answer})
    return screen.status


def classify(
    *paths: Paths,
    labels: Annotated[str | None, Parameter(metavar="A,B,...|FILE")] = None,
    template: Annotated[list[str] | None, Parameter(negative=(), consume_multiple=False)] = None,
    top: Annotated[int | None, Parameter(converter=whole)] = None,
    activation: Literal["softmax", "sigmoid"] | None = None,
    machine: MachineOptions = _MACHINE,
) -> int:
    """Say which of your labels fits each image best, without training, or which class of those it was trained for.

    Parameters
    ----------
    labels
        The labels: a,b,c or a file with one a line.
        Without them: the classes that the model was fine-tuned for (sightloop train classify).
    template
        A sentence with {} in the place of the label; give it again for more, which are averaged.
        Without it: "a photo of a {}."
    top
        Show this many of the best labels. Without it: 3 in the table, all with --json.
    activation
        softmax: which label it is, adding up to 1; sigmoid: whether it is this one (SigLIP). Default: as trained.
    """
    machine.check()
    names, sentences = _label_options(labels, template, top)
    model = model_for("classify", machine)
    if not (shown_names := names or model.labels):
        raise UsageError(f"--labels: name some; {model.name} was not fine-tuned for classes of its own.")
    shown = top or (len(shown_names) if machine.json else 3)

    read_as = model.activation if names is not None and activation is None else activation or "softmax"

    def verb(pictures: list[Any]) -> list[list[float]]:
        return model.classify(pictures, names, sentences, activation=activation).tolist()

    heading = {"softmax": "probability"}.get(read_as, read_as)
    columns = [Column("name"), Column("label", _width(shown_names)), Column(heading, 11, True)]
    with Screen("classifying", OutputTable(columns, as_json=machine.json)) as screen:
        for event in run(screen, machine, model, paths, verb):
            best = sorted(zip(event.value, shown_names, strict=True), key=lambda pair: -pair[0])[:shown]
            if machine.json:
                scores = {label: probability for probability, label in best}
                found = {
                    "name": event.name,
                    "label": best[0][1],
                    "activation": read_as,
                    "probabilities": scores,
                }
                screen.row(found)
                continue
            for probability, label in best:
                screen.row({"name": event.name, "label": label, heading: probability})
    return screen.status


def match(
    image: str,
    *texts: Annotated[str, Parameter(name="TEXTS", required=True)],
    machine: MachineOptions = _MACHINE,
) -> int:
    """Judge how well texts describe one image: for each the probability, 0 to 1, that it matches.

    Parameters
    ----------
    image
        One image file.
    texts
        One or more texts; put them in quotes.
    """
    machine.check()
    if not texts:
        raise UsageError("TEXTS: give at least one text to judge.")
    if os.path.isdir(image):
        raise UsageError(f"{image}: this is a folder; match judges one image.")
    model = model_for("match", machine)

    def verb(pictures: list[Any]) -> list[list[float]]:
        return [model.match(picture, list(texts)).tolist() for picture in pictures]

    columns = [Column("text", _width(texts)), Column("match", 6, True)]
    with Screen("matching", OutputTable(columns, as_json=machine.json)) as screen:
        for event in run(screen, machine, model, [image], verb):
            for text, probability in zip(texts, event.value, strict=True):
                screen.row({"name": event.name, "text": text, "match": probability})
    return screen.status


def embed(
    *paths: Paths, out: Annotated[Path, Parameter(metavar="FILE")], machine: MachineOptions = _MACHINE
) -> int:
    """Turn every image into a vector of unit length, for search and comparison.

    Parameters
    ----------
    out
        x.npy (float32, one row an image; the names go to x.names.txt) or x.parquet (columns name and embedding). It is
        written whole or not at all, and replaces an older one.
    """
    from sightloop.annotation.embedding_file import EmbeddingFile

    machine.check()
    file = EmbeddingFile(out, machine.source)
    model = model_for("embed", machine)

    def verb(pictures: list[Any]) -> Any:
        return model.embed_images(pictures)

    with Screen("embedding", OutputTable([])) as screen:
        with file:
            for event in run(screen, machine, model, paths, verb):
                file.add([event.name], event.value[None])
        if file.rows:
            screen.say(f"{out}: {file.rows:,} rows.")
        elif screen.counts.total():
            screen.say(f"{out} was not written: there is no embedding to put in it.")
    return screen.status


def _label_options(
    labels: str | None, template: list[str] | None, top: int | None
) -> tuple[list[str] | None, tuple[str, ...]]:
    """The labels and sentences of `classify`. Raises UsageError for what cannot be meant."""
    names = None if labels is None else words_or_file("--labels", labels)
    if names is not None and len(names) < 2:
        raise UsageError(
            "--labels: give at least two; with one its probability is always 1 (`match` judges one text)."
        )
    if template and names is None:
        raise UsageError("--template: needs --labels; classes that were learned have no templates.")
    sentences = tuple(template or ("a photo of a {}.",))
    for text in sentences:
        if "{}" not in text:
            raise UsageError(f"--template {text!r}: put {{}} where the label goes.")
    if top is not None and top < 1:
        raise UsageError(f"--top {top}: must be at least 1.")
    return names, sentences


def _width(texts: Sequence[str]) -> int:
    return min(max(5, *map(len, texts)), 40)


COMMANDS = {verb: _EPILOGUES[verb.__name__] for verb in (ask, classify, match, embed)}
