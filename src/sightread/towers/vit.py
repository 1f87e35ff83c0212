"""Vision transformer (Dosovitskiy et al. 2020): CLIP's and BLIP's image tower, differing in data only.

Small towers trained on few pictures see them through convolutions first (Xiao et al. 2021, arXiv 2106.14881).
"""

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

    stem: widths of the convolutional stages before the projection, each of which halves the picture's sides and
    leaves less for the patches to cut: 2^len(stem) must divide `patch`. stem_blocks: residual blocks a stage.
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
    stem: tuple[int, ...] = ()
    stem_blocks: int = 1


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position: `[B, C, H, W]` -> `[B, C, H, W]`; knows no other row."""

    def forward(self, input: Tensor) -> Tensor:
        # With channels last in memory, both turns are views.
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Convolutions(nn.Module):
    """Two 3x3 convolutions beside a residual, norm and activation first (He et al. 2016, arXiv 1603.05027)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(width, eps=eps)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = ChannelNorm(width, eps=eps)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(nn.functional.relu(self.norm1(x)))
        return x + self.conv2(nn.functional.relu(self.norm2(hidden)))


class ConvStem(nn.Module):
    """n stages of a strided 3x3 convolution and residual blocks: `[B, 3, H, W]` -> `[B, C, H/2^n, W/2^n]`, normed."""

    def __init__(self, widths: tuple[int, ...], blocks: int, eps: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((3, *widths), widths, strict=False):
            layers.append(nn.Conv2d(before, width, 3, stride=2, padding=1))
            layers += [Convolutions(width, eps) for _ in range(blocks)]
        self.layers = nn.ModuleList(layers)
        self.norm = ChannelNorm(widths[-1], eps=eps)

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.contiguous(memory_format=torch.channels_last)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.relu(self.norm(x))


class PatchEmbed(nn.Module):
    """Cuts a picture into patches, projects each, puts a class token first, adds learned positions (ViT, section 3.1).

    pixels `[B, 3, H, W]` -> `[B, 1 + H/patch * W/patch, D]`. Raises ValueError for a stem that does not fit the patch.
    """

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        cut, left = divmod(config.patch, 2 ** len(config.stem))
        if left or not cut:
            raise ValueError(
                f"a stem of {len(config.stem)} stages does not fit patches of {config.patch} pixels"
            )
        self.stem = ConvStem(config.stem, config.stem_blocks, config.eps) if config.stem else nn.Identity()
        channels = config.stem[-1] if config.stem else 3
        self.proj = nn.Conv2d(channels, config.dim, cut, stride=cut, bias=config.patch_bias)
        self.class_token = nn.Parameter(torch.empty(config.dim))
        self.position = nn.Parameter(torch.empty(1 + (config.image_size // config.patch) ** 2, config.dim))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.proj(self.stem(pixels)).flatten(2).transpose(1, 2)
        first = self.class_token.expand(patches.shape[0], 1, -1)
        tokens = torch.cat([first, patches], dim=1) + self.position
        return tokens


class Vit(nn.Module):
    """pixels `[B, 3, S, S]` -> Encoded(tokens `[B, 1 + (S/patch)^2, D]`, pooled `[B, D]` = the class token, normed)."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = PatchEmbed(config)
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
