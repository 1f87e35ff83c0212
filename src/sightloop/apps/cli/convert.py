"""The command `sightloop convert`."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

import sightloop
from sightloop.apps.cli.checks import check_data
from sightloop.apps.cli.options import integer
from sightloop.apps.cli.output import OutputTable, ProgressReporter
from sightloop.errors import UsageError

_EPILOGUE = (
    "Examples:\n"
    "  sightloop convert photos 'shards/{000..}.tar' --shard-size 1000\n"
    "  sightloop convert 'shards/{000..005}.tar' captions.jsonl\n"
    "  sightloop convert captions_val.json instances_val.json val.parquet --images val2017"
)


def convert(
    *paths: Annotated[str, Parameter(name="SRC... DST", required=True, allow_leading_hyphen=True)],
    to: Literal["folder", "imagefolder", "yolo", "tar", "parquet", "csv", "tsv", "jsonl", "coco"]
    | None = None,
    shard_size: Annotated[int, Parameter(converter=integer)] = 10_000,
    images: Annotated[Path | None, Parameter(metavar="FOLDER")] = None,
    overwrite: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    dedupe: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> int:
    """Convert an image dataset to another format.

    A source is a folder of images with .txt or .json files next to them, a .csv, .tsv, .jsonl, .parquet or COCO .json
    file, or .tar shards (WebDataset; {000..005} and globs name several, - is standard input). The name of the target
    gives its format: folder/, x.csv, x.tsv, x.jsonl, x.json (COCO), x.parquet, x.tar or x-{000..}.tar.

    Image bytes are copied unchanged. The target is written completely or not at all, and fields that it cannot hold
    are reported.

    Args:
        paths: One or more sources, then the target.
        to: Format of the target. Default: by its name. With a folder, `--to tar` writes shards into it, `--to yolo`
            writes images/, labels/ and data.yaml, and `--to imagefolder` what Hugging Face `datasets` reads.
        shard_size: Samples per .tar shard.
        images: Folder that relative image paths in a table or a COCO file start from. Default: the file's folder.
        overwrite: Replace an existing target; a folder only if this command has written it.
        dedupe: Leave out identical images and copies (re-encoded, resized, cropped, mirrored, turned), with their
            captions; of each group the largest image stays.
        json: Print the summary as one JSON object.
    """
    if len(paths) < 2:
        raise UsageError("convert: name at least one source and, last, the target.")
    *sources, target = paths
    check_data("SRC", sources)
    from sightloop.data.datasets.convert import convert as run_convert

    dataset = sightloop.open_dataset(sources, images=images)
    with ProgressReporter("converting", OutputTable([])) as progress:
        if "-" not in sources:
            progress.count_ahead(lambda: len(dataset))
        if dedupe:
            progress.message("searching copies ...")
        summary = run_convert(
            dataset,
            target,
            to=to,
            shard_size=shard_size,
            overwrite=overwrite,
            dedupe=dedupe,
            notify=progress.event,
        )
        for note in summary.notes:
            progress.message(f"Note: {note}.")
        progress.message(f"{target}: {summary.samples:,} samples.")
    if json:
        print(jsonlib.dumps(asdict(summary)))
    return progress.status


COMMANDS = {convert: _EPILOGUE}
