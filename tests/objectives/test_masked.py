"""MIM against loops over patches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightloop.objectives.masked import mim_loss


@given(st.integers(0, 4), st.integers(1, 5), st.integers(2, 6), st.booleans(), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_mim(pictures: int, patches: int, values: int, normalize: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (pictures, patches, values)
    predicted = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape[:2], generator=generator) < 0.5
    total = max(1, int(mask.sum()))
    got = mim_loss(predicted, target, mask, total, normalize=normalize)
    want, baseline = predicted.sum() * 0, 0.0
    for b, n in mask.nonzero().tolist():
        patch, guess = target[b, n], torch.zeros(values, dtype=torch.float64)
        if normalize:
            patch = (patch - patch.mean()) / torch.sqrt(patch.var() + 1e-6)
        elif not mask[b].all():
            guess = target[b][~mask[b]].mean(0)
        want = want + sum((predicted[b, n, c] - patch[c]).abs() for c in range(values)) / values / total
        baseline += (guess - patch).abs().mean().item() / total
    torch.testing.assert_close(got.value, want)
    torch.testing.assert_close(*(torch.autograd.grad(v, predicted)[0] for v in (got.value, want)))
    assert got.facts["baseline"].item() == pytest.approx(baseline)


def test_shares_sum_to_the_whole() -> None:
    predicted, target, mask = torch.randn(5, 4, 3), torch.randn(5, 4, 3), torch.rand(5, 4) < 0.6
    total = int(mask.sum())
    parts = [
        mim_loss(predicted[at], target[at], mask[at], total).value
        for at in (slice(2), slice(2, 2), slice(2, 5))
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), mim_loss(predicted, target, mask, total).value)


@pytest.mark.parametrize("normalize", [False, True])
def test_chance_is_the_mean_on_noise(normalize: bool) -> None:
    target = torch.randn(8, 49, 192, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(8, 49, dtype=torch.bool)
    got = mim_loss(torch.zeros_like(target), target, mask, mask.sum().item(), normalize=normalize)
    assert got.chance == pytest.approx(math.sqrt(2 / math.pi))
    assert got.value.item() == pytest.approx(got.chance, rel=0.01)
    assert got.value.item() == pytest.approx(got.facts["baseline"].item())


def test_no_pictures_cost_more_than_one_when_normalised() -> None:
    steep = torch.zeros(1, 3, 48)
    steep[0, 0, :24], steep[0, 1, 0], steep[0, 2] = 9.0, 255.0, torch.linspace(0, 1, 48)
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert mim_loss(torch.zeros_like(steep), steep, mask, 3, normalize=True).value.item() <= 1
