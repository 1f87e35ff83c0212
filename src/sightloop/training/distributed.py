"""Processes of a training run, started by `torchrun`, or a single one: setup, gradient sums, sharded tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sightloop.inference.load import choose_device

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor  # slow to import

T = TypeVar("T")

_BUCKET = 32 * 1024 * 1024  # bytes of gradients in one all-reduce


@dataclass(frozen=True, slots=True)
class World:
    """This process among those of a run.

    Args:
        rank: 0 to world_size - 1.
        world_size: number of processes.
        device: of this process.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process, rank 0, writes files and reports."""
        return self.rank == 0


def init_world(device: str) -> World:
    """Joins the processes that `torchrun` started, if any (RANK, WORLD_SIZE, LOCAL_RANK).

    Args:
        device: "auto" (a GPU if there is one), "cpu", "cuda", ...
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = str(choose_device(device))
    if chosen == "cuda":
        chosen = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(chosen)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.startswith("cuda") else "gloo")
    rank = dist.get_rank() if world > 1 else 0
    return World(rank, world, torch.device(chosen))


@torch.no_grad()
def reduce_gradients(parameters: Iterable[nn.Parameter], ranks: World) -> None:
    """Sums gradients over the processes, in place.

    Args:
        parameters: a missing gradient counts as zero, unless it is missing in all processes. Sharded parameters are
            skipped: FSDP sums their gradients.
        ranks: the processes, all of which call together.
    """
    if ranks.world_size == 1:
        return
    unsharded = [parameter for parameter in parameters if not is_sharded(parameter)]
    used = any_of([parameter.grad is not None for parameter in unsharded], ranks)
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in compress(unsharded, used):
        bucket.append(parameter)
        size += parameter.numel() * parameter.element_size()
        if size >= _BUCKET:
            _all_reduce(bucket)
            bucket, size = [], 0
    if bucket:
        _all_reduce(bucket)


def _all_reduce(bucket: list[nn.Parameter]) -> None:
    """Sums the gradients of a bucket as one flat tensor."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in bucket]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for parameter, gradient in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
        parameter.grad = gradient.view_as(parameter)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """Scales gradients so that their joint norm is at most `limit`, in place.

    Args:
        parameters: sharded or not; those without gradient are skipped.
        limit: may be infinite.

    Returns:
        The norm before.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    # torch's norms take parameters of one kind: unsharded, sharded.
    kinds = [[p for p in trained if is_sharded(p) is sharded] for sharded in (False, True)]
    gradients = [[p.grad for p in kind if p.grad is not None] for kind in kinds if kind]
    norms = [full_tensor(nn.utils.get_total_norm(each)) for each in gradients]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms or [torch.zeros(())]))
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, limit, norm)
    return float(norm)


def any_of(flags: Sequence[bool], ranks: World) -> list[bool]:
    """For each flag, whether it is set in any process."""
    return [value == 1 for value in _largest([int(flag) for flag in flags], ranks)]


def agree(values: Sequence[int], ranks: World) -> bool:
    """Whether all processes pass the same values."""
    both = [*values, *(-value for value in values)]  # the greatest of -x is the least of x
    return _largest(both, ranks) == both


def _largest(values: list[int], ranks: World) -> list[int]:
    if ranks.world_size == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor `[...]` is a DTensor, of which each process holds a part."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, `[...]` -> `[...]`; other tensors are returned. All processes call together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, `[n, ...]` -> `[n / world_size, ...]`; other tensors are returned.

    Shares memory with the tensor.
    """
    return tensor.to_local() if is_sharded(tensor) else tensor


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a full tensor `[n, ...]`, split as `like` is; the full tensor if that is not sharded."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    split = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return split.to_local()


def gather_objects(value: T, ranks: World) -> list[T]:
    """The value of every process, by rank."""
    if ranks.world_size == 1:
        return [value]
    gathered: list[T] = [value] * ranks.world_size
    dist.all_gather_object(gathered, value)
    return gathered


def barrier(ranks: World) -> None:
    """Waits until all processes call it."""
    if ranks.world_size > 1:
        dist.barrier()
