"""Rows of the global batch across processes: counts, gathering with gradients, exchange in a ring.

Without `torch.distributed`, or alone in the group, nothing is sent. All processes of a group must make the same calls
in the same order, also those that hold no rows. Processes may hold different numbers of rows; the other dimensions,
the dtype and whether a gradient is wanted are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Group = dist.ProcessGroup | None


def rank_and_size(group: Group = None) -> tuple[int, int]:
    """(this process's rank in the group, processes in it); (0, 1) where nothing is distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def row_counts(rows: int, group: Group = None) -> tuple[int, ...]:
    """The rows that each process holds, in rank order; `rows` are this process's."""
    _, world = rank_and_size(group)
    if world == 1:
        return (rows,)
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
    counts = torch.zeros(world, 1, dtype=torch.int64, device=device)
    dist.all_gather(list(counts), torch.tensor([rows], device=device), group)
    return tuple(counts[:, 0].tolist())


def row_offset(rows: int, group: Group = None) -> tuple[int, int]:
    """(where this process's rows start in the global batch, rows of the global batch)."""
    counts = row_counts(rows, group)
    return sum(counts[: rank_and_size(group)[0]]), sum(counts)


def gather_rows(
    x: Tensor, group: Group = None, *, counts: tuple[int, ...] | None = None, gradient: bool = True
) -> Tensor:
    """The rows of all processes in rank order: x `[b, ...]` -> `[B, ...]`; x itself where there is one process.

    The gradient of x is the sum over all processes of their gradients of these rows: exact where each process computes
    its share of a sum. gradient: False cuts the graph. counts: what `row_counts` said, saves asking again.
    """
    if not gradient:
        x = x.detach()
    if rank_and_size(group)[1] == 1:
        return x
    counts = row_counts(x.shape[0], group) if counts is None else counts
    return cast(Tensor, _GatherRows.apply(x, counts, group))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: tuple[int, ...], group: Group) -> Tensor:
        rank = rank_and_size(group)[0]
        ctx.start, ctx.rows, ctx.group = sum(counts[:rank]), counts[rank], group
        # Gloo gathers equal blocks only: all are padded to the largest.
        blocks = x.new_zeros(len(counts), max(counts), *x.shape[1:])
        own = x.new_zeros(blocks.shape[1:])
        own[: x.shape[0]] = x
        dist.all_gather(list(blocks), own, group)
        return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor, None, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.start : ctx.start + ctx.rows], None, None


@dataclass(frozen=True)
class PendingBlock:
    """A block in transit in the ring.

    Args:
        block: `[n, ...]`, received from the previous rank when `wait` returns.
        sent: `[m, ...]`, kept in memory until it is sent.
        works: pending operations.
    """

    block: Tensor
    sent: Tensor
    works: tuple[dist.Work, ...]

    def wait(self) -> Tensor:
        """Waits for the block of the previous rank, `[n, ...]`."""
        for work in self.works:
            work.wait()
        return self.block


def ring_exchange(x: Tensor, rows: int, group: Group = None, *, tag: int = 0) -> PendingBlock:
    """Starts to send x `[n, ...]` to the next rank and to receive `[rows, ...]` from the previous one; no gradient.

    tag: tells apart what is under way at the same time.
    """
    rank, world = rank_and_size(group)
    if world == 1:
        return PendingBlock(x, x, ())
    sent, block = x.contiguous(), x.new_empty(rows, *x.shape[1:])

    def operation(function: Callable[..., dist.Work | None], tensor: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(function, tensor, group=group, tag=tag, group_peer=peer % world)

    operations = [operation(dist.isend, sent, rank + 1)] if sent.numel() else []
    operations += [operation(dist.irecv, block, rank - 1)] if block.numel() else []
    return PendingBlock(block, sent, tuple(dist.batch_isend_irecv(operations)) if operations else ())
