"""One training step: losses, gradients, the optimiser, what follows it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sightloop.objectives.contrastive import enqueue
from sightloop.training import optimizer
from sightloop.training.checkpoint import State
from sightloop.training.dataloader import Batch, on_device
from sightloop.training.distributed import (
    clip_gradients,
    sum_gradients,
    sum_values,
)
from sightloop.training.ema import ema, follow
from sightloop.training.grad_cache import Features
from sightloop.training.loss_terms import TERMS, Context
from sightloop.training.run import Run
from sightloop.training.schedule import rate

if TYPE_CHECKING:
    pass


def take_step(run: Run, batch: Batch) -> tuple[dict[str, float], dict[str, float], float]:
    """Losses, gradients and the optimiser's step for one batch: (values, chances, learning rate)."""
    state, recipe, ranks = run.state, run.recipe, run.ranks
    # Dropout and the like draw from torch's generator: it starts anew at every step, so that no state need be kept.
    torch.manual_seed(hash((recipe.seed, state.step, ranks.rank)) & 0x7FFFFFFF)
    network: Any = state.network
    if state.teacher is not None:
        follow(state.teacher, network, recipe.teacher.momentum)
    speed = rate(recipe.schedule, state.step, run.steps, run.steps_per_epoch, recipe.optimiser.lr)
    optimizer.set_rate(state.optimiser, speed)
    batch, pixels = on_device(batch, run.trainee.image_spec, ranks.device)
    done = state.step / max(1.0, recipe.teacher.alpha_epochs * run.steps_per_epoch)
    context = Context(
        network=network,
        teacher=state.teacher,
        heads=state.heads,
        recipe=recipe,
        batch=batch,
        pixels=pixels,
        queue=state.queue,
        alpha=recipe.teacher.alpha * min(1.0, done) if state.teacher is not None else 0.0,
        features=Features(recipe.data.chunk),
    )
    with _cast(recipe.precision, ranks.device), _gathered(run, batch):
        for name, weight in recipe.terms.items():
            if weight > 0:
                TERMS[name](context)
        context.features.finish()
    parameters = [p for _, p in state.trained() if p.requires_grad]
    sum_gradients(parameters, ranks)
    norm = clip_gradients(parameters, recipe.optimiser.clip_norm or math.inf)
    if math.isfinite(norm):
        state.optimiser.step()
    state.optimiser.zero_grad(set_to_none=True)
    optimizer.clamp_parameters(network, optimizer.CLAMPS if "siglip" not in recipe.terms else {})
    if state.average is not None:
        follow(state.average, network, ema(state.step, recipe.ema))
    if state.queue and context.fresh:
        _remember(state, context.fresh)
    values = sum_values({name: float(value) for name, value in context.values.items()}, ranks)
    return values | _facts(context) | {"gradient_norm": norm}, context.chances, speed


def _remember(state: State, fresh: Mapping[str, Tensor]) -> None:
    """The teacher's features of this batch take the place of the queue's oldest."""
    pointer = int(state.notes["pointer"])
    for name, queue in state.queue.items():
        state.notes["pointer"] = enqueue(queue, pointer, fresh[name])


def _facts(context: Context) -> dict[str, float]:
    """What the watch looks at beside the losses."""
    facts: dict[str, float] = {}
    for name in ("temperature", "logit_scale"):
        if isinstance(value := getattr(context.network, name, None), Tensor):
            facts[name] = float(value.detach())
    if {"itc", "clip", "siglip"} & set(context.values) and len(rows := context.pictures.detach().float()) > 1:
        mean = rows.mean(0)
        count = len(rows)
        facts["spread"] = 1 - float((mean.square().sum() * count - 1) / (count - 1))
    return facts


def _gathered(run: Run, batch: Batch) -> AbstractContextManager[Any]:
    shards = run.shards
    return (
        nullcontext() if shards is None else shards.step(alike=shards.are_alike(batch, run.recipe.data.chunk))
    )


def _cast(name: str, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if name == "bfloat16" else nullcontext()
