"""Vision transformer (Dosovitskiy et al. 2020): CLIP's and BLIP's image tower, differing in data only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from sightread.nn.blocks import Block, BlockConfig
from sightread.nn.embed import PatchEmbed
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
