"""Rectified flow: noisy images, their target, the loss and its chance value."""

from __future__ import annotations

import pytest
import torch

from sightloop.objectives.flow import add_noise, flow_loss


def test_an_image_moves_to_noise_along_its_target() -> None:
    random = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 64, 3, 4, 4, generator=random).unbind(0)
    noisy = add_noise(clean, noise, torch.randn(64, generator=random), 1.0)
    times = noisy.times[:, None, None, None]
    assert torch.allclose(noisy.latents, (1 - times) * clean + times * noise, atol=1e-6)
    assert torch.allclose(noisy.latents + (1 - times) * noisy.flow, noise, atol=1e-5)
    assert torch.allclose(noisy.latents - times * noisy.flow, clean, atol=1e-5)


def test_times_are_logit_normal_and_shifted() -> None:
    normals = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    images = torch.zeros(len(normals), 1, 1, 1)
    plain, shifted = (add_noise(images, images, normals, shift).times for shift in (1.0, 3.0))
    assert torch.allclose(plain.logit(), normals, atol=1e-4)
    assert torch.allclose(shifted, 3 * plain / (1 + 2 * plain))  # Esser et al. 2024, equation 23
    assert float(plain.median()) == pytest.approx(0.5, abs=0.01)


def test_the_loss_is_the_mean_square_error_over_the_global_batch() -> None:
    predicted, flow = torch.full((2, 3, 4, 4), 0.5), torch.full((2, 3, 4, 4), 2.0)
    loss = flow_loss(predicted, flow, count=4)  # two of four images are on this process
    assert float(loss.value) == pytest.approx(1.5**2 / 2)
    assert loss.chance == pytest.approx(4.0)
    assert float(flow_loss(torch.zeros_like(flow), flow, 2).value) == pytest.approx(loss.chance)
