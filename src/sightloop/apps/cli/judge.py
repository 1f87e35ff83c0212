"""The command `sightloop match`: scores of texts for one image, or of the captions that a dataset has."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from sightloop.apps.cli.checks import check_capability, check_checkpoint, check_data, check_texts, read_ahead
from sightloop.apps.cli.common import (
    check_model,
    loader_config,
    model_for,
    report_without_images,
    run_verb,
)
from sightloop.apps.cli.options import WRITE_GROUP, RuntimeOptions
from sightloop.apps.cli.output import (
    RESUME_HINT,
    Column,
    OutputTable,
    ProgressReporter,
    print_message,
    print_warning,
)
from sightloop.apps.cli.tables import TableOptions
from sightloop.checkpoints import catalog
from sightloop.checkpoints.hub import is_same_model, weights_identity
from sightloop.errors import UsageError
from sightloop.types import JsonDict, Pixels

if TYPE_CHECKING:
    from sightloop.annotation.judging import CaptionList, Scorer
    from sightloop.annotation.result_table import ResultTable
    from sightloop.data.datasets.dataset import Dataset
    from sightloop.inference.model import Model

_RUNTIME = RuntimeOptions()
_SHOWN = 30  # rows on a terminal
_EXPLAINED = 20  # captions of a dataset that --explain draws

_EPILOGUE = (
    "Examples:\n"
    "  sightloop match photo.jpg 'a dog on a beach' 'a cat' -m Salesforce/blip-itm-base-coco\n"
    "  sightloop match photos --out scores.csv -m Salesforce/blip-itm-base-coco\n"
    "  sightloop match captions.jsonl -m M --json\n"
    "  sightloop match photo.jpg 'a dog on a beach' -m M --explain maps"
)


@Parameter(name="*", group=WRITE_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class MatchOutput(TableOptions):
    """Where the scores of a dataset go."""

    explain: Annotated[Path | None, Parameter(metavar="FOLDER")] = None
    """Draw what the score looks at over each image, in this new folder: PNG and JSON. Of a dataset, of the 20 worst
    captions. Default: no drawings."""


_OUTPUT = MatchOutput()


def match(
    source: Annotated[str, Parameter(name="SOURCE")],
    /,
    *texts: Annotated[str, Parameter(name="TEXTS")],
    output: MatchOutput = _OUTPUT,
    runtime: RuntimeOptions = _RUNTIME,
) -> int:
    """Score how well texts describe an image, or the captions of a dataset describe its images.

    With texts: the image-text matching (ITM) probability of each, 0 to 1. Without: every caption that the images of a
    folder or dataset have, worst first, with a verdict. Its p is the share of captions of other images that fit the
    images as well: above 0.05, a caption cannot be told from one that belongs to another image.

    Args:
        source: An image file, to score texts; a folder with captions, CSV, JSONL, Parquet or COCO file, or .tar
            shards, to judge captions.
        texts: One or more texts, each in quotes.
    """
    if output.explain is not None:
        from sightloop.annotation.region_files import check_new_folder

        check_new_folder("--explain", output.explain)
    return _match_texts(source, texts, output, runtime) if texts else _judge(source, output, runtime)


def _match_texts(image: str, texts: Sequence[str], output: MatchOutput, runtime: RuntimeOptions) -> int:
    check_texts("TEXTS", texts)
    if os.path.isdir(image):
        raise UsageError(
            f"{image}: is a folder, and texts are scored for one image; without texts, its captions are judged."
        )
    if output.out is not None:
        raise UsageError("--out: is for the captions of a dataset; name a folder or a dataset, and no texts.")
    check_model("match", runtime)
    inputs = read_ahead([image], videos=True)
    if inputs.images is None:
        return report_without_images("matching", inputs)
    model = model_for("match", runtime)

    def verb(images: list[Pixels]) -> list[list[float]]:
        return [model.match(pixels, list(texts)).tolist() for pixels in images]

    columns = [Column("text", min(max(5, *map(len, texts)), 40)), Column("match", 6, True)]
    explained = None
    if output.explain is not None:
        from sightloop.annotation.region_files import ExplanationFolder

        explained = ExplanationFolder(output.explain, model)
    with ProgressReporter("matching", OutputTable(columns, as_json=runtime.json)) as progress:
        for event in run_verb(progress, runtime, model, inputs, verb):
            for text, probability in zip(texts, event.value, strict=True):
                progress.row({"name": event.name, "text": text, "match": probability})
                if explained is not None:
                    explained.add(event.name, Path(event.name), text, probability)
        if explained is not None:
            progress.message(f"{output.explain}: {explained.count:,} maps.")
    return progress.status


def _judge(source: str, output: MatchOutput, runtime: RuntimeOptions) -> int:
    """Judges the captions of a dataset."""
    from sightloop.annotation import judging

    capability = _check_judge(source, runtime)
    dataset = _open(source)
    judge = weights_identity(runtime.source, runtime.lora)
    settings = {"judge": judge, "by": capability}
    with ExitStack() as stack:
        table = stack.enter_context(_table(output, settings, judging.COLUMNS))
        listed = judging.list_captions(dataset, table)
        _say_what_calibrates(listed)
        _warn_of_own_captions(listed, judge)
        columns = [Column("name"), Column("caption"), Column("match", 8, True), Column("p", 6, True)]
        rows = OutputTable([*columns, Column("verdict", 12)], as_json=runtime.json)
        hint = RESUME_HINT if output.out is not None else ""
        progress = stack.enter_context(ProgressReporter("judging", rows, hint))
        model = model_for(capability, runtime) if listed.todo else None
        threshold = None
        if model is None:
            for index in range(len(dataset)):
                progress.event(listed.events[index])
        else:
            threshold = _threshold(model)
            if threshold is not None:
                print_message(
                    f"verdict: a match of {threshold} and more fits, as {model.name} was calibrated in training."
                )
            progress.start_clock()
            progress.count_ahead(lambda: len(dataset))
            loader = loader_config(runtime, model)
            events = judging.judge_captions(model, _scorer(model, capability), dataset, listed, table, loader)
            with closing(events):
                for event in events:
                    progress.event(event)
        judged = table.finish(lambda entries: judging.arrange_judgments(entries, threshold)) or []
        _report(judged, progress, runtime, output.out)
        if output.explain is not None and model is None:
            print_message("no maps: no caption was judged in this run.")
        elif output.explain is not None and model is not None:
            _explain_worst(output.explain, model, dataset, judged, listed)
    return progress.status


def _check_judge(source: str, runtime: RuntimeOptions) -> Literal["match", "similarity"]:
    """Checks the source and the model; the capability that scores: ITM, else the cosine of embeddings."""
    from sightloop.annotation.inputs import is_image_file

    if is_image_file(source):
        raise UsageError(f"{source}: give texts to score for this image, or name a folder or a dataset.")
    check_data("SOURCE", [source])
    runtime.check()
    entry = catalog.find_entry(runtime.source)
    capability = "match" if entry is None or "match" in entry.capabilities else "similarity"
    check_capability(runtime.model, capability)
    check_checkpoint(runtime.source)
    return capability


def _open(source: str) -> Dataset:
    from sightloop.data.datasets.dataset import open_dataset

    dataset = open_dataset(source)
    for note in dataset.notes:
        print_message(note)
    if dataset.is_stream:
        raise UsageError(f"{source}: a stream is read once; convert it to shards or a folder first.")
    return dataset


@contextmanager
def _table(output: MatchOutput, settings: JsonDict, columns: Sequence[str]) -> Generator[ResultTable]:
    """The table of --out, or without it one that is thrown away."""
    from sightloop.annotation.result_table import ResultTable

    with ExitStack() as stack:
        path = output.out
        if path is None:
            path = (
                Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sightloop-"))) / "scores.jsonl"
            )
        yield stack.enter_context(closing(ResultTable(path, output.write, settings, columns)))


def _scorer(model: Model, capability: Literal["match", "similarity"]) -> Scorer:
    """ITM probabilities, or cosines of embeddings, of images with texts of their own."""

    def match(images: list[Pixels], texts: list[list[str]]) -> list[list[float]]:
        pairs = [(image, text) for image, own in zip(images, texts, strict=True) for text in own]
        scores = iter(model.match([image for image, _ in pairs], [text for _, text in pairs]).tolist())
        return [[next(scores) for _ in own] for own in texts]

    def compare(images: list[Pixels], texts: list[list[str]]) -> list[list[float]]:
        distinct = list(dict.fromkeys(text for own in texts for text in own))
        cosines = model.similarity(images, distinct)  # [images, distinct]
        column = {text: i for i, text in enumerate(distinct)}
        return [[float(row[column[text]]) for text in own] for row, own in zip(cosines, texts, strict=True)]

    return match if capability == "match" else compare


def _threshold(model: Model) -> float | None:
    """0.5 for a model whose ITM head was calibrated in training (it then weighs the ITC cosine too)."""
    return 0.5 if getattr(model.network, "match_cosine", None) else None


def _say_what_calibrates(listed: CaptionList) -> None:
    if not listed.todo:
        return
    if listed.has_null:
        print_message(
            f"p: share of captions of other images that fit as well, from {len(listed.todo) * listed.foreign:,} pairs "
            f"of this dataset ({listed.foreign} foreign captions an image)."
        )
    else:
        print_message(
            f"no p-values: {listed.images} images with a caption and {len(listed.pool)} different captions are too few "
            "to tell what chance scores (20 of each are needed); the scores are raw."
        )


def _warn_of_own_captions(listed: CaptionList, judge: str) -> None:
    own = sum(count for writer, count in listed.writers.items() if is_same_model(writer, judge))
    if own:
        print_warning(
            f"{judge} wrote {own:,} of these captions itself: a model scores its own captions too high. Judge with "
            "another model (-m)."
        )


def _report(
    rows: Sequence[JsonDict], progress: ProgressReporter, runtime: RuntimeOptions, out: Path | None
) -> None:
    """Prints the rows, on a terminal the worst, and counts verdicts."""
    shown = rows if runtime.json or not sys.stdout.isatty() else rows[:_SHOWN]
    for row in shown:
        cells = {"p": "", "verdict": ""} | {k: v for k, v in row.items() if v is not None}
        progress.row(row if runtime.json else cells)
    if len(shown) < len(rows):
        progress.message(f"The worst {len(shown)} of {len(rows):,} captions; --out FILE or --json has all.")
    counts = {
        kind: sum(row.get("verdict") == kind for row in rows) for kind in ("does not fit", "doubtful", "fits")
    }
    if any(counts.values()):
        progress.message(
            "Captions: " + ", ".join(f"{count:,} {kind}" for kind, count in counts.items()) + "."
        )
    if out is not None and rows:
        progress.message(f"{out}: {len(rows):,} rows.")


def _explain_worst(
    folder: Path, model: Model, dataset: Dataset, rows: Sequence[JsonDict], listed: CaptionList
) -> None:
    """Draws maps of the worst captions that were judged in this run."""
    from sightloop.annotation.judging import captioned_image
    from sightloop.annotation.region_files import ExplanationFolder
    from sightloop.data.datasets.schema import portable_name

    indices: dict[str, int] = {}
    for index in listed.todo:
        item = captioned_image(dataset, index, by_key=index in listed.keys)
        indices[portable_name(item.name)] = index
    worst = [row for row in rows if row["name"] in indices][:_EXPLAINED]
    explained = ExplanationFolder(folder, model)
    for row in worst:
        sample = dataset[indices[row["name"]]]
        explained.add(row["name"], sample.image, row["caption"], float(row["match"]), sample.regions)
    print_message(f"{folder}: {explained.count:,} maps of the worst captions.")


COMMANDS = {match: _EPILOGUE}
