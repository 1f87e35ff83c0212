"""Vision transformer (Dosovitskiy et al. 2020): CLIP's and BLIP's image tower, differing in data only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sightread.nn.blocks import Block, BlockConfig
from sightread.types import Encoded


@dataclass(frozen=True, slots=True)
class VitConfig:
    """Sizes and the three choices in which the families differ.

    norm_first: a norm before the first block (CLIP). norm_tokens: the last norm is applied to all tokens (BLIP) and
    not to the class token alone (CLIP). patch_bias: the patch projection has a bias (BLIP).
    """

    image_size: int
    patch: int
    dim: int
    layers: int
    heads: int
    mlp_dim: int
    activation: str
    eps: float
    norm_first: bool
    norm_tokens: bool
    patch_bias: bool


class PatchEmbed(nn.Module):
    """Cuts a picture into patches, projects each, puts a class token first, adds learned positions (ViT, section 3.1).

    pixels `[B, 3, H, W]` -> `[B, 1 + H/patch * W/patch, D]`.
    """

    def __init__(self, image_size: int, patch: int, dim: int, *, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch, bias=bias)
        self.class_token = nn.Parameter(torch.empty(dim))
        self.position = nn.Parameter(torch.empty(1 + (image_size // patch) ** 2, dim))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.proj(pixels).flatten(2).transpose(1, 2)
        first = self.class_token.expand(patches.shape[0], 1, -1)
        tokens = torch.cat([first, patches], dim=1) + self.position
        return tokens


class Vit(nn.Module):
    """pixels `[B, 3, S, S]` -> Encoded(tokens `[B, 1 + (S/patch)^2, D]`, pooled `[B, D]` = the class token, normed)."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = PatchEmbed(config.image_size, config.patch, config.dim, bias=config.patch_bias)
        self.norm_in = nn.LayerNorm(config.dim, eps=config.eps) if config.norm_first else nn.Identity()
        block = BlockConfig(config.dim, config.heads, config.mlp_dim, config.activation, config.eps)
        self.blocks = nn.ModuleList(Block(block) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(config.dim, eps=config.eps)

    def forward(self, pixels: Tensor) -> Encoded:
        x = self.norm_in(self.embed(pixels))
        for block in self.blocks:
            x = block(x)
        if self.config.norm_tokens:
            x = self.norm_out(x)
            return Encoded(x, x[:, 0])
        return Encoded(x, self.norm_out(x[:, 0]))
