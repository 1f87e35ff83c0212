"""Masks from segmentation tokens (PaliGemma), resized into their boxes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sightloop.models.paligemma import MaskDecoder
from sightloop.tasks.region_parser import ParsedRegion
from sightloop.types import Box, Floats32, Size


@torch.inference_mode()
def decode_masks(
    decoder: MaskDecoder, regions: Sequence[ParsedRegion], size: Size
) -> list[NDArray[np.bool_] | None]:
    """The mask of each region.

    Args:
        decoder: of segmentation tokens.
        regions: parsed regions with their segmentation tokens.
        size: (height, width) of the image in pixels.

    Returns:
        bool `[H, W]` of the whole image; None for a region without segmentation tokens, or with unknown ones.
    """
    codes = decoder.words.num_embeddings
    known = [i for i, region in enumerate(regions) if region.segments and max(region.segments) < codes]
    masks: list[NDArray[np.bool_] | None] = [None] * len(regions)
    if known:
        decoded = decoder(torch.tensor([regions[i].segments for i in known])).numpy()  # [n, 64, 64]
        for i, probabilities in zip(known, decoded, strict=True):
            masks[i] = _place(probabilities, regions[i].box, size)
    return masks


def _place(probabilities: Floats32, box: Box, size: Size) -> NDArray[np.bool_]:
    """A mask `[64, 64]` resized to its box in whole pixels, thresholded at one half: bool `[H, W]`."""
    mask = np.zeros(size, np.bool_)
    left, top, right, bottom = map(round, box)
    if right > left and bottom > top:
        gray = Image.fromarray((probabilities * 255).astype(np.uint8))
        resized = gray.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
        mask[top:bottom, left:right] = np.asarray(resized) > 127
    return mask
