"""Stable Diffusion 1, 2 and XL: latents denoised by a U-Net that reads CLIP's text encoders, and an autoencoder.

Rombach et al. 2022 (arXiv 2112.10752); XL: Podell et al. 2023 (arXiv 2307.01952); its Turbo: Sauer et al. 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sightloop.errors import UsageError
from sightloop.models.samplers import SAMPLERS, NoiseSchedule, Steps, build_sampler
from sightloop.nn.attention import KeyValue, Linear
from sightloop.nn.blocks import sinusoids
from sightloop.towers.text import TextConfig, TextTower
from sightloop.towers.unet import Autoencoder, AutoencoderConfig, UnetConfig
from sightloop.types import DrawSettings, Encoded, Size

_EMPTY = 2  # tokens of the empty text: BOS and EOS


@dataclass(frozen=True, slots=True)
class PromptEncoderConfig:
    """Sizes of a CLIP text tower, and what of it the U-Net reads.

    Args:
        text: the tower's config.
        pad_id: what fills a prompt up to all positions; it is read like any other token.
        end_id: id of EOS, whose state is the pooled state.
        end_is_largest_id: pool at the largest id instead (checkpoints from before `end_id` was stored).
        penultimate: read the states before the last block and without the final norm (XL, section 2.1).
        pooled_dim: width of the projected pooled state; 0 for none.
    """

    text: TextConfig
    pad_id: int
    end_id: int
    end_is_largest_id: bool
    penultimate: bool = False
    pooled_dim: int = 0


@dataclass(frozen=True, slots=True)
class StableDiffusionConfig:
    """Sizes of the parts, and how it draws where a caller says nothing.

    Args:
        vision: the U-Net.
        autoencoder: of images and latents.
        encoder: of prompts; its tokens are read first.
        second: the second encoder (XL), whose pooled state is read too; None for none.
        schedule: the noise that it was trained with.
        steps: of the sampler.
        guidance: scale of classifier-free guidance; 1 for none (Turbo).
        zero_empty: the empty text is read as zeros (XL).
        labels: (), it has no classes.
    """

    vision: UnetConfig
    autoencoder: AutoencoderConfig
    encoder: PromptEncoderConfig
    second: PromptEncoderConfig | None
    schedule: NoiseSchedule
    steps: int = 50
    guidance: float = 7.5
    zero_empty: bool = False
    labels: tuple[str, ...] = ()

    @property
    def text(self) -> TextConfig:
        """The first text encoder's tower."""
        return self.encoder.text


