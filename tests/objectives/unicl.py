"""UniCL's reference in three lines, small towers, and what the two processes of test_unicl.py do."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sightloop.objectives.contrastive import clip_loss
from sightloop.objectives.gather import gather_rows
from sightloop.objectives.positives import NO_CAPTION, Positives
from sightloop.training.grad_cache import GradCache

# label of each row (-1: it has captions), its text, all texts of its image. Text 9 is label 0, spelled by a caption.
LABELS = [0, 1, 0, -1, -1, 2, 1, -1, -1]
TEXTS = [9, 8, 9, 20, 21, 7, 8, 9, 20]
CAPTIONS = [[9], [8], [9], [20, 22], [21, 23], [7], [8], [9, 24], [20, 25]]
ROWS, SPLIT, INPUT, WIDTH = 9, 4, 6, 5


def reference(image: Tensor, text: Tensor, scale: Tensor, matches: Tensor) -> Tensor:
    """UniCL, per pair: Yang et al. 2022, equations 2 to 4. matches: `[B, B]`, of image i and text j."""
    logits, p = scale * image @ text.T, matches.double()
    to_text, to_image = (
        p / p.sum(1, keepdim=True) * logits.log_softmax(1),
        p / p.sum(0) * logits.log_softmax(0),
    )
    return -(to_text.sum() + to_image.sum()) / (2 * len(image))


def matches() -> Tensor:
    """bool `[B, B]`: equal label, or the text is one of the image's."""
    return torch.tensor(
        [[LABELS[i] == LABELS[j] >= 0 or TEXTS[j] in CAPTIONS[i] for j in range(ROWS)] for i in range(ROWS)]
    )


class Towers(nn.Module):
    """Two linear towers and a scale, float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(INPUT, WIDTH).double(), nn.Linear(INPUT, WIDTH).double()
        self.scale = nn.Parameter(torch.tensor(9.0, dtype=torch.float64))

    def embed(self, kind: str, x: Tensor) -> Tensor:
        return nn.functional.normalize(getattr(self, kind)(x), dim=1)


def inputs() -> tuple[Tensor, Tensor]:
    """Images and texts of the global batch, `[B, INPUT]` each."""
    generator = torch.Generator().manual_seed(3)
    image, text = (torch.randn(ROWS, INPUT, generator=generator, dtype=torch.float64) for _ in "ab")
    return image, text


def step(towers: Towers, rows: slice, micro_batch: int) -> Tensor:
    """One process's rows, forward and backward: its share of the loss; gradients stay in the towers."""
    image, text = inputs()
    cache = GradCache(micro_batch)
    images = cache.encode(lambda x: towers.embed("image", x), image[rows])
    texts = cache.encode(lambda x: towers.embed("text", x), text[rows])
    width = max(map(len, CAPTIONS))
    captions = torch.tensor([[*each, *[NO_CAPTION] * (width - len(each))] for each in CAPTIONS])
    known = (gather_rows(x[rows]) for x in (torch.arange(ROWS), torch.tensor(TEXTS), captions))
    loss = clip_loss(images, texts, towers.scale, ids=Positives.from_texts(*known), chunk=2)
    cache.add(loss.value)
    cache.finish()
    return loss.value.detach()


def gradients(towers: Towers) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in towers.parameters()]


def work(rank: int, folder: str) -> None:
    """One of two processes: the first SPLIT rows, or the others, with and without micro-batches."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    rows = slice(0, SPLIT) if rank == 0 else slice(SPLIT, ROWS)
    for micro_batch in (0, 2):
        towers = Towers()
        made = [step(towers, rows, micro_batch), *gradients(towers)]
        torch.save(made, Path(folder) / f"{micro_batch}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
