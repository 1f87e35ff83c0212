"""Masks from PaliGemma's segment words, in the place of their box on the image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sightloop.models.paligemma import MaskDecoder
from sightloop.tasks.region_parser import ParsedRegion
from sightloop.types import Box


@torch.inference_mode()
def decode_masks(
    decoder: MaskDecoder, found: Sequence[ParsedRegion], size: tuple[int, int]
) -> list[NDArray[np.bool_] | None]:
    """For each region its mask, bool `[H, W]` of an image of (height, width); None where it has no segment words, or
    words beyond the codebook."""
    words = decoder.words.num_embeddings
    known = [i for i, one in enumerate(found) if one.segments and max(one.segments) < words]
    out: list[NDArray[np.bool_] | None] = [None] * len(found)
    if known:
        decoded = decoder(torch.tensor([found[i].segments for i in known])).numpy()
        for i, shares in zip(known, decoded, strict=True):
            out[i] = _placed(shares, found[i].box, size)
    return out


def _placed(shares: NDArray[np.float32], box: Box, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask made as large as its box, in whole pixels, and true where more than half is the thing's."""
    mask = np.zeros(size, np.bool_)
    left, top, right, bottom = map(round, box)
    if right > left and bottom > top:
        gray = Image.fromarray((shares * 255).astype(np.uint8))
        resized = gray.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
        mask[top:bottom, left:right] = np.asarray(resized) > 127
    return mask
