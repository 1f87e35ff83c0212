"""What the processes of test_distributed.py do: their rows of one batch, forward and backward, into a file."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sightloop.objectives.contrastive import Candidates, clip_loss, itc_loss, siglip_loss
from sightloop.objectives.gather import Group, gather_rows, row_counts, row_offset
from sightloop.objectives.matching import hard_negatives, itm_loss
from sightloop.types import Loss

# Which of the four processes hold how many of the eleven rows; one process may hold none.
DIVISIONS = [{0: 11}, {1: 4, 3: 7}, {0: 5, 2: 0, 3: 6}, {0: 1, 1: 3, 2: 0, 3: 7}]
PROCESSES, ROWS, WIDTH = 4, 11, 6
Result = dict[str, Tensor]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Images, texts and ids of the global batch."""
    generator = torch.Generator().manual_seed(5)
    image, text = (torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64) for _ in "ab")
    return (
        nn.functional.normalize(image, dim=1),
        nn.functional.normalize(text, dim=1),
        torch.arange(ROWS) // 3,
    )


def clip(image: Tensor, text: Tensor, ids: Tensor, a: Tensor, b: Tensor, group: Group) -> Loss:
    return clip_loss(image, text, a, group=group, chunk=2)


def clip_ids(image: Tensor, text: Tensor, ids: Tensor, a: Tensor, b: Tensor, group: Group) -> Loss:
    return clip_loss(image, text, a, ids=ids, group=group)


def siglip(image: Tensor, text: Tensor, ids: Tensor, a: Tensor, b: Tensor, group: Group) -> Loss:
    return siglip_loss(image, text, a, b, group=group, chunk=3)


def siglip_ids(image: Tensor, text: Tensor, ids: Tensor, a: Tensor, b: Tensor, group: Group) -> Loss:
    return siglip_loss(image, text, a, b, ids=ids, group=group)


def blip(image: Tensor, text: Tensor, ids: Tensor, a: Tensor, b: Tensor, group: Group) -> Loss:
    """Teachers that are the students turned round, and a queue of four."""
    images, texts = (gather_rows(x, group, gradient=False).flip(1) for x in (image, text))
    start, total = row_offset(len(image), group)
    queue = torch.linspace(-1, 1, 4 * WIDTH, dtype=torch.float64).view(4, WIDTH)
    every = torch.cat([gather_rows(ids, group), torch.tensor([-1, -2, 0, -3])])
    known = Candidates(torch.cat([images, queue]), torch.cat([texts, queue]), total, start, every)
    return itc_loss(image, text, known, 1 / a)


def match(image: Tensor, text: Tensor, ids: Tensor, a: Tensor, b: Tensor, group: Group) -> Loss:
    """A judge of pairs, that is a product, over the batch's hard negatives from all processes."""
    images, texts, every = gather_rows(image, group), gather_rows(text, group), gather_rows(ids, group)
    start, total = row_offset(len(image), group)
    with torch.no_grad():
        words = hard_negatives(a * image @ texts.T, offset=start, seed=1, step=2, ids=every)
        pictures = hard_negatives(a * text @ images.T, offset=start, seed=1, step=2, ids=every, stream=1)
    judged = torch.cat([(image * text), (image * texts[words]), (images[pictures] * text)]).sum(1)
    labels = torch.arange(3).repeat_interleave(len(image)).eq(0).long()
    loss = itm_loss(torch.stack([b * judged, a * judged], 1), labels, 3 * total)
    return Loss(loss.value, loss.chance, {**loss.facts, "drawn": words.sum() + 100 * pictures.sum()})


OBJECTIVES: list[Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Group], Loss]] = [
    clip,
    clip_ids,
    siglip,
    siglip_ids,
    blip,
    match,
]


def results(image: Tensor, text: Tensor, ids: Tensor, group: Group = None) -> Result:
    """Of each objective: value, chance, facts, gradients, from one process's rows."""
    made: Result = {"counts": torch.tensor(row_counts(len(image), group))}
    for objective in OBJECTIVES:
        leaves = [x.clone().requires_grad_() for x in (image, text)]
        scalars = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (6.0, -1.5)]
        loss = objective(*leaves, ids, *scalars, group)
        loss.value.backward()
        made |= {
            f"{objective.__name__}.{k}": v for k, v in {"value": loss.value.detach(), **loss.facts}.items()
        }
        made[f"{objective.__name__}.chance"] = torch.tensor(loss.chance)
        for name, leaf in zip(("image", "text", "a", "b"), leaves + scalars, strict=True):
            made[f"{objective.__name__}.d_{name}"] = (
                torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            )
    return made


def work(rank: int, folder: str) -> None:
    """One process: its rows of every division that it has a part in."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", PROCESSES)
    wait = timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=wait)
    for number, division in enumerate(DIVISIONS):
        group = None if len(division) == PROCESSES else dist.new_group([*division], timeout=wait)
        if rank in division:
            start = sum(rows for other, rows in division.items() if other < rank)
            own = (x[start : start + division[rank]] for x in batch())
            torch.save(results(*own, group), Path(folder) / f"{number}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
