"""Rectified flow: a network learns the straight way from an image to noise (Liu et al. 2022, arXiv 2209.03003)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from sightloop.types import Loss


class NoisyImages(NamedTuple):
    """Images on their way to noise.

    Args:
        latents: x_t = (1 - t) x + t eps, `[B, C, h, w]`.
        times: t, `[B]`.
        flow: what is to be predicted, eps - x, `[B, C, h, w]`.
    """

    latents: Tensor
    times: Tensor
    flow: Tensor


def add_noise(clean: Tensor, noise: Tensor, normals: Tensor, shift: float) -> NoisyImages:
    """Images with noise of random times, logit-normal: t = sigmoid(n) (Esser et al. 2024, table 1: rf/lognorm(0, 1)).

    Args:
        clean: latents of images, `[B, C, h, w]`.
        noise: standard normal, of the same shape.
        normals: standard normal numbers n, `[B]`.
        shift: s of their equation 23, t' = s t / (1 + (s - 1) t); 1 for none.
    """
    times = normals.sigmoid()
    times = shift * times / (1 + (shift - 1) * times)
    return NoisyImages(clean.lerp(noise, times[:, None, None, None]), times, noise - clean)


def flow_loss(predicted: Tensor, flow: Tensor, count: int) -> Loss:
    """Mean square error of a predicted flow. Chance: that of a network that predicts zero, as it starts.

    Args:
        predicted: `[B, C, h, w]`.
        flow: noise less image, `[B, C, h, w]`.
        count: images of the global batch.
    """
    each = flow[0].numel()
    value = (predicted.float() - flow).square().sum() / (count * each)
    return Loss(value, float(flow.square().mean()))
