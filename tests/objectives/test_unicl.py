"""UniCL is CLIP's loss with positives: equal to three lines, in micro-batches and over processes, with gradients."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sightloop.objectives.contrastive import clip_loss
from tests.forked import spawn
from tests.objectives.unicl import ROWS, Towers, gradients, inputs, matches, reference, step, work


def same(ones: list[Tensor], others: list[Tensor]) -> None:
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def wanted() -> list[Tensor]:
    """Loss and gradients of the whole batch by the reference."""
    towers, (image, text) = Towers(), inputs()
    loss = reference(towers.embed("image", image), towers.embed("text", text), towers.scale, matches())
    loss.backward()
    return [loss.detach(), *gradients(towers)]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(1, 13), st.floats(0.1, 30))
@settings(max_examples=60, deadline=None)
def test_labels_with_repeats(labels: list[int], chunk: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(len(labels))
    image, text = (
        nn.functional.normalize(torch.randn(len(labels), 4, generator=generator, dtype=torch.float64), dim=1)
        for _ in "ab"
    )
    leaves = [image.requires_grad_(), text.requires_grad_(), torch.tensor(scale, dtype=torch.float64)]
    leaves[2].requires_grad_()
    ids = torch.tensor(labels)
    got = clip_loss(image, text, leaves[2], ids=ids, chunk=chunk).value
    want = reference(image, text, leaves[2], ids[:, None] == ids)
    same([got, *torch.autograd.grad(got, leaves)], [want, *torch.autograd.grad(want, leaves)])


@given(st.integers(0, ROWS + 1))
@settings(max_examples=11, deadline=None)
def test_labels_and_captions_in_micro_batches(micro_batch: int) -> None:
    towers = Towers()
    same([step(towers, slice(None), micro_batch), *gradients(towers)], wanted())


def test_labels_and_captions_over_two_processes(tmp_path: Path) -> None:
    spawn(work, (str(tmp_path),), 2)
    for micro_batch in (0, 2):
        shares = [torch.load(tmp_path / f"{micro_batch}-{rank}.pt", weights_only=True) for rank in (0, 1)]
        same([a + b for a, b in zip(*shares, strict=True)], wanted())