class PromptEncoder(nn.Module):
    """CLIP text tower whose states of all tokens, padding included, are read."""

    def __init__(self, config: PromptEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.text = TextTower(config.text)
        if config.pooled_dim:
            self.projection = Linear(config.text.dim, config.pooled_dim, bias=False)

    def forward(self, ids: Tensor, lengths: Tensor) -> Encoded:
        """ids `[R, L]`, lengths `[R]` -> tokens `[R, positions, D]`, pooled `[R, pooled_dim]` or None."""
        tower, config = self.text, self.config
        ids = self._fill(ids, lengths)
        x = tower.add_positions(tower.embed_tokens(ids), torch.arange(ids.shape[1], device=ids.device)[None])
        for block in tower.layers[:-1]:
            x = block(x, causal=True)
        if config.penultimate and not config.pooled_dim:
            return Encoded(x)
        last = tower.norm(tower.layers[-1](x, causal=True))
        pooled = self.projection(self._pool(last, ids)) if config.pooled_dim else None
        return Encoded(x if config.penultimate else last, pooled)

    def _fill(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids `[R, L]` with this encoder's padding up to all positions, `[R, positions]`."""
        room = self.config.text.positions - ids.shape[1]
        ids = nn.functional.pad(ids, (0, room), value=self.config.pad_id)
        is_padding = torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None]
        return ids.masked_fill(is_padding, self.config.pad_id)

    def _pool(self, states: Tensor, ids: Tensor) -> Tensor:
        """The state `[R, D]` of EOS."""
        if self.config.end_is_largest_id:
            end = ids.argmax(dim=1)
        else:
            end = (ids == self.config.end_id).int().argmax(dim=1)
        return states[torch.arange(len(ids), device=ids.device), end]


class _Memory(NamedTuple):
    """Keys and values of the prompts that were read last."""

    tokens: Tensor
    keys: list[KeyValue]


class StableDiffusion(nn.Module):
    """Latents, a time and a prompt -> the noise in the latents, and latents -> an image."""

    capabilities = frozenset({"draw"})
    objectives: frozenset[str] = frozenset()
    samplers = SAMPLERS

    def __init__(self, config: StableDiffusionConfig) -> None:
        super().__init__()
        width = config.encoder.text.dim + (config.second.text.dim if config.second else 0)
        if width != config.vision.memory_dim:
            raise ValueError(
                f"text encoders of width {width} for a U-Net that reads {config.vision.memory_dim}"
            )
        self.config = config
        self.vision = config.vision.build()
        self.encoder = PromptEncoder(config.encoder)
        if config.second is not None:
            self.second = PromptEncoder(config.second)
        self.autoencoder = Autoencoder(config.autoencoder)
        self._memory: _Memory | None = None

    @property
    def draw_defaults(self) -> DrawSettings:
        """How it draws where a caller says nothing."""
        config, side = self.config, self.config.vision.image_size
        return DrawSettings((side, side), config.steps, config.guidance, sampler=config.schedule.sampler)

    def build_sampler(self, settings: DrawSettings) -> Steps:
        """A new sampler for these settings."""
        return build_sampler(self.config.schedule, settings)

    def encode_prompts(self, ids: Tensor, lengths: Tensor) -> Encoded:
        """ids `[R, L]`, lengths `[R]` -> tokens `[R, positions, memory_dim]`, pooled `[R, pooled_dim]` or None."""
        encoded = self.encoder(ids, lengths)
        if self.config.second is not None:
            second = self.second(ids, lengths)
            encoded = Encoded(torch.cat([encoded.tokens, second.tokens], dim=-1), second.pooled)
        if self.config.zero_empty:
            kept = (lengths > _EMPTY).to(encoded.tokens.dtype)[:, None]  # [R, 1]
            pooled = None if encoded.pooled is None else encoded.pooled * kept
            encoded = Encoded(encoded.tokens * kept[..., None], pooled)
        return encoded

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """(channels, height, width) of an image of this size. UsageError for sizes that it cannot draw."""
        vision = self.config.vision
        step = vision.patch * 2 ** (len(vision.dims) - 1)
        if any(side % step or side < step for side in size):
            raise UsageError(
                f"size={size[1]}x{size[0]}: both sides must be multiples of {step}; it was trained on "
                f"{vision.image_size}x{vision.image_size}"
            )
        return (vision.channels, size[0] // vision.patch, size[1] // vision.patch)

    def denoise(self, latents: Tensor, times: Tensor, prompts: Encoded) -> Tensor:
        """The noise or velocity of latents `[B, C, h, w]` at times `[B]`, for B encoded prompts -> `[B, C, h, w]`."""
        memory = self._memory
        if memory is None or memory.tokens is not prompts.tokens:  # the same ones at each step
            memory = self._memory = _Memory(prompts.tokens, self.vision.memory(prompts.tokens))
        added = None
        if prompts.pooled is not None:
            added = torch.cat([prompts.pooled, self._sizes(latents)], dim=1)
        return self.vision(latents, times, memory.keys, added)

    def _sizes(self, latents: Tensor) -> Tensor:
        """XL's micro-conditioning (section 2.2) for an image that is drawn as it is: `[B, 6 * sizes_dim]`.

        Original height and width, top and left of the crop, target height and width.
        """
        height, width = (side * self.config.vision.patch for side in latents.shape[-2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], device=latents.device)
        embedded = sinusoids(sizes, self.config.vision.sizes_dim).flatten().to(latents.dtype)
        return embedded.expand(len(latents), -1)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels `[B, 3, H, W]`, one image at a time, so that memory does not grow with B."""
        self._memory = None
        latents = self._as_autoencoder(latents) / self.config.autoencoder.scale
        return torch.cat([self.autoencoder.decode(one) for one in latents.split(1)])

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` of pixels `[B, 3, H, W]`: the mean of what the encoder says."""
        pixels = self._as_autoencoder(pixels)
        means = [self.autoencoder.encode(one)[0] for one in pixels.split(1)]
        return torch.cat(means) * self.config.autoencoder.scale

    def _as_autoencoder(self, x: Tensor) -> Tensor:
        """In the dtype of the autoencoder, which may be float32 beside a U-Net in half precision."""
        return x.to(self.autoencoder.decoder.conv_out.bias.dtype)
