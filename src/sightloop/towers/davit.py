"""DaViT, the image tower of Florence-2: attention over windows of patches and over groups of channels in turn.

Ding et al. 2022, arXiv 2204.03645. Feature maps are `[B, H, W, D]` throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sightloop.nn.attention import Attention, HeadConfig, Linear, attend
from sightloop.nn.blocks import Mlp, drop_branch
from sightloop.types import Encoded


@dataclass(frozen=True, slots=True)
class DavitConfig:
    """Sizes of a DaViT; tuples have one entry per stage.

    Args:
        kernels: kernel size of the strided convolution that opens a stage.
        strides: its stride.
        paddings: its padding.
        norm_first: whether its norm precedes it.
        dims: width D.
        depths: pairs of layers, one with window and one with channel attention.
        heads: heads of window attention.
        groups: groups of channel attention.
        window: side of a window, in positions.
        mlp_ratio: hidden width of the MLPs / D.
        activation: of the MLPs, a key of `nn.blocks.ACTIVATIONS`.
        qkv_bias: whether the projections of queries, keys and values have a bias.
    """

    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    paddings: tuple[int, ...]
    norm_first: tuple[bool, ...]
    dims: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    groups: tuple[int, ...]
    window: int
    mlp_ratio: float
    activation: str
    qkv_bias: bool

    image_size: ClassVar[int] = 0  # images of any size

    @property
    def patch(self) -> int:
        """Pixels a side that become one output position."""
        return math.prod(self.strides)

    @property
    def dim(self) -> int:
        """Width of the output."""
        return self.dims[-1]

    @property
    def has_class_token(self) -> bool:
        """Whether the first output token is a class token."""
        return False

    def build(self) -> Davit:
        """The tower, with weights as torch draws them."""
        return Davit(self)


class WindowMixer(nn.Module):
    """Self-attention inside non-overlapping windows (section 3.1): `[B, H, W, D]` -> `[B, H, W, D]`.

    The map is padded with zeros at the right and bottom to whole windows; as in training, the padding is attended to.
    """

    def __init__(self, dim: int, heads: int, window: int, *, bias: bool) -> None:
        super().__init__()
        self.attn = Attention(dim, heads, options=HeadConfig(bias=bias))
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        side, (batch, height, width, dim) = self.window, x.shape
        x = nn.functional.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        down, across = x.shape[1] // side, x.shape[2] // side
        # [B, down, side, across, side, D] -> [B * down * across, side * side, D]
        windows = x.view(batch, down, side, across, side, dim).transpose(2, 3).reshape(-1, side * side, dim)
        mixed = self.attn(windows).view(batch, down, across, side, side, dim).transpose(2, 3)
        return mixed.reshape(x.shape)[:, :height, :width]


class ChannelMixer(nn.Module):
    """Attention among the channels of a group (section 3.2): `[B, H, W, D]` -> `[B, H, W, D]`.

    Queries and keys are the channels, each a vector over all H * W positions.
    """

    def __init__(self, dim: int, groups: int, *, bias: bool) -> None:
        super().__init__()
        if dim % groups:
            raise ValueError(f"a width of {dim} cannot be split into {groups} groups")
        self.qkv = Linear(dim, 3 * dim, bias=bias)
        self.out = Linear(dim, dim)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        fused = self.qkv(x).view(batch, height * width, 3, self.groups, dim // self.groups)
        query, key, value = fused.permute(2, 0, 3, 4, 1)  # [B, groups, D / groups, H * W] each
        return self.out(attend(query, key, value).permute(0, 3, 1, 2).reshape(x.shape))


class DavitLayer(nn.Module):
    """Depthwise convolution, attention, depthwise convolution, MLP, each a residual branch: `[B, H, W, D]` -> same.

    Args:
        dim: width D.
        mixer: `WindowMixer` or `ChannelMixer`.
        hidden: width of the MLP's hidden layer.
        activation: of the MLP.
    """

    def __init__(self, dim: int, mixer: nn.Module, hidden: int, activation: str) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in range(2))
        self.norm1, self.norm2 = (nn.LayerNorm(dim) for _ in range(2))
        self.mixer = mixer
        self.mlp = Mlp(dim, hidden, activation)
        # Set by `nn.regularization` for training.
        self.dropout = self.drop_path = 0.0
        self.activation_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(self._forward, x, use_reentrant=False)
            return out
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        x = x + _convolve(self.conv1, x)
        x = x + drop_branch(self.mixer(self.norm1(x)), self)
        x = x + _convolve(self.conv2, x)
        return x + drop_branch(self.mlp(self.norm2(x)), self)


class DavitStage(nn.Module):
    """Strided convolution, then pairs of layers: `[B, H, W, C]` -> `[B, H / stride, W / stride, D]`."""

    def __init__(self, config: DavitConfig, stage: int) -> None:
        super().__init__()
        dim, in_channels = config.dims[stage], 3 if stage == 0 else config.dims[stage - 1]
        self.norm_first = config.norm_first[stage]
        size = config.kernels[stage], config.strides[stage], config.paddings[stage]
        self.conv = nn.Conv2d(in_channels, dim, *size)
        self.norm = nn.LayerNorm(in_channels if self.norm_first else dim)
        heads, groups, bias = config.heads[stage], config.groups[stage], config.qkv_bias
        mlp, depth = (int(dim * config.mlp_ratio), config.activation), config.depths[stage]
        self.spatial = nn.ModuleList(
            DavitLayer(dim, WindowMixer(dim, heads, config.window, bias=bias), *mlp) for _ in range(depth)
        )
        self.channel = nn.ModuleList(
            DavitLayer(dim, ChannelMixer(dim, groups, bias=bias), *mlp) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = _convolve(self.conv, self.norm(x)) if self.norm_first else self.norm(_convolve(self.conv, x))
        for spatial, channel in zip(self.spatial, self.channel, strict=True):
            x = channel(spatial(x))
        return x


class Davit(nn.Module):
    """DaViT: pixels `[B, 3, H, W]` -> Encoded(tokens `[B, N, D]`), the last stage's positions row by row."""

    def __init__(self, config: DavitConfig) -> None:
        super().__init__()
        self.config = config
        self.stages = nn.ModuleList(DavitStage(config, stage) for stage in range(len(config.dims)))

    @property
    def stack(self) -> list[nn.Module]:
        """All layers in the order of the forward pass, for `nn.regularization`."""
        return [
            layer
            for stage in self.stages
            if isinstance(stage, DavitStage)
            for pair in zip(stage.spatial, stage.channel, strict=True)
            for layer in pair
        ]

    def feature_map(self, pixels: Tensor) -> Tensor:
        """pixels `[B, 3, H, W]` -> output of the last stage, `[B, ceil(H / patch), ceil(W / patch), D]`."""
        x = pixels.permute(0, 2, 3, 1).contiguous()
        for stage in self.stages:
            x = stage(x)
        return x

    def forward(self, pixels: Tensor) -> Encoded:
        return Encoded(self.feature_map(pixels).flatten(1, 2))


def _convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution over `[B, H, W, C]`; with channels last in memory, both permutations are views."""
    out: Tensor = conv(x.permute(0, 3, 1, 2))
    return out.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
