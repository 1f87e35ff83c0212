"""The processes of one training run: started by `torchrun`, or one alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET = 32 * 1024 * 1024  # bytes of gradients summed at once


@dataclass(frozen=True, slots=True)
class World:
    """rank: this process among `world`; device: what it works on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0


def init_world(device: str) -> World:
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
    return World(rank, world, torch.device(chosen))


@torch.no_grad()
def reduce_gradients(parameters: Iterable[nn.Parameter], ranks: World) -> None:
    """Every process gets the sum of all gradients; a parameter that some of them did not use counts as zero there,
    one that none used stays without. Sharded ones are summed already.
    """
    if ranks.world_size == 1:
        return
    whole_ones = [parameter for parameter in parameters if not is_sharded(parameter)]
    used = any_of([parameter.grad is not None for parameter in whole_ones], ranks)
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in compress(whole_ones, used):
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


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """Scale all gradients down so that their norm, over whole and sharded ones, is `limit` at most; what it was."""
    found = [parameter for parameter in parameters if parameter.grad is not None]
    kinds = [[p for p in found if is_sharded(p) is sharded] for sharded in (False, True)]
    norms = [
        full_tensor(nn.utils.get_total_norm([cast(Tensor, p.grad) for p in kind])) for kind in kinds if kind
    ]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms or [torch.zeros(())]))
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, limit, norm)
    return float(norm)


def any_of(flags: Sequence[bool], ranks: World) -> list[bool]:
    """Of each flag, whether it is set in any process."""
    return [value == 1 for value in _largest([int(flag) for flag in flags], ranks)]


def agree(values: Sequence[int], ranks: World) -> bool:
    """Whether all processes have the same values."""
    return _largest([*values, *(-value for value in values)], ranks) == [
        *values,
        *(-value for value in values),
    ]


def _largest(values: list[int], ranks: World) -> list[int]:
    if ranks.world_size == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return cast("list[int]", tensor.tolist())


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of it only: torch's DTensor, whose module is slow to load."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Any) -> Tensor:
    """The whole of a sharded tensor, which all processes must ask for; any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_shard(tensor: Any) -> Tensor:
    """This process's part of a sharded tensor; any other as it is. Shares its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def shard_like(value: Tensor, like: Any) -> Tensor:
    """This process's part of a whole tensor, if `like` is sharded."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    split = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return split.to_local()


def sum_values(values: Mapping[str, float], ranks: World) -> dict[str, float]:
    """Shares by name, summed over the processes; a name may be missing in some."""
    if ranks.world_size == 1:
        return dict(values)
    everyones: list[dict[str, float]] = [{} for _ in range(ranks.world_size)]
    dist.all_gather_object(everyones, dict(values))
    return {
        name: sum(one.get(name, 0.0) for one in everyones)
        for name in dict.fromkeys(n for one in everyones for n in one)
    }


def barrier(ranks: World) -> None:
    """Until every process is here."""
    if ranks.world_size > 1:
        dist.barrier()
