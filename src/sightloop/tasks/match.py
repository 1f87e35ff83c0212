"""Image-text matching: the ITM head over pairs, many texts against one image at once."""

from __future__ import annotations

import torch
from torch import Tensor

from sightloop.protocols import Matcher
from sightloop.types import Encoded


@torch.inference_mode()
def match_logits(network: Matcher, image: Encoded, ids: Tensor, lengths: Tensor) -> Tensor:
    """ITM logits of K texts for each of B images.

    Args:
        network: with an ITM head.
        image: B encoded images.
        ids: `[B * K, L]`, the texts of one image together.
        lengths: `[B * K]`, tokens without padding.

    Returns:
        float32 `[B * K, 2]`: (no match, match).
    """
    return network.match_logits(image, ids, lengths).float()


def match_probability(logits: Tensor) -> Tensor:
    """ITM logits `[R, 2]` -> probability of a match `[R]` (Li et al. 2022, section 3.2)."""
    return logits.softmax(dim=-1)[:, 1]
