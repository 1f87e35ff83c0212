"""The command `sightloop train`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sightloop.apps.cli.checks import check_checkpoint, check_data, check_output_folder
from sightloop.apps.cli.common import prepare_threads
from sightloop.apps.cli.output import say_if_slow
from sightloop.apps.cli.train_view import show_training
from sightloop.errors import UsageError
from sightloop.training.events import RunEnded, RunStarted
from sightloop.training.recipe_names import (
    RECIPE_DESCRIPTIONS,
    check_recipe,
    check_training,
    finished_run,
)

_EPILOGUE = "\n".join(
    [
        "Recipes:",
        *(f"  {name:<20} {description}" for name, description in RECIPE_DESCRIPTIONS.items()),
        "",
        "Examples:",
        "  sightloop train captioner --data photos --out run",
        "  sightloop train blip_pretrain -d 'shards/{000..099}.tar' -o run --set optimizer.lr=1e-4 epochs=3",
        "  torchrun --nproc-per-node 8 -m sightloop train clip_pretrain --data pairs.csv --out run",
    ]
)


def train(
    recipe: Annotated[str, Parameter(name="RECIPE")],
    /,
    *,
    data: Annotated[list[str], Parameter(alias="-d", negative=(), consume_multiple=True)],
    out: Annotated[Path, Parameter(alias="-o", metavar="FOLDER")],
    set: Annotated[
        list[str] | None, Parameter(metavar="NAME=VALUE", negative=(), consume_multiple=True)
    ] = None,
    evaluate: Annotated[str | None, Parameter(metavar="DATA")] = None,
    device: str = "auto",
    tensorboard: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> int:
    """Train or fine-tune a model on your own images.

    The output folder gets the trained model (model/), the curves (report.html), all metrics (metrics.jsonl) and
    checkpoints. An interrupted run is resumed by the same command.

    Args:
        recipe: A recipe, see below, or a JSON file such as the recipe.json of a run.
        data: Folder of images with .txt files, CSV, JSONL, Parquet or COCO file, or .tar shards; several are
            concatenated.
        out: Output folder of the run.
        set: Change values of the recipe: --set optimizer.lr=1e-4 epochs=3. An unknown name or a wrong type is an
            error before the run starts.
        evaluate: Data for validation during training, and for the threshold of the filter recipe; the same as --set
            evaluation.data=DATA. Default: no validation; the threshold is set on held-out training images.
        device: cpu, cuda, or auto: a GPU if there is one.
        tensorboard: Also write TensorBoard logs to FOLDER/tensorboard.
        json: Print each event as one JSON object per line instead of the curves.
    """
    settings = list(set or [])
    if evaluate is not None:
        settings.append(f"evaluation.data={evaluate}")
    prepare_threads()
    with say_if_slow("starting ..."):
        _check(recipe, data, out, settings, device)
        check_training(recipe, data, out, settings)  # before torch is imported, which takes seconds
        if not tensorboard and "WORLD_SIZE" not in os.environ and (finished := finished_run(out)) is not None:
            return _show_finished(finished, json=json)
        from sightloop.training.trainer import train as run_train

    events = run_train(recipe, data, out, settings=settings, device=device, tensorboard=tensorboard)
    return show_training(events, json=json)


def _show_finished(finished: tuple[RunStarted, RunEnded], *, json: bool) -> int:
    """Says that a run has nothing left to do; returns the exit status, 0."""
    if json:
        return show_training(finished, json=True)
    ended = finished[1]
    print(f"Finished already, after {ended.step:,} steps. The model: {ended.folder}")
    return 0


def _check(recipe: str, data: list[str], out: Path, settings: list[str], device: str) -> None:
    """Checks the recipe, its changes and the paths before the trainer and torch are loaded.

    Raises:
        UsageError: A recipe, a setting or a path is wrong.
        CheckpointError: There is no such model as the recipe starts from.
    """
    check_data("--data", data)
    if not re.fullmatch(r"auto|cpu|(cuda|xpu)(:\d+)?|mps", device):
        raise UsageError(f"--device {device}: use auto, cpu, or cuda.")
    check_output_folder("--out", out)
    evaluation_data, checkpoint = check_recipe(recipe, settings)
    if evaluation_data:
        check_data("--evaluate", [evaluation_data])
    if checkpoint:
        check_checkpoint(checkpoint)


COMMANDS = {train: _EPILOGUE}
