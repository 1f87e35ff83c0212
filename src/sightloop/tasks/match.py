"""Image-text matching: the ITM head's opinion of pairs, many texts against one image at once."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sightloop.types import Encoded


class Matcher(Protocol):
    """What a network must offer to judge pairs."""

    def match_logits(self, image: Encoded, ids: Tensor, lengths: Tensor) -> Tensor: ...


@torch.inference_mode()
def match_logits(net: Matcher, image: Encoded, ids: Tensor, lengths: Tensor) -> Tensor:
    """ids `[B * K, L]`, K texts for each of B images -> float32 `[B * K, 2]`: (no match, match)."""
    return net.match_logits(image, ids, lengths).float()


def match_probability(logits: Tensor) -> Tensor:
    """`[R, 2]` -> `[R]`, the probability of a match (Li et al. 2022, section 3.2, ITM)."""
    return logits.softmax(dim=-1)[:, 1]
