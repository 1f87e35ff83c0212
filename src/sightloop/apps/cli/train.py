"""The command that trains."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sightloop.apps.cli.train_view import show_training


def train(
    recipe: Annotated[str, Parameter(name="RECIPE")],
    *,
    data: Annotated[list[str], Parameter(alias="-d", negative=(), consume_multiple=True)],
    out: Annotated[Path, Parameter(alias="-o")],
    set: Annotated[list[str] | None, Parameter(name="--set", negative=(), consume_multiple=True)] = None,
    evaluate: Annotated[str | None, Parameter(name="--evaluate")] = None,
    device: str = "auto",
    tensorboard: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> int:
    """Train a model, or fine-tune one, on your own images.

    The same command goes on where it was stopped. OUT holds the model at the
    end (OUT/model), curves (OUT/report.html) and all numbers (OUT/metrics.jsonl).

    Parameters
    ----------
    recipe
        blip_pretrain, clip_pretrain, siglip_pretrain, masked_pretrain, captioner, filter, retrieval, vqa, classify,
        world, nano, or the recipe.json of a run.
    data
        A folder of images with .txt files, a CSV, JSONL, Parquet or COCO file, or tar shards; several are joined.
    out
        Where the run lives.
    set
        Settings of the recipe: --set optimizer.lr=1e-4 epochs=3. An unknown or ill-typed one is an error at once.
    evaluate
        Data to measure on while it trains, and to set a filter's threshold on: the same as --set evaluation.data=...
    device
        auto takes a GPU where there is one; or name it: cpu, cuda.
    tensorboard
        Also write OUT/tensorboard.
    json
        Print one JSON object for each event instead of the screen.
    """
    # A step is all matrix products: threads that wait for each other must not burn the cores of those that decode.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from sightloop.training.trainer import train as run

    settings = list(set or [])
    if evaluate is not None:
        settings.append(f"evaluation.data={evaluate}")
    events = run(recipe, data, out, settings=settings, device=device, tensorboard=tensorboard)
    return show_training(events, json=json)


COMMANDS = {
    train: (
        "Examples:\n"
        "  sightloop train captioner --data photos --out run\n"
        "  sightloop train blip_pretrain --data 'shards/{000..099}.tar' --out run --set optimizer.lr=1e-4 epochs=3\n"
        "  torchrun --nproc-per-node 8 -m sightloop train clip_pretrain --data pairs.csv --out run"
    )
}
