"""The command `sightloop convert`."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

import sightloop
from sightloop.apps.cli.options import whole
from sightloop.apps.cli.output import OutputTable, Screen
from sightloop.errors import UsageError

_EPILOGUE = (
    "Examples:\n"
    "  sightloop convert photos 'shards/{000..}.tar' --shard-size 1000\n"
    "  sightloop convert 'shards/{000..005}.tar' captions.jsonl\n"
    "  sightloop convert captions_val.json instances_val.json val.parquet --images val2017"
)


def convert(
    *paths: Annotated[str, Parameter(name="SRC... DST", required=True, allow_leading_hyphen=True)],
    to: Literal["folder", "tar", "parquet", "csv", "tsv", "jsonl", "coco"] | None = None,
    shard_size: Annotated[int, Parameter(converter=whole)] = 10_000,
    images: Annotated[Path | None, Parameter(metavar="FOLDER")] = None,
    overwrite: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> int:
    """Convert a set of images and texts from any form to any other.

    A source is a folder of images with .txt or .json files beside them,
    .csv, .tsv, .jsonl, COCO's .json, .parquet, or .tar shards ({000..005} and
    globs too; - is standard input). The target's name says its kind: a
    folder/, x.csv, x.tsv, x.jsonl, x.json (COCO), x.parquet, x.tar or
    x-{000..}.tar. It is written whole or not at all; images stay as they
    are, byte for byte. What the target cannot hold is said.

    Parameters
    ----------
    paths
        One source or more, then the target.
    to
        The target's kind, where its name does not say it; tar with a folder writes shards in it.
    shard_size
        Samples in a shard.
    images
        The folder that the paths in a table or in COCO's json start from.
    overwrite
        Replace the target; a folder only if it was written by this command.
    json
        Print the summary as one JSON object.
    """
    if len(paths) < 2:
        raise UsageError("convert: name the source and, last, the target.")
    from sightloop.data.datasets.convert import convert as run

    *sources, target = paths
    dataset = sightloop.open_dataset(sources, images=images)
    with Screen("converting", OutputTable([])) as screen:
        if "-" not in sources:
            screen.count_ahead(lambda: len(dataset))
        done = run(dataset, target, to=to, shard_size=shard_size, overwrite=overwrite, notify=screen.event)
        for note in done.notes:
            screen.say(f"Note: {note}.")
        screen.say(f"{target}: {done.samples:,} samples.")
    if json:
        print(jsonlib.dumps(asdict(done)))
    return screen.status


COMMANDS = {convert: _EPILOGUE}
