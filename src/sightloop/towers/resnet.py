"""CLIP's modified ResNet (Radford et al. 2021, section 2.4).

It differs from He et al. 2016 in a stem of three convolutions, average pooling before strided convolutions, and
attention pooling instead of global average pooling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sightloop.nn.attention import Attention, Linear
from sightloop.types import Encoded


@dataclass(frozen=True, slots=True)
class ResnetConfig:
    """Sizes of a CLIP ResNet.

    Args:
        image_size: pixels a side, a multiple of `patch`.
        layers: number of blocks in each of the four stages.
        width: channels of the first stage's bottlenecks.
        heads: heads of attention pooling.
        dim: width D of the pooled output.
    """

    image_size: int
    layers: tuple[int, ...]
    width: int
    heads: int
    dim: int

    @property
    def patch(self) -> int:
        """Pixels between neighboring positions of the output."""
        return 32

    @property
    def has_class_token(self) -> bool:
        """Whether the first output token is a class token."""
        return False

    def build(self) -> Resnet:
        """The tower, with torch's default initialization."""
        return Resnet(self)


class ConvNorm(nn.Module):
    """Convolution without bias and batch norm: `[B, C, H, W]` -> `[B, C', H / stride, W / stride]`."""

    def __init__(self, in_channels: int, out_channels: int, size: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=size // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Bottleneck(nn.Module):
    """Residual bottleneck block (He et al. 2016): `[B, C, H, W]` -> `[B, 4 * width, H / stride, W / stride]`.

    With stride 2, average pooling halves the map before the last convolution and in the shortcut.
    """

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = ConvNorm(in_channels, width, 1)
        self.second = ConvNorm(width, width, 3)
        self.third = ConvNorm(width, 4 * width, 1)
        self.shrink = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        changes_shape = stride > 1 or in_channels != 4 * width
        self.shortcut = ConvNorm(in_channels, 4 * width, 1) if changes_shape else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.first(x).relu_()).relu_()
        return (self.third(self.shrink(hidden)) + self.shortcut(self.shrink(x))).relu_()


class Resnet(nn.Module):
    """CLIP ResNet: pixels `[B, 3, S, S]` -> Encoded(tokens `[B, (S / 32)^2, 32 * width]`, pooled `[B, D]`)."""

    def __init__(self, config: ResnetConfig) -> None:
        super().__init__()
        self.config = config
        width, last = config.width, 32 * config.width
        self.stem1 = ConvNorm(3, width // 2, 3, stride=2)
        self.stem2 = ConvNorm(width // 2, width // 2, 3)
        self.stem3 = ConvNorm(width // 2, width, 3)
        self.stage1 = _build_stage(width, width, config.layers[0], 1)
        self.stage2 = _build_stage(4 * width, 2 * width, config.layers[1], 2)
        self.stage3 = _build_stage(8 * width, 4 * width, config.layers[2], 2)
        self.stage4 = _build_stage(16 * width, 8 * width, config.layers[3], 2)
        self.position = nn.Parameter(torch.empty(1 + (config.image_size // config.patch) ** 2, last))
        self.pool = Attention(last, config.heads, memory_dim=last)
        self.pool.out = Linear(last, config.dim)  # serves as the image projection of the other CLIP models

    def forward(self, pixels: Tensor) -> Encoded:
        x = pixels.contiguous(memory_format=torch.channels_last)
        for stem in (self.stem1, self.stem2, self.stem3):
            x = stem(x).relu_()
        x = nn.functional.avg_pool2d(x, 2)  # [B, width, S / 4, S / 4]
        for stage in (self.stage1, self.stage2, self.stage3, self.stage4):
            x = stage(x)
        tokens = x.flatten(2).transpose(1, 2)  # [B, N, 32 * width]
        # Attention pooling: the mean token is the only query; it and all tokens are keys and values.
        memory = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + self.position
        return Encoded(tokens, self.pool(memory[:, :1], memory=self.pool.memory(memory))[:, 0])


def _build_stage(in_channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = Bottleneck(in_channels, width, stride)
    return nn.Sequential(first, *(Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)))
