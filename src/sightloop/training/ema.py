"""Exponential moving averages (EMA) of weights: the momentum teacher and the averaged network."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from sightloop.training.distributed import local_shard

NetworkT = TypeVar("NetworkT", bound=nn.Module)


def ema_copy(network: NetworkT) -> NetworkT:
    """A copy without gradients in evaluation mode, the start of an EMA."""
    return copy.deepcopy(network).eval().requires_grad_(False)


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, in place (He et al. 2020, equation 2).

    Args:
        teacher: its parameters are a subset of the student's, by name, and sharded as they are. Buffers (running
            statistics) are copied.
        student: the network in training.
        momentum: 0..1.

    Raises:
        AttributeError: the student lacks a parameter.
    """
    names = [name for name, _ in teacher.named_parameters()]
    averages = [local_shard(teacher.get_parameter(name).data) for name in names]
    weights = [local_shard(student.get_parameter(name).data) for name in names]
    if averages:
        torch._foreach_lerp_(averages, weights, 1 - momentum)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    for name, buffer in teacher.named_buffers():
        buffer.copy_(student.get_buffer(name))


def ema_decay(step: int, decay: float) -> float:
    """Momentum of the averaged weights after step 0, 1, ...: min(decay, (1 + step) / (10 + step)).

    Small at first, so that the random start soon has no weight.
    """
    return min(decay, (1 + step) / (10 + step))
