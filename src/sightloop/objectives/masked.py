"""Masked image modelling: the pixels of hidden patches from those that are seen."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sightloop.types import Loss


def mim_loss(predicted: Tensor, target: Tensor, mask: Tensor, total: int, *, normalize: bool = False) -> Loss:
    """Mean absolute error over the values of the hidden patches (SimMIM, Xie et al. 2022, section 3.4).

    predicted, target `[B, N, C]`: N patches of C values (pixels after the model's own normalisation); mask bool
    `[B, N]`, True = hidden. total: hidden patches of the global batch. normalise: each target patch is brought to mean
    0 and deviation 1 first (MAE, He et al. 2022, section 3).

    Chance: sqrt(2 / pi) = 0.798, what predicting the mean costs on values of normal distribution and deviation 1;
    with normalise, predicting 0 costs at most 1 on any images. Images are no noise, so the fact `baseline` says
    what these patches cost a guesser who knows nothing but averages: with normalise it answers 0, else the mean patch
    that is seen of the image (0 where none is). A model that does not beat it has learned nothing.
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
            seen = (~mask).to(wide)[..., None]
            average = (values * seen).sum(1) / seen.sum(1).clamp(min=1)  # [B, C]
            guess = average[mask.nonzero(as_tuple=True)[0]]
        baseline = (guess - hidden).abs().mean(1).sum() / total
    return Loss(value, math.sqrt(2 / math.pi), {"baseline": baseline})
