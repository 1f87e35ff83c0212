"""DaViT (Ding et al. 2022, arXiv 2204.03645): windows of places and groups of channels attend in turn. Florence-2's
image tower."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sightloop.nn.attention import Attention, HeadConfig, Linear, attend
from sightloop.nn.blocks import Mlp, drop_branch
from sightloop.types import Encoded


@dataclass(frozen=True, slots=True)
class DavitConfig:
    """Sizes, one of each for every stage.

    kernels, strides, paddings: of the convolution that begins a stage and makes the image smaller. norm_first:
    whether its norm comes before it. dims: widths. depths: pairs of layers, one over windows, one over channels.
    heads: of windows, groups: of channels. window: places a side. mlp_ratio: width of the MLPs / width.
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

    image_size: ClassVar[int] = 0  # images of all sizes

    @property
    def patch(self) -> int:
        """How many pixels a side become one place."""
        return math.prod(self.strides)


class WindowAttention(nn.Module):
    """Self-attention inside windows that do not overlap (section 3.1): `[B, H, W, D]` -> `[B, H, W, D]`.

    Windows that reach over the edge are filled with zeros, which are attended to: so it was trained.
    """

    def __init__(self, dim: int, heads: int, window: int, *, bias: bool) -> None:
        super().__init__()
        self.attn = Attention(dim, heads, options=HeadConfig(bias=bias))
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        side, (batch, height, width, dim) = self.window, x.shape
        x = nn.functional.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        down, across = x.shape[1] // side, x.shape[2] // side
        windows = x.view(batch, down, side, across, side, dim).transpose(2, 3).reshape(-1, side * side, dim)
        mixed = self.attn(windows).view(batch, down, across, side, side, dim).transpose(2, 3)
        return mixed.reshape(x.shape)[:, :height, :width]


class ChannelAttention(nn.Module):
    """Attention among the channels of a group, each a vector over all places (section 3.2): `[B, H, W, D]` -> same."""

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
        query, key, value = fused.permute(2, 0, 3, 4, 1)  # each [B, groups, channels, places]
        return self.out(attend(query, key, value).permute(0, 3, 1, 2).reshape(x.shape))


class DavitLayer(nn.Module):
    """A depthwise convolution, a mixer, another convolution, an MLP, each beside a residual: `[B, H, W, D]`."""

    def __init__(self, dim: int, mixer: nn.Module, hidden: int, activation: str) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in range(2))
        self.norm1, self.norm2 = (nn.LayerNorm(dim) for _ in range(2))
        self.mixer = mixer
        self.mlp = Mlp(dim, hidden, activation)
        # For training alone: see `nn.regularization`.
        self.dropout = self.drop_path = 0.0
        self.activation_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(self._forward, x, use_reentrant=False))
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        x = x + _convolve(self.conv1, x)
        x = x + drop_branch(self.mixer(self.norm1(x)), self)
        x = x + _convolve(self.conv2, x)
        return x + drop_branch(self.mlp(self.norm2(x)), self)


class DavitStage(nn.Module):
    """A convolution that makes the image smaller, then layers: `[B, H, W, C]` -> `[B, H / stride, W / stride, D]`."""

    def __init__(self, config: DavitConfig, stage: int) -> None:
        super().__init__()
        dim, before = config.dims[stage], 3 if stage == 0 else config.dims[stage - 1]
        self.norm_first = config.norm_first[stage]
        size = config.kernels[stage], config.strides[stage], config.paddings[stage]
        self.conv = nn.Conv2d(before, dim, *size)
        self.norm = nn.LayerNorm(before if self.norm_first else dim)
        heads, groups, bias = config.heads[stage], config.groups[stage], config.qkv_bias
        shape, depth = (int(dim * config.mlp_ratio), config.activation), config.depths[stage]
        self.spatial = nn.ModuleList(
            DavitLayer(dim, WindowAttention(dim, heads, config.window, bias=bias), *shape)
            for _ in range(depth)
        )
        self.channel = nn.ModuleList(
            DavitLayer(dim, ChannelAttention(dim, groups, bias=bias), *shape) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = _convolve(self.conv, self.norm(x)) if self.norm_first else self.norm(_convolve(self.conv, x))
        for spatial, channel in zip(self.spatial, self.channel, strict=True):
            x = channel(spatial(x))
        return x


class Davit(nn.Module):
    """pixels `[B, 3, H, W]` -> Encoded(tokens `[B, N, D]`), the places of the last stage row by row."""

    def __init__(self, config: DavitConfig) -> None:
        super().__init__()
        self.config = config
        self.stages = nn.ModuleList(DavitStage(config, stage) for stage in range(len(config.dims)))

    @property
    def stack(self) -> list[nn.Module]:
        """All layers in the order in which they work."""
        pairs = [
            zip(stage.spatial, stage.channel, strict=True) for stage in cast("list[Stage]", [*self.stages])
        ]
        return [layer for stage in pairs for pair in stage for layer in pair]

    def feature_map(self, pixels: Tensor) -> Tensor:
        """-> `[B, H / patch, W / patch, D]`, rounded up."""
        x = pixels.permute(0, 2, 3, 1).contiguous()
        for stage in self.stages:
            x = stage(x)
        return x

    def forward(self, pixels: Tensor) -> Encoded:
        return Encoded(self.feature_map(pixels).flatten(1, 2))


def _convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution over `[B, H, W, C]`; channels lie last in memory, so that both turns are views."""
    out: Tensor = conv(x.permute(0, 3, 1, 2))
    return out.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
