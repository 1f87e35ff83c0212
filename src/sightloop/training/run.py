"""A training run, opened: its folder, its networks, its state."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sightloop.data.atomic import lock_folder, write_json
from sightloop.data.datasets.dataset import Dataset, open_dataset
from sightloop.errors import SightloopError, UsageError
from sightloop.nn.lora import add_lora
from sightloop.nn.regularization import set_activation_checkpointing
from sightloop.protocols import Embedder, require
from sightloop.training import checkpoint, optimizer
from sightloop.training.build import TrainableModel, build_model
from sightloop.training.calibration import split_held_out
from sightloop.training.checkpoint import TrainState
from sightloop.training.compile import check_compiler, compile_blocks
from sightloop.training.config import Recipe, from_json, to_json
from sightloop.training.distributed import (
    World,
    agree,
    barrier,
)
from sightloop.training.ema import ema_copy
from sightloop.training.monitor import TrainingMonitor, patience_for
from sightloop.types import JsonDict, JsonMapping

if TYPE_CHECKING:
    from sightloop.training.fsdp import FSDP


@dataclass(eq=False)
class TrainRun:
    """Everything of a run that is going on."""

    recipe: Recipe
    folder: Path
    world: World
    dataset: Dataset
    model: TrainableModel
    state: TrainState
    fsdp: FSDP | None
    steps: int
    monitor: TrainingMonitor
    damaged: list[str]
    held_out: Dataset | None  # kept out of the training, for calibration
    skipped: set[str] = field(default_factory=set[str])

    @property
    def steps_per_epoch(self) -> int:
        """Rounded, at least 1."""
        return max(1, round(len(self.dataset) / self.recipe.data.batch))


def open_run(
    recipe: Recipe, data: str | Sequence[str], folder: Path, ranks: World, held: ExitStack
) -> TrainRun:
    """Opens a run: checks its data, claims its folder, builds its networks, and resumes from its last checkpoint."""
    dataset = open_dataset(data)
    if dataset.is_stream:
        raise UsageError(
            f"{data}: a stream has no order to shuffle; `sightloop convert` makes shards or a table of it"
        )
    if len(dataset) < 2:
        raise UsageError(f"{data}: {len(dataset)} samples; a training needs two at least")
    if recipe.compile:
        check_compiler(ranks.device)
    if ranks.first:
        held.enter_context(_claimed(folder, recipe, dataset))
    dataset, kept_out = split_held_out(dataset) if _holds_out(recipe) else (dataset, None)
    if ranks.first:
        model = build_model(recipe, dataset, folder)
    barrier(ranks)
    if not ranks.first:
        model = build_model(recipe, dataset, folder)
    state, shards = _state(recipe, model, ranks)  # pyright: ignore[reportPossiblyUnboundVariable]
    steps = recipe.steps or max(1, math.ceil(recipe.epochs * len(dataset) / recipe.data.batch))
    damaged = checkpoint.resume(state, folder)
    if not agree([state.step], ranks):
        raise SightloopError(
            f"{folder}: processes find different checkpoints there; it must be one shared folder"
        )
    bounds = optimizer.CLAMPS if "siglip" not in recipe.terms else {}
    watch = TrainingMonitor(patience=patience_for(steps), bounds=bounds, state=state.notes.get("watch"))
    return TrainRun(recipe, folder, ranks, dataset, model, state, shards, steps, watch, damaged, kept_out)  # pyright: ignore[reportPossiblyUnboundVariable]


@contextmanager
def _claimed(folder: Path, recipe: Recipe, dataset: Dataset) -> Generator[None]:
    """Make the folder this run's, or make sure that it is. How often it evaluates and saves may change."""
    path = folder / "recipe.json"
    ours = {"recipe": to_json(recipe), "data": dataset.fingerprint}
    if path.exists():
        theirs = json.loads(path.read_text("utf-8"))
        if _essence(theirs) != _essence(ours):
            raise UsageError(f"{folder} holds a run with another recipe or other data; choose another --out")
    elif folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is there already and holds no run; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        write_json(ours, path)
        yield


def _essence(stored: JsonMapping) -> JsonDict:
    free = {"evaluation", "save_every", "keep_last", "shard"}
    recipe = from_json(stored["recipe"])  # settings that are newer than the run have their defaults
    kept = {name: value for name, value in to_json(recipe).items() if name not in free}
    return {"data": stored["data"], "recipe": kept, "holds out": _holds_out(recipe)}


def calibrates(recipe: Recipe) -> bool:
    """Whether the ITM threshold is set at the end of the run."""
    return recipe.calibrate and recipe.terms.get("itm", 0) > 0


def _holds_out(recipe: Recipe) -> bool:
    return calibrates(recipe) and not recipe.evaluation.data


def _state(recipe: Recipe, model: TrainableModel, ranks: World) -> tuple[TrainState, FSDP | None]:
    network = model.network
    if recipe.model.lora:
        add_lora(
            network,
            recipe.model.lora,
            rank=recipe.model.lora_rank,
            alpha=recipe.model.lora_alpha,
            seed=recipe.seed,
        )
    optimizer.freeze(network, recipe.model.frozen)
    if model.labels:  # new, and never frozen
        network.get_submodule("classes").requires_grad_(True)
    network.to(ranks.device).train()
    model.heads.to(ranks.device).train()
    set_activation_checkpointing(network, recipe.activation_checkpointing)
    if recipe.compile:
        compile_blocks(network)
    teaches = recipe.teacher.momentum > 0 and recipe.terms.get("itc", 0) > 0
    teacher = ema_copy(network) if teaches else None
    average = ema_copy(network) if recipe.ema else None
    shards = _shards(recipe, [one for one in (network, teacher, average) if one is not None], ranks)
    both = torch.nn.ModuleDict({"network": network, "heads": model.heads})
    state = TrainState(
        network=network,
        heads=model.heads,
        teacher=teacher,
        average=average,
        queue=_queue(recipe, network, ranks) if teaches and recipe.teacher.queue else {},
        optimizer=optimizer.build_optimizer(both, recipe.optimizer),
        step=0,
        notes={"pointer": 0},
    )
    checkpoint.init_optimizer_state(state.optimizer)
    return state, shards


def _shards(recipe: Recipe, networks: Sequence[torch.nn.Module], ranks: World) -> FSDP | None:
    if not recipe.shard or ranks.world_size == 1:
        return None
    from sightloop.training.fsdp import FSDP  # loads torch's distributed tensors, which takes a second

    return FSDP(networks, ranks, bfloat16=recipe.precision == "bfloat16")


def _queue(recipe: Recipe, network: torch.nn.Module, ranks: World) -> dict[str, Tensor]:
    """Random unit vectors at first, as in BLIP's released code; they belong to no sample."""
    random = torch.Generator().manual_seed(recipe.seed)
    shape = (recipe.teacher.queue, require(network, Embedder).embed_dim)
    queue = {
        name: torch.nn.functional.normalize(torch.randn(shape, generator=random), dim=1).to(ranks.device)
        for name in ("image", "text")
    }
    return queue | {"ids": torch.full(shape[:1], -1, dtype=torch.int64, device=ranks.device)}
