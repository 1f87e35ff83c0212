"""Diffusion transformer (Peebles and Xie 2023, arXiv 2212.09748): noisy latents, a time and a text -> a prediction.

Text enters twice, as in PixArt (Chen et al. 2023, arXiv 2310.00426): its tokens by cross-attention, its pooled state
added to the embedding of the time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sightloop.nn.attention import Linear
from sightloop.nn.blocks import Block, BlockConfig, Mlp, Modulation, modulate, sinusoids
from sightloop.types import Encoded

_TIME_CHANNELS = 256
_TIME_SCALE = 1000.0  # times of 0..1 as the step numbers that the frequencies are made for


@dataclass(frozen=True, slots=True)
class DitConfig:
    """Sizes of a diffusion transformer.

    Args:
        image_size: side of the latents that it is trained on; others get positions stretched to these.
        patch: side of a patch of the latents.
        channels: of the latents.
        dim: width D, a multiple of 4.
        layers: number of blocks.
        heads: attention heads of each block.
        mlp_dim: width of the MLPs' hidden layer.
        memory_dim: width of the text's tokens and of its pooled state.
        activation: of the MLPs, a key of `nn.blocks.ACTIVATIONS`.
        eps: of the norms.
    """

    image_size: int
    patch: int
    channels: int
    dim: int
    layers: int
    heads: int
    mlp_dim: int
    memory_dim: int
    activation: str = "gelu_pytorch_tanh"
    eps: float = 1e-6

    @property
    def has_class_token(self) -> bool:
        """False: all tokens are patches."""
        return False

    @property
    def block(self) -> BlockConfig:
        """The config of a block."""
        return BlockConfig(
            self.dim, self.heads, self.mlp_dim, self.activation, self.eps, memory_dim=self.memory_dim
        )

    def build(self) -> Dit:
        """The tower, without values in its weights."""
        return Dit(self)


class Dit(nn.Module):
    """Diffusion transformer: latents `[B, C, h, w]` with their times and texts -> a prediction of the same shape.

    Each block is modulated by the condition, time and pooled text (adaLN-Zero): all start as the identity but for
    cross-attention, and the last layer as zero, if `nn.init.initialize` sets the weights.
    """

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.config = config
        values = config.channels * config.patch**2
        self.embed = Linear(values, config.dim)
        self.time = Mlp(_TIME_CHANNELS, config.dim, "silu")
        self.time.fc2 = Linear(config.dim, config.dim)
        self.pooled = Linear(config.memory_dim, config.dim)
        self.blocks = nn.ModuleList(Block(config.block) for _ in range(config.layers))
        # Of each block: shift, scale and gate of two branches; the last: shift and scale of the final norm.
        widths = [*[6 * config.dim] * config.layers, 2 * config.dim]
        self.modulations = nn.ModuleList(Linear(config.dim, width) for width in widths)
        self.norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.last = Linear(config.dim, values)

    def forward(self, latents: Tensor, times: Tensor, text: Encoded) -> Tensor:
        """The prediction.

        Args:
            latents: `[B, C, h, w]`; the patch divides h and w.
            times: float `[B]`, 0..1.
            text: tokens `[B, N, memory_dim]`, pooled `[B, memory_dim]`, mask `[B, N]` or None.

        Returns:
            `[B, C, h, w]`.
        """
        assert text.pooled is not None
        height, width = latents.shape[2] // self.config.patch, latents.shape[3] // self.config.patch
        x = self.embed(to_patches(latents, self.config.patch))  # [B, N, D]
        x = x + grid_positions(
            height, width, self.config.dim, self.config.image_size // self.config.patch
        ).to(x)
        condition = self.time(sinusoids(times * _TIME_SCALE, _TIME_CHANNELS).to(x)) + self.pooled(text.pooled)
        active = nn.functional.silu(condition)  # [B, D]
        mask = None if text.mask is None else text.mask[:, None, None]
        for block, modulation in zip(self.blocks, self.modulations, strict=False):
            assert isinstance(block, Block)
            x = block(
                x,
                memory=block.cross.memory(text.tokens),
                memory_mask=mask,
                modulation=Modulation(*modulation(active).chunk(6, dim=-1)),
            )
        shift, scale = self.modulations[-1](active).chunk(2, dim=-1)
        patches = self.last(modulate(self.norm(x), shift, scale))
        return from_patches(patches, self.config.patch, (height, width))


def to_patches(latents: Tensor, patch: int) -> Tensor:
    """Latents cut into squares, row by row: `[B, C, h, w]` -> `[B, N, C * patch^2]`."""
    return nn.functional.pixel_unshuffle(latents, patch).flatten(2).transpose(1, 2)


def from_patches(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `to_patches`: `[B, N, C * patch^2]` -> `[B, C, h, w]`; grid: patches down and across."""
    return nn.functional.pixel_shuffle(patches.transpose(1, 2).unflatten(2, grid), patch)


def grid_positions(height: int, width: int, dim: int, base: int) -> Tensor:
    """Fixed two-dimensional sine and cosine positions, float32 `[height * width, dim]`: half of them for the row.

    Args:
        height: patches down.
        width: patches across.
        dim: width, a multiple of 4.
        base: patches a side in training, to which the positions of other grids are stretched.
    """
    rows = torch.arange(height, dtype=torch.float32) * (base / height)
    columns = torch.arange(width, dtype=torch.float32) * (base / width)
    down = sinusoids(rows, dim // 2)[:, None].expand(-1, width, -1)
    across = sinusoids(columns, dim // 2)[None].expand(height, -1, -1)
    return torch.cat([down, across], dim=-1).flatten(0, 1)
