"""The processes of one training run: started by `torchrun`, or one alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

_BUCKET = 32 * 1024 * 1024  # bytes of gradients summed at once


@dataclass(frozen=True, slots=True)
class Ranks:
    """rank: this process among `world`; device: what it works on."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0


def join(device: str) -> Ranks:
    """Take part in the run that `torchrun` started (RANK, WORLD_SIZE, LOCAL_RANK), or be alone. device: as `load`."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = device
    if device == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    if chosen == "cuda" and torch.cuda.is_available():
        chosen = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(chosen)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.startswith("cuda") else "gloo")
    rank = dist.get_rank() if world > 1 else 0
    return Ranks(rank, world, torch.device(chosen))


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """Every process gets the sum of all gradients; a parameter that one of them did not use counts as zero there."""
    if ranks.world == 1:
        return
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        bucket.append(parameter)
        size += parameter.numel() * parameter.element_size()
        if size >= _BUCKET:
            _sum(bucket)
            bucket, size = [], 0
    if bucket:
        _sum(bucket)


def _sum(bucket: list[nn.Parameter]) -> None:
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in bucket]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
        parameter.grad = part.view_as(parameter)


def sum_values(values: Mapping[str, float], ranks: Ranks) -> dict[str, float]:
    """Shares by name, summed over the processes; a name may be missing in some."""
    if ranks.world == 1:
        return dict(values)
    everyones: list[dict[str, float]] = [{} for _ in range(ranks.world)]
    dist.all_gather_object(everyones, dict(values))
    return {
        name: sum(one.get(name, 0.0) for one in everyones)
        for name in dict.fromkeys(n for one in everyones for n in one)
    }


def wait(ranks: Ranks) -> None:
    """Until every process is here."""
    if ranks.world > 1:
        dist.barrier()
