"""Gradients in chunks are those of the whole batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sightloop.objectives.contrastive import Candidates, clip_loss, itc_loss, siglip_loss
from sightloop.training.grad_cache import GradCache


class Towers(nn.Module):
    """Two small towers and the scalars of the three losses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 16))
        self.text = nn.Sequential(nn.Linear(9, 32), nn.GELU(), nn.Linear(32, 16))
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.bias = nn.Parameter(torch.tensor(-3.0))

    def embed(self, features: GradCache, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        image = features.encode(self.image, images)
        text = features.encode(self.text, texts)
        return nn.functional.normalize(image, dim=1), nn.functional.normalize(text, dim=1)


def clip(towers: Towers, image: Tensor, text: Tensor) -> Tensor:
    return clip_loss(image, text, towers.scale).value


def siglip(towers: Towers, image: Tensor, text: Tensor) -> Tensor:
    return siglip_loss(image, text, towers.scale, towers.bias).value


def momentum(towers: Towers, image: Tensor, text: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(len(image) + 40, 16, generator=generator)
    rows = nn.functional.normalize(rows, dim=1)
    candidates = Candidates(image=rows, text=rows.flip(1), batch=len(image))
    return itc_loss(image, text, candidates, 1 / towers.scale).value


def gradients(loss: Callable[..., Tensor], rows: int, chunk: int) -> list[Tensor]:
    towers = Towers().eval()
    generator = torch.Generator().manual_seed(2)
    images, texts = torch.randn(rows, 12, generator=generator), torch.randn(rows, 9, generator=generator)
    features = GradCache(chunk)
    features.add(loss(towers, *towers.embed(features, images, texts)))
    features.finish()
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in towers.parameters()]


@pytest.mark.parametrize("loss", [clip, siglip, momentum])
def test_256_rows_in_micro_batches_of_16(loss: Callable[..., Tensor]) -> None:
    whole, parts = gradients(loss, 256, 0), gradients(loss, 256, 16)
    for one, other in zip(whole, parts, strict=True):
        assert (one - other).norm() <= 1e-6 * max(float(one.norm()), 1e-3)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(2, 40), chunk=st.integers(1, 50))
def test_any_micro_batch(rows: int, chunk: int) -> None:
    for one, other in zip(gradients(clip, rows, 0), gradients(clip, rows, chunk), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_dropout_draws_the_same_masks_again() -> None:
    """The second pass must be through the network of the first, or its gradient belongs to another one."""
    towers = Towers().train()
    images, texts = torch.randn(12, 12), torch.randn(12, 9)
    features = GradCache(4)
    made: list[Tensor] = []

    def image(x: Tensor) -> Tensor:
        made.append(towers.image(x).detach())
        return towers.image(x) * 0 + made[-1] + towers.image[3].weight.sum() * 0

    leaf = features.encode(image, images)
    text = features.encode(towers.text, texts)
    features.add(clip_loss(leaf, text, towers.scale).value)
    torch.rand(7)  # others draw in between
    features.finish()
    first, second = torch.cat(made[:3]), torch.cat(made[3:])
    assert torch.equal(first, second)
