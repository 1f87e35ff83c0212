"""Networks that follow another: the momentum teacher and the averaged weights."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from sightloop.training.distributed import local_shard

NetworkT = TypeVar("NetworkT", bound=nn.Module)


def ema_copy(network: NetworkT) -> NetworkT:
    """A copy that no gradient reaches, in evaluation mode: a momentum teacher, or an average of weights."""
    return copy.deepcopy(network).eval().requires_grad_(False)


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, in place (He et al. 2020, equation 2).

    A teacher may hold a part of the student: parameters meet by name, both whole or both sharded alike. Buffers
    (running statistics) are copied.
    Raises AttributeError if the student lacks a parameter.
    """
    names = [name for name, _ in teacher.named_parameters()]
    theirs = [local_shard(teacher.get_parameter(name).data) for name in names]
    ours = [local_shard(student.get_parameter(name).data) for name in names]
    if theirs:
        torch._foreach_lerp_(theirs, ours, 1 - momentum)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    for name, buffer in teacher.named_buffers():
        buffer.copy_(student.get_buffer(name))


def ema_decay(step: int, decay: float) -> float:
    """The momentum with which averaged weights follow after step 0, 1, ...: small at first, so that the random start
    is soon forgotten, `decay` in the end.
    """
    return min(decay, (1 + step) / (10 + step))
