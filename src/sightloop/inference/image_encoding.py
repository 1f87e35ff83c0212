"""Prepared images through a network's image tower: a few at a time, those of one size together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sightloop.data.images.preprocess import normalize
from sightloop.data.images.tiles import tile_layout
from sightloop.types import Encoded, ImageSpec, Pixels

_TOKENS_AT_ONCE = 600  # on a CPU


class ImageModel(Protocol):
    """A loaded model: its network and how its images are prepared."""

    network: Any
    image_spec: ImageSpec
    device: torch.device
    dtype: torch.dtype


def encode_images(model: ImageModel, batch: Sequence[Pixels]) -> Encoded:
    """tokens `[B, N, D]`; where images differ in size, zero where mask `[B, N]` is False."""
    if model.image_spec.patches or model.image_spec.tiles:
        return _of_many_sizes(model, batch)
    pixels = _tensor(model, batch)
    if model.device.type != "cpu":
        return model.network.encode_image(pixels)
    # A few images at a time, whatever the batch: their activations then stay in the caches of a CPU.
    patch, (height, width) = model.network.config.vision.patch, pixels.shape[2:]
    few = max(1, _TOKENS_AT_ONCE // max(1, (height // patch) * (width // patch)))
    parts: list[Encoded] = [model.network.encode_image(part) for part in pixels.split(few)]
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return Encoded(
        torch.cat([part.tokens for part in parts]), torch.cat(pooled) if len(pooled) == len(parts) else None
    )


def _of_many_sizes(model: ImageModel, batch: Sequence[Pixels]) -> Encoded:
    """Images of one size, or of tiles in one layout, go together, so that no patch is filled in."""
    spec, vision = model.image_spec, model.network.config.vision
    places: dict[tuple[int, ...], list[int]] = {}
    for i, picture in enumerate(batch):
        same = (
            tile_layout(picture.size, spec.tiles, vision.image_size, vision.patch)
            if spec.tiles
            else picture.values.shape
        )
        places.setdefault(same, []).append(i)
    parts: list[tuple[list[int], Encoded]] = []
    for same, rows in places.items():
        pixels = _tensor(model, [batch[i] for i in rows])
        encode_image = model.network.encode_image
        parts.append((rows, encode_image(pixels, same) if spec.tiles else encode_image(pixels)))
    longest = max(part.tokens.shape[1] for _, part in parts)
    first = parts[0][1]
    tokens = first.tokens.new_zeros(len(batch), longest, first.tokens.shape[2])
    mask = torch.zeros(len(batch), longest, dtype=torch.bool, device=tokens.device)
    pooled = None if first.pooled is None else first.pooled.new_empty(len(batch), first.pooled.shape[1])
    for rows, part in parts:
        tokens[rows, : part.tokens.shape[1]] = part.tokens
        mask[rows, : part.tokens.shape[1]] = True
        if pooled is not None and part.pooled is not None:
            pooled[rows] = part.pooled
    return Encoded(tokens, pooled, mask)


def _tensor(model: ImageModel, batch: Sequence[Pixels]) -> Tensor:
    return normalize(batch, model.image_spec, device=model.device, dtype=model.dtype)
