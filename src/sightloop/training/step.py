"""A training step: losses, gradients, the optimizer, the EMAs and the queue."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from sightloop.objectives.contrastive import enqueue
from sightloop.protocols import ScaleNetwork, TemperatureNetwork
from sightloop.training import optimizer
from sightloop.training.checkpoint import TrainState
from sightloop.training.dataloader import Batch, on_device
from sightloop.training.distributed import (
    clip_gradients,
    gather_objects,
    reduce_gradients,
)
from sightloop.training.ema import ema_decay, update_ema
from sightloop.training.grad_cache import GradCache
from sightloop.training.loss_context import LossContext
from sightloop.training.loss_terms import LOSS_TERMS
from sightloop.training.run import TrainRun
from sightloop.training.schedule import lr_at


class StepResult(NamedTuple):
    """Result of a step, the same on every process.

    Args:
        values: losses and facts by name, of the global batch.
        chances: loss of each term at chance level; terms without rows in this batch are missing.
        lr: learning rate.
        skipped: (key, reason) of samples of the global batch that cannot be used.
    """

    values: dict[str, float]
    chances: dict[str, float]
    lr: float
    skipped: list[tuple[str, str]]


def take_step(run: TrainRun, batch: Batch) -> StepResult:
    """Takes an optimizer step on one batch, in place.

    Args:
        run: state before the step, changed to the state after it.
        batch: this process's rows of the global batch.
    """
    state, recipe, ranks = run.state, run.recipe, run.world
    # Dropout draws from torch's generator: it is seeded at every step, so that checkpoints need no generator state.
    torch.manual_seed(hash((recipe.seed, state.step, ranks.rank)) & 0x7FFFFFFF)
    network = state.network
    if state.teacher is not None:
        update_ema(state.teacher, network, recipe.teacher.momentum)
    lr = lr_at(recipe.schedule, state.step, run.steps, run.steps_per_epoch, recipe.optimizer.lr)
    optimizer.set_lr(state.optimizer, lr)
    batch, pixels = on_device(batch, run.model.image_spec, ranks.device)
    progress = state.step / max(1.0, recipe.teacher.alpha_epochs * run.steps_per_epoch)
    context = LossContext(
        network=network,
        teacher=state.teacher,
        heads=state.heads,
        recipe=recipe,
        batch=batch,
        pixels=pixels,
        queue=state.queue,
        alpha=recipe.teacher.alpha * min(1.0, progress) if state.teacher is not None else 0.0,
        cache=GradCache(recipe.data.micro_batch),
    )
    with _autocast(recipe.precision, ranks.device), _fsdp_step(run, batch):
        for name, weight in recipe.terms.items():
            if weight > 0:
                LOSS_TERMS[name](context)
        context.cache.finish()
    parameters = [parameter for _, parameter in state.named_parameters() if parameter.requires_grad]
    reduce_gradients(parameters, ranks)
    norm = clip_gradients(parameters, recipe.optimizer.clip_norm or math.inf)
    if math.isfinite(norm):
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    optimizer.clamp_parameters(network, optimizer.CLAMPS if "siglip" not in recipe.terms else {})
    if state.average is not None:
        update_ema(state.average, network, ema_decay(state.step, recipe.ema))
    if state.queue and context.new_features:
        _enqueue_features(state, context.new_features)
    values = {name: float(value) for name, value in context.values.items()}
    parts = gather_objects((values, context.chances, batch.skipped), ranks)
    return StepResult(
        _sums(part for part, _, _ in parts) | _facts(context) | {"gradient_norm": norm},
        # A process without rows of a term knows no chance level of it.
        {name: chance for _, chances, _ in parts for name, chance in chances.items()},
        lr,
        [item for _, _, skipped in parts for item in skipped],
    )


def _sums(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sums by name; a missing name counts as 0."""
    sums: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def _enqueue_features(state: TrainState, features: Mapping[str, Tensor]) -> None:
    """Writes the teacher's features of this batch `[B, ...]` over the oldest of the queue `[Q, ...]`."""
    pointer = int(state.notes["pointer"])
    for name, queue in state.queue.items():
        state.notes["pointer"] = enqueue(queue, pointer, features[name])


def _facts(context: LossContext) -> dict[str, float]:
    """Facts for the monitor: temperature or logit scale, and the spread of the image embeddings, 0..2."""
    facts: dict[str, float] = {}
    if isinstance(context.network, TemperatureNetwork):
        facts["temperature"] = float(context.network.temperature.detach())
    if isinstance(context.network, ScaleNetwork):
        facts["logit_scale"] = float(context.network.logit_scale.detach())
    if {"itc", "clip", "siglip"} & set(context.values):
        rows = context.image_embeddings.detach().float()  # [n, P]
        if (count := len(rows)) > 1:
            # Mean of the n (n - 1) cosines of different rows: n^2 |mean|^2 = n (diagonal) + their sum.
            facts["spread"] = 1 - float((rows.mean(0).square().sum() * count - 1) / (count - 1))
    return facts


def _fsdp_step(run: TrainRun, batch: Batch) -> AbstractContextManager[object]:
    if run.fsdp is None:
        return nullcontext()
    return run.fsdp.step(alike=run.fsdp.runs_alike(batch, run.recipe.data.micro_batch))


def _autocast(name: str, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if name == "bfloat16" else nullcontext()
