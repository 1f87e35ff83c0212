"""Painter: a small diffusion transformer that draws images of texts in pixels, from a rectified flow.

Rectified flow: Liu et al. 2022 (arXiv 2209.03003); its training times: Esser et al. 2024 (arXiv 2403.03206).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from sightloop.errors import UsageError
from sightloop.nn.attention import mask_from_lengths
from sightloop.towers.dit import DitConfig
from sightloop.towers.text import TextConfig, TextTower
from sightloop.types import DrawSettings, Encoded, Size

_BASE_PIXELS = 32 * 32  # images that need no shift of times
_LEAST_TIME = 0.05  # by which a predicted image is divided, of the same paper
_MAX_SIDE = 4  # times the side of training


@dataclass(frozen=True, slots=True)
class PainterConfig:
    """Sizes of the painter, and how it draws where a caller says nothing.

    Args:
        vision: the diffusion transformer, over pixels.
        text: the text tower, whose width is `vision.memory_dim`.
        steps: of the sampler.
        guidance: scale of classifier-free guidance.
        sampler: "euler" or "heun".
        interval: shares of the steps between which guidance acts.
        predicts: what the transformer computes, "flow", or the "image", from which the flow follows. Where a patch has
            more values than the transformer is wide, noise does not fit through it and only images can be predicted
            (Li and He 2025, arXiv 2511.13720).
        shift: of the times, at the size of training; 0: by that size. Large and flat objects show through more noise
            than the details of photographs, so that their layout is decided later than this.
        labels: (), it has no classes.
    """

    vision: DitConfig
    text: TextConfig
    steps: int = 24
    guidance: float = 2.0
    sampler: str = "euler"
    interval: tuple[float, float] = (0.0, 1.0)
    predicts: Literal["flow", "image"] = "flow"
    shift: float = 0.0
    labels: tuple[str, ...] = ()


class Painter(nn.Module):
    """Diffusion transformer and text tower: noisy pixels, a time and a text -> the flow, noise less image."""

    capabilities = frozenset({"draw"})
    objectives = frozenset({"flow"})
    samplers = ("euler", "heun")

    def __init__(self, config: PainterConfig) -> None:
        super().__init__()
        if config.vision.memory_dim != config.text.dim:
            raise ValueError(f"texts of width {config.text.dim} for a width of {config.vision.memory_dim}")
        self.config = config
        self.vision = config.vision.build()
        self.text = TextTower(config.text)

    @property
    def draw_defaults(self) -> DrawSettings:
        """How it draws where a caller says nothing."""
        config, side = self.config, self.config.vision.image_size
        return DrawSettings(
            (side, side), config.steps, config.guidance, config.interval, sampler=config.sampler
        )

    def time_shift(self, size: Size) -> float:
        """s of Esser et al. 2024, section 5.3.2: sqrt(pixels / pixels of an image that needs no shift), at least 1."""
        shift, side = self.config.shift, self.config.vision.image_size
        base = _BASE_PIXELS if not shift else side**2 / shift**2
        return max(1.0, math.sqrt(size[0] * size[1] / base))

    def encode_prompts(self, ids: Tensor, lengths: Tensor) -> Encoded:
        """ids `[R, L]`, lengths `[R]` -> tokens `[R, L, D]`, their mean `[R, D]`, mask `[R, L]`."""
        tokens = self.text(ids, lengths=lengths).tokens
        mask = mask_from_lengths(lengths, ids.shape[1])[:, 0, 0]  # [R, L]
        pooled = (tokens * mask[..., None]).sum(1) / lengths[:, None].to(tokens.dtype)
        return Encoded(tokens, pooled, mask)

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """(channels, height, width) of an image of this size: its pixels. UsageError for sizes that it cannot draw."""
        vision = self.config.vision
        most = _MAX_SIDE * vision.image_size
        if any(side % vision.patch or not 0 < side <= most for side in size):
            raise UsageError(
                f"size={size[1]}x{size[0]}: both sides must be multiples of {vision.patch}, at most {most}; it was "
                f"trained on {vision.image_size}x{vision.image_size}"
            )
        return (vision.channels, *size)

    def denoise(self, latents: Tensor, times: Tensor, prompts: Encoded) -> Tensor:
        """The flow at pixels `[B, C, h, w]` and times `[B]`, for B encoded prompts -> `[B, C, h, w]`."""
        predicted = self.vision(latents, times, prompts)
        if self.config.predicts == "flow":
            return predicted
        return (latents - predicted) / times.clamp(min=_LEAST_TIME).to(latents.dtype)[:, None, None, None]

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels `[B, 3, H, W]`: the latents."""
        return latents

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Latents `[B, 3, H, W]`: the pixels."""
        return pixels
