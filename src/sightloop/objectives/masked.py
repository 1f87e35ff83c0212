"""Masked image modeling: the pixels of hidden patches are predicted from the visible ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sightloop.types import Loss


def mim_loss(predicted: Tensor, target: Tensor, mask: Tensor, total: int, *, normalize: bool = False) -> Loss:
    """Mean absolute error over the values of the hidden patches (SimMIM, Xie et al. 2022, section 3.4).

    The fact `baseline` is the error of a guess without learning: 0 with `normalize`, else the mean visible patch of the
    image (0 if none is visible). A trained model must be below it.

    Args:
        predicted: `[B, N, C]`, N patches of C values.
        target: `[B, N, C]`, pixels in the model's own normalization.
        mask: bool `[B, N]`, True for hidden patches.
        total: hidden patches of the global batch.
        normalize: bring each target patch to mean 0 and deviation 1 first (MAE, He et al. 2022, section 3).

    Returns:
        The loss. Chance: sqrt(2 / pi) = 0.798, the error of the mean on normally distributed values of deviation 1;
        with `normalize` a prediction of 0 has an error of at most 1 on any image.
    """
    wide = torch.promote_types(predicted.dtype, torch.float32)
    values = target.detach().to(wide)
    if normalize:
        values = values - values.mean(-1, keepdim=True)
        variance = values.square().sum(-1, keepdim=True) / max(values.shape[-1] - 1, 1)
        values = values * (variance + 1e-6).rsqrt()
    hidden = values[mask]
    value = (predicted[mask].to(wide) - hidden).abs().mean(1).sum() / total
    with torch.no_grad():
        guess = torch.zeros_like(hidden)
        if not normalize:
            visible = (~mask).to(wide)[..., None]  # [B, N, 1]
            average = (values * visible).sum(1) / visible.sum(1).clamp(min=1)  # [B, C]
            guess = average[mask.nonzero(as_tuple=True)[0]]
        baseline = (guess - hidden).abs().mean(1).sum() / total
    return Loss(value, math.sqrt(2 / math.pi), {"baseline": baseline})
