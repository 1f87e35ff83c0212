"""One training step: losses, gradients, the optimizer, what follows it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sightloop.objectives.contrastive import enqueue
from sightloop.protocols import ScaleNetwork, TemperatureNetwork
from sightloop.training import optimizer
from sightloop.training.checkpoint import TrainState
from sightloop.training.dataloader import Batch, on_device
from sightloop.training.distributed import (
    clip_gradients,
    reduce_gradients,
    sum_values,
)
from sightloop.training.ema import ema_decay, update_ema
from sightloop.training.grad_cache import GradCache
from sightloop.training.loss_terms import LOSS_TERMS, LossContext
from sightloop.training.run import TrainRun
from sightloop.training.schedule import lr_at


def take_step(run: TrainRun, batch: Batch) -> tuple[dict[str, float], dict[str, float], float]:
    """Losses, gradients and the optimizer's step for one batch: (values, chances, learning rate)."""
    state, recipe, ranks = run.state, run.recipe, run.world
    # Dropout and the like draw from torch's generator: it starts anew at every step, so that no state need be kept.
    torch.manual_seed(hash((recipe.seed, state.step, ranks.rank)) & 0x7FFFFFFF)
    network = state.network
    if state.teacher is not None:
        update_ema(state.teacher, network, recipe.teacher.momentum)
    speed = lr_at(recipe.schedule, state.step, run.steps, run.steps_per_epoch, recipe.optimizer.lr)
    optimizer.set_lr(state.optimizer, speed)
    batch, pixels = on_device(batch, run.model.image_spec, ranks.device)
    done = state.step / max(1.0, recipe.teacher.alpha_epochs * run.steps_per_epoch)
    context = LossContext(
        network=network,
        teacher=state.teacher,
        heads=state.heads,
        recipe=recipe,
        batch=batch,
        pixels=pixels,
        queue=state.queue,
        alpha=recipe.teacher.alpha * min(1.0, done) if state.teacher is not None else 0.0,
        cache=GradCache(recipe.data.micro_batch),
    )
    with _cast(recipe.precision, ranks.device), _gathered(run, batch):
        for name, weight in recipe.terms.items():
            if weight > 0:
                LOSS_TERMS[name](context)
        context.cache.finish()
    parameters = [p for _, p in state.named_parameters() if p.requires_grad]
    reduce_gradients(parameters, ranks)
    norm = clip_gradients(parameters, recipe.optimizer.clip_norm or math.inf)
    if math.isfinite(norm):
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    optimizer.clamp_parameters(network, optimizer.CLAMPS if "siglip" not in recipe.terms else {})
    if state.average is not None:
        update_ema(state.average, network, ema_decay(state.step, recipe.ema))
    if state.queue and context.new_features:
        _remember(state, context.new_features)
    values = sum_values({name: float(value) for name, value in context.values.items()}, ranks)
    return values | _facts(context) | {"gradient_norm": norm}, context.chances, speed


def _remember(state: TrainState, fresh: Mapping[str, Tensor]) -> None:
    """The teacher's features of this batch take the place of the queue's oldest."""
    pointer = int(state.notes["pointer"])
    for name, queue in state.queue.items():
        state.notes["pointer"] = enqueue(queue, pointer, fresh[name])


def _facts(context: LossContext) -> dict[str, float]:
    """What the monitor looks at beside the losses: temperature or scale, and the spread of the image embeddings."""
    facts: dict[str, float] = {}
    if isinstance(context.network, TemperatureNetwork):
        facts["temperature"] = float(context.network.temperature.detach())
    if isinstance(context.network, ScaleNetwork):
        facts["logit_scale"] = float(context.network.logit_scale.detach())
    if {"itc", "clip", "siglip"} & set(context.values):
        rows = context.image_embeddings.detach().float()  # [n, P]
        if (count := len(rows)) > 1:
            # The mean of all n (n - 1) cosines: |sum|^2 = n^2 |mean|^2 counts each pair twice and n ones.
            facts["spread"] = 1 - float((rows.mean(0).square().sum() * count - 1) / (count - 1))
    return facts


def _gathered(run: TrainRun, batch: Batch) -> AbstractContextManager[Any]:
    shards = run.fsdp
    return (
        nullcontext()
        if shards is None
        else shards.step(alike=shards.runs_alike(batch, run.recipe.data.micro_batch))
    )


def _cast(name: str, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if name == "bfloat16" else nullcontext()
