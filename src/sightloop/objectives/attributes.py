"""Attributes of answers: a binary decision each, such as whether an answer is sensible (LaMDA, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sightloop.objectives.matching import binary_entropy
from sightloop.types import Loss


def attribute_loss(logits: Tensor, labels: Tensor, total: int, chance: float) -> Loss:
    """Binary cross-entropy of logits `[n, A]` on labels `[n, A]`, 1 or 0; NaN, not known, weighs nothing.

    Args:
        logits: `[n, A]`.
        labels: float `[n, A]`.
        total: known labels of the global batch; the loss is their mean.
        chance: see `attribute_chance`.

    Returns:
        The loss. Facts: accuracy.
    """
    logits32 = logits.to(torch.promote_types(logits.dtype, torch.float32))
    known = ~labels.isnan()
    targets = labels.nan_to_num(0.0)
    each = F.binary_cross_entropy_with_logits(logits32, targets, reduction="none")
    right = ((logits32 > 0) == (targets > 0.5)) & known
    return Loss((each * known).sum() / total, chance, {"accuracy": right.sum() / total})


def attribute_chance(labels: Tensor) -> float:
    """What it costs to know of labels `[n, A]`, NaN for unknown, how often each is 1, and no more."""
    known = ~labels.isnan()
    counts = known.sum(0)  # [A]
    shares = (labels.nan_to_num(0.0).sum(0) / counts.clamp(min=1)).tolist()
    costs = sum(binary_entropy(share) * count for share, count in zip(shares, counts.tolist(), strict=True))
    return costs / max(1, int(counts.sum()))
