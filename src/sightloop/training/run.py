"""An open training run: its folder, networks and state."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sightloop.data.atomic import lock_folder, write_json
from sightloop.data.datasets.dataset import Dataset
from sightloop.errors import SightloopError
from sightloop.nn.lora import add_lora
from sightloop.nn.regularization import set_activation_checkpointing
from sightloop.objectives.positives import NO_TEXT
from sightloop.protocols import Embedder, require
from sightloop.training import checkpoint, optimizer
from sightloop.training.build import TrainableModel, build_model
from sightloop.training.calibration import split_held_out
from sightloop.training.checkpoint import TrainState
from sightloop.training.compile import check_compiler, compile_blocks
from sightloop.training.config import Recipe, to_json
from sightloop.training.distributed import (
    World,
    agree,
    barrier,
)
from sightloop.training.ema import ema_copy
from sightloop.training.monitor import TrainingMonitor, patience_for
from sightloop.training.requirements import (
    RECIPE_FILE,
    check_data,
    check_folder,
    count_steps,
    holds_out,
    open_training_data,
)

if TYPE_CHECKING:
    from sightloop.training.fsdp import FSDP


@dataclass(eq=False)
class TrainRun:
    """An open run on one process.

    Args:
        recipe: settings.
        folder: of the run.
        world: the processes.
        dataset: training data, without what is held out.
        model: the network with tokenizer and preprocessing.
        state: weights, optimizer, step: everything in a checkpoint.
        fsdp: sharding of the networks, None if they are not sharded.
        steps: of the whole run.
        monitor: watches the losses.
        damaged: a message for each checkpoint that cannot be read.
        held_out: images held out of the training for calibration, or None.
        data_warnings: of `requirements.check_data`.
        skipped: keys of samples that were reported as unusable.
        idle: no step of the run had a sample to learn from.
    """

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
    held_out: Dataset | None
    data_warnings: list[str]
    skipped: set[str] = field(default_factory=set[str])
    idle: bool = True

    @property
    def steps_per_epoch(self) -> int:
        """Batches in a pass over the data, rounded, at least 1."""
        return max(1, round(len(self.dataset) / self.recipe.data.batch))


def open_run(
    recipe: Recipe, data: str | Sequence[str], folder: Path, ranks: World, stack: ExitStack
) -> TrainRun:
    """Opens a run: checks its data, locks its folder, builds its networks, and resumes from its last checkpoint.

    Args:
        recipe: settings.
        data: dataset or datasets as `open_dataset` reads them.
        folder: of the run, new or with the same run.
        ranks: the processes, all of which call together.
        stack: releases the folder.

    Raises:
        UsageError: data or folder cannot be used, or the recipe does not fit them.
        SightloopError: no checkpoint can be read, or the processes see different ones.
    """
    dataset = open_training_data(data)
    warnings = check_data(recipe, dataset, data)
    if recipe.compile:
        check_compiler(ranks.device)
    if ranks.first:
        stack.enter_context(_locked(folder, recipe, dataset))
    dataset, held_out = split_held_out(dataset) if holds_out(recipe) else (dataset, None)
    model = _build_in_turn(recipe, dataset, folder, ranks)
    state, fsdp = _state(recipe, model, ranks)
    steps = count_steps(recipe, len(dataset))
    damaged = checkpoint.resume(state, folder)
    if not agree([state.step], ranks):
        raise SightloopError(
            f"{folder}: processes see different checkpoints in it; use a folder that all machines share"
        )
    bounds = optimizer.CLAMPS if "siglip" not in recipe.terms else {}
    terms = [name for name, weight in recipe.terms.items() if weight > 0]
    monitor = TrainingMonitor(
        patience=patience_for(steps), bounds=bounds, terms=terms, state=state.notes.get("watch")
    )
    return TrainRun(
        recipe=recipe,
        folder=folder,
        world=ranks,
        dataset=dataset,
        model=model,
        state=state,
        fsdp=fsdp,
        steps=steps,
        monitor=monitor,
        damaged=damaged,
        held_out=held_out,
        data_warnings=warnings,
        idle=state.step == 0,
    )


def _build_in_turn(recipe: Recipe, dataset: Dataset, folder: Path, ranks: World) -> TrainableModel:
    """Builds the networks, on the first process first: it saves a learned vocabulary, which the others read."""
    if not ranks.first:
        barrier(ranks)
        return build_model(recipe, dataset, folder)
    model = build_model(recipe, dataset, folder)
    barrier(ranks)
    return model


@contextmanager
def _locked(folder: Path, recipe: Recipe, dataset: Dataset) -> Generator[None]:
    """Locks a new folder, or that of the same run."""
    check_folder(folder, recipe, dataset)
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        write_json({"recipe": to_json(recipe), "data": dataset.fingerprint}, folder / RECIPE_FILE)
        yield


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
    if model.labels:  # the head of the classes is new
        network.get_submodule("classes").requires_grad_(True)
    network.to(ranks.device).train()
    model.heads.to(ranks.device).train()
    set_activation_checkpointing(network, recipe.activation_checkpointing)
    if recipe.compile:
        compile_blocks(network)
    teaches = recipe.teacher.momentum > 0 and recipe.terms.get("itc", 0) > 0
    teacher = ema_copy(network) if teaches else None
    average = ema_copy(network) if recipe.ema else None
    shards = _shards(recipe, [module for module in (network, teacher, average) if module is not None], ranks)
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
    from sightloop.training.fsdp import FSDP  # imports torch.distributed.tensor, which takes a second

    return FSDP(networks, ranks, bfloat16=recipe.precision == "bfloat16")


def _queue(recipe: Recipe, network: torch.nn.Module, ranks: World) -> dict[str, Tensor]:
    """The initial queue: random unit vectors `[Q, P]`, as in BLIP's code, and ids -1 `[Q]`: no sample, no text."""
    random = torch.Generator().manual_seed(recipe.seed)
    shape = (recipe.teacher.queue, require(network, Embedder).embed_dim)  # [Q, P]
    queue = {
        name: torch.nn.functional.normalize(torch.randn(shape, generator=random), dim=1).to(ranks.device)
        for name in ("image", "text")
    }
    none = torch.full(shape[:1], NO_TEXT, dtype=torch.int64, device=ranks.device)
    return queue | {"ids": none, "texts": none.clone()}
