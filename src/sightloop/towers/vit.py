"""Vision transformer (Dosovitskiy et al. 2020): CLIP's, BLIP's and SigLIP's image tower, differing in data only.

Small towers trained on few images see them through convolutions first (Xiao et al. 2021, arXiv 2106.14881).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sightloop.nn.attention import Attention, HeadConfig, Linear
from sightloop.nn.blocks import Block, BlockConfig, Mlp
from sightloop.types import Encoded


@dataclass(frozen=True, slots=True)
class VitConfig:
    """Sizes and the choices in which the families differ.

    norm_first: a norm before the first block (CLIP). norm_tokens: the last norm is applied to all tokens (BLIP,
    SigLIP) and not to the class token alone (CLIP). patch_bias: the patch projection has a bias (BLIP, SigLIP).
    qkv_bias: queries, keys and values have one (all that are published).

    pooling: what stands for the image: "class", a token put before the patches (CLIP, BLIP); "mean", one that starts
    as the patches' mean, which few images teach sooner; "attention", a learned probe that reads all patches (SigLIP);
    "none": the patches are all there is (SigLIP's tower in PaliGemma).
    any_size: images of any height and width that `patch` divides, without a class token; the table of positions, a
    square of `image_size / patch` a side, is stretched to each (SigLIP 2's NaFlex, Tschannen et al. 2025, section 2.4).

    stem: widths of the convolutional stages before the projection, each of which halves the image's sides and
    leaves less for the patches to cut: 2^len(stem) must divide `patch`. stem_blocks: residual blocks a stage.
    stem_norm: "channel", of each position; "batch" (Ioffe and Szegedy 2015), which learns faster from few images;
    "fixed": the scale and shift that a trained batch norm comes to.
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
    stem_norm: Literal["channel", "batch", "fixed"] = "channel"
    pooling: Literal["class", "mean", "attention", "none"] = "class"
    any_size: bool = False
    qkv_bias: bool = True

    def build(self) -> Vit:
        """The tower, with weights as torch draws them."""
        return Vit(self)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position: `[B, C, H, W]` -> `[B, C, H, W]`; knows no other row."""

    def forward(self, input: Tensor) -> Tensor:
        # With channels last in memory, both turns are views.
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


_STEM_NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "channel": ChannelNorm,
    "batch": nn.BatchNorm2d,
    "fixed": lambda width, eps: nn.Conv2d(width, width, 1, groups=width),
}


class ResidualConvs(nn.Module):
    """Two 3x3 convolutions beside a residual, norm and activation first (He et al. 2016, arXiv 1603.05027)."""

    def __init__(self, width: int, norm: Callable[[int, float], nn.Module], eps: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(width, eps), norm(width, eps)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(nn.functional.relu(self.norm1(x)))
        return x + self.conv2(nn.functional.relu(self.norm2(hidden)))


def _build_stem(config: VitConfig) -> nn.Sequential:
    """n stages of a strided 3x3 convolution and residual blocks: `[B, 3, H, W]` -> `[B, C, H/2^n, W/2^n]`, normed."""
    norm = _STEM_NORMS[config.stem_norm]
    layers: list[nn.Module] = []
    for before, width in zip((3, *config.stem), config.stem, strict=False):
        layers.append(nn.Conv2d(before, width, 3, stride=2, padding=1))
        layers += [ResidualConvs(width, norm, config.eps) for _ in range(config.stem_blocks)]
    return nn.Sequential(*layers, norm(config.stem[-1], config.eps), nn.ReLU()) if layers else nn.Sequential()


class PatchEmbed(nn.Module):
    """Cuts an image into patches, projects each, puts a class token first, adds learned positions (ViT, section 3.1).

    pixels `[B, 3, H, W]` -> `[B, 1 + H/patch * W/patch, D]`, without a class token `[B, H/patch * W/patch, D]`.
    Raises ValueError for a stem that does not fit the patch.
    """

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        cut, remainder = divmod(config.patch, 2 ** len(config.stem))
        if remainder or not cut:
            raise ValueError(f"a stem of {len(config.stem)} stages does not fit patches of {config.patch}")
        if config.any_size and config.pooling in ("class", "mean"):
            raise ValueError("images of any size have no class token")
        self.stem = _build_stem(config)
        channels = config.stem[-1] if config.stem else 3
        self.any_size = config.any_size
        # The same product, which NaFlex's checkpoints have as one of whole patches.
        self.proj = (
            Linear(cut * cut * channels, config.dim, bias=config.patch_bias)
            if config.any_size
            else nn.Conv2d(channels, config.dim, cut, stride=cut, bias=config.patch_bias)
        )
        self.cut = cut
        self.mean, has_class_token = config.pooling == "mean", config.pooling in ("class", "mean")
        self.class_token = nn.Parameter(torch.empty(config.dim)) if has_class_token else None
        self.grid = config.image_size // config.patch
        self.position = nn.Parameter(torch.empty(has_class_token + self.grid * self.grid, config.dim))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels.contiguous(memory_format=torch.channels_last)) if self.stem else pixels
        if self.any_size:
            grid = x.unflatten(2, (-1, self.cut)).unflatten(4, (-1, self.cut))  # [B, C, h, p, w, p]
            tokens = self.proj(grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
            return tokens + self._resized_positions(grid.shape[2], grid.shape[4])
        tokens = self.proj(x).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            first = self.class_token + (tokens.mean(1, keepdim=True) if self.mean else 0)
            tokens = torch.cat([first.expand(tokens.shape[0], 1, -1), tokens], dim=1)
        return tokens + self.position

    def _resized_positions(self, height: int, width: int) -> Tensor:
        """The table of positions for a grid of another shape: `[height * width, D]`."""
        table = self.position.float().T.view(1, -1, self.grid, self.grid)
        table = nn.functional.interpolate(table, size=(height, width), mode="bilinear", antialias=True)
        return table[0].flatten(1).T.to(self.position.dtype)


class AttentionPooling(nn.Module):
    """A learned probe reads all tokens, then passes an MLP: `[B, N, D]` -> `[B, D]` (Lee et al. 2019, arXiv 1810.00825,
    section 3.2, with one seed; SigLIP's head)."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(config.dim))
        self.attn = Attention(config.dim, config.heads, memory_dim=config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.mlp = Mlp(config.dim, config.mlp_dim, config.activation)

    def forward(self, tokens: Tensor) -> Tensor:
        probe = self.probe.expand(tokens.shape[0], 1, -1)
        x = self.attn(probe, memory=self.attn.memory(tokens))
        return (x + self.mlp(self.norm(x)))[:, 0]


class Vit(nn.Module):
    """pixels `[B, 3, H, W]` -> Encoded(tokens `[B, N, D]`, pooled `[B, D]` or None, by `VitConfig.pooling`).

    H = W = `image_size`, or what `any_size` allows. N = H/patch * W/patch, and one more, the first, with a class token.
    """

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = PatchEmbed(config)
        self.norm_in = nn.LayerNorm(config.dim, eps=config.eps) if config.norm_first else nn.Identity()
        sizes = (config.dim, config.heads, config.mlp_dim, config.activation, config.eps)
        block = BlockConfig(*sizes, attention=HeadConfig(bias=config.qkv_bias))
        self.blocks = nn.ModuleList(Block(block) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(config.dim, eps=config.eps)
        if config.pooling == "attention":
            self.pool = AttentionPooling(config)

    def forward(self, pixels: Tensor) -> Encoded:
        x = self.norm_in(self.embed(pixels))
        for block in self.blocks:
            x = block(x)
        if self.config.norm_tokens:
            x = self.norm_out(x)
        if self.config.pooling == "attention":
            return Encoded(x, self.pool(x))
        if self.config.pooling == "none":
            return Encoded(x)
        return Encoded(x, x[:, 0] if self.config.norm_tokens else self.norm_out(x[:, 0]))
