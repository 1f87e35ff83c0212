"""Vision transformer (Dosovitskiy et al. 2020): image tower of CLIP, BLIP, SigLIP and all families but Florence-2.

The families differ only in their `VitConfig`. Small towers for small datasets may have a convolutional stem (Xiao et
al. 2021, arXiv 2106.14881).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sightloop.nn.attention import Attention, HeadConfig, Linear
from sightloop.nn.blocks import Block, BlockConfig, Mlp
from sightloop.protocols import PatchAttention
from sightloop.types import Encoded


@dataclass(frozen=True, slots=True)
class VitConfig:
    """Sizes and options of a vision transformer.

    Args:
        image_size: pixels a side; with `any_size`, side of the position table times `patch`.
        patch: pixels a side of a patch.
        dim: width D.
        layers: number of blocks.
        heads: attention heads of each block.
        mlp_dim: width of the MLPs' hidden layer.
        activation: of the MLPs, a key of `nn.blocks.ACTIVATIONS`.
        eps: of the norms.
        norm_first: norm before the first block (CLIP).
        norm_tokens: the final norm is applied to all tokens (BLIP, SigLIP), else to the class token only (CLIP).
        patch_bias: the patch projection has a bias (BLIP, SigLIP).
        stem: channels of the convolutional stages before the patch projection. Each halves the sides of the image, so
            2^len(stem) must divide `patch`; () for no stem.
        stem_blocks: residual blocks in each stage.
        stem_norm: "channel" for LayerNorm over the channels; "batch" for BatchNorm (Ioffe and Szegedy 2015), which
            learns faster from small datasets; "fixed" for the constant scale and shift of a trained BatchNorm.
        pooling: pooled state of the image: "class", a class token before the patches (CLIP, BLIP); "mean", a class
            token that starts as the mean of the patches, for small datasets; "attention", attention pooling with a
            learned query (SigLIP); "none" (SigLIP's tower in PaliGemma).
        any_size: accept any height and width that `patch` divides; the position table is resized to each image (NaFlex,
            SigLIP 2, Tschannen et al. 2025, section 2.4). Not with a class token.
        qkv_bias: whether the projections of queries, keys and values have a bias.
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

    @property
    def has_class_token(self) -> bool:
        """Whether the first output token is a class token."""
        return self.pooling in ("class", "mean")

    def build(self) -> Vit:
        """The tower, with torch's default initialization."""
        return Vit(self)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position: `[B, C, H, W]` -> `[B, C, H, W]`."""

    def forward(self, input: Tensor) -> Tensor:
        # With channels last in memory, both permutations are views.
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


_STEM_NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "channel": ChannelNorm,
    "batch": nn.BatchNorm2d,
    "fixed": lambda width, eps: nn.Conv2d(width, width, 1, groups=width),
}


class ResidualConvs(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions (He et al. 2016, arXiv 1603.05027): `[B, C, H, W]`."""

    def __init__(self, width: int, norm: Callable[[int, float], nn.Module], eps: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(width, eps), norm(width, eps)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(nn.functional.relu(self.norm1(x)))
        return x + self.conv2(nn.functional.relu(self.norm2(hidden)))


def _build_stem(config: VitConfig) -> nn.Sequential:
    """n stages of a strided 3x3 convolution and residual blocks, a norm: `[B, 3, H, W]` -> `[B, C, H/2^n, W/2^n]`."""
    norm = _STEM_NORMS[config.stem_norm]
    layers: list[nn.Module] = []
    for in_channels, width in zip((3, *config.stem), config.stem, strict=False):
        layers.append(nn.Conv2d(in_channels, width, 3, stride=2, padding=1))
        layers += [ResidualConvs(width, norm, config.eps) for _ in range(config.stem_blocks)]
    return nn.Sequential(*layers, norm(config.stem[-1], config.eps), nn.ReLU()) if layers else nn.Sequential()


class PatchEmbed(nn.Module):
    """Patch embedding: projected patches, a class token before them, learned positions (ViT, section 3.1).

    pixels `[B, 3, H, W]` -> `[B, 1 + H/patch * W/patch, D]`, without a class token `[B, H/patch * W/patch, D]`.

    Raises:
        ValueError: the stem does not divide the patch, or `any_size` is combined with a class token.
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
        # The same product either way; NaFlex's checkpoints store it as a linear layer over whole patches.
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
            tokens = self.proj(grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))  # [B, h * w, D]
            return tokens + self._resized_positions(grid.shape[2], grid.shape[4])
        tokens = self.proj(x).flatten(2).transpose(1, 2)  # [B, N, D]
        if self.class_token is not None:
            class_token = self.class_token + (tokens.mean(1, keepdim=True) if self.mean else 0)
            tokens = torch.cat([class_token.expand(tokens.shape[0], 1, -1), tokens], dim=1)
        return tokens + self.position

    def _resized_positions(self, height: int, width: int) -> Tensor:
        """The position table interpolated to a grid of height x width patches: `[height * width, D]`."""
        table = self.position.float().T.view(1, -1, self.grid, self.grid)
        table = nn.functional.interpolate(table, size=(height, width), mode="bilinear", antialias=True)
        return table[0].flatten(1).T.to(self.position.dtype)


class ProbeHead(nn.Module):
    """SigLIP's pooling: attention of one learned query over all tokens, then an MLP, `[B, N, D]` -> `[B, D]`.

    Pooling by multihead attention with one seed vector (Lee et al. 2019, arXiv 1810.00825, section 3.2).
    """

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
    """Vision transformer: pixels `[B, 3, H, W]` -> Encoded(tokens `[B, N, D]`, pooled `[B, D]` or None).

    H = W = `image_size`, or any multiple of `patch` with `any_size`. N = H/patch * W/patch; a class token adds one, the
    first. See `VitConfig.pooling` for the pooled state.
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
            self.pool = ProbeHead(config)

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

    def patch_attention(self) -> PatchAttention | None:
        """The attention that the pooled state reads patches by; None without one."""
        if self.config.pooling == "attention":
            return PatchAttention([self.pool.attn], "queries", 0)
        if self.config.has_class_token:
            blocks = [block for block in self.blocks if isinstance(block, Block)]
            return PatchAttention([block.attn for block in blocks], "class", 1)
        return None
