"""CLIP's modified ResNet (Radford et al. 2021, section 2.4): three convolutions first, strides by average pooling, and
a last pooling by attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sightloop.nn.attention import Attention, Linear
from sightloop.types import Encoded


@dataclass(frozen=True, slots=True)
class ResnetConfig:
    """image_size: pixels a side, a multiple of `patch`. layers: blocks of the four stages. width: of the first, in
    channels. heads: of the pooling. dim: width of what it returns.
    """

    image_size: int
    layers: tuple[int, ...]
    width: int
    heads: int
    dim: int

    @property
    def patch(self) -> int:
        """How far apart the last positions are, in pixels of the image."""
        return 32

    def build(self) -> Resnet:
        """The tower, with weights as torch draws them."""
        return Resnet(self)


class ConvNorm(nn.Module):
    """A convolution without bias and its norm: `[B, C, H, W]` -> `[B, C', H', W']`."""

    def __init__(self, in_channels: int, out_channels: int, size: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=size // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Bottleneck(nn.Module):
    """Narrow, look around, widen by four, beside a residual (He et al. 2016). stride 2 averages pairs instead of
    leaving one out: `[B, C, H, W]` -> `[B, 4 * width, H / stride, W / stride]`."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = ConvNorm(in_channels, width, 1)
        self.second = ConvNorm(width, width, 3)
        self.third = ConvNorm(width, 4 * width, 1)
        self.shrink = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        changes = stride > 1 or in_channels != 4 * width
        self.shortcut = ConvNorm(in_channels, 4 * width, 1) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.first(x).relu_()).relu_()
        return (self.third(self.shrink(hidden)) + self.shortcut(self.shrink(x))).relu_()


class Resnet(nn.Module):
    """pixels `[B, 3, S, S]` -> Encoded(tokens `[B, (S/32)^2, 32 * width]`, pooled `[B, D]`)."""

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
        self.pool.out = Linear(last, config.dim)  # what other families do in a projection of its own

    def forward(self, pixels: Tensor) -> Encoded:
        x = pixels.contiguous(memory_format=torch.channels_last)
        for stem in (self.stem1, self.stem2, self.stem3):
            x = stem(x).relu_()
        x = nn.functional.avg_pool2d(x, 2)
        for stage in (self.stage1, self.stage2, self.stage3, self.stage4):
            x = stage(x)
        tokens = x.flatten(2).transpose(1, 2)
        # The mean of all positions asks; it and they are asked.
        positions = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + self.position
        return Encoded(tokens, self.pool(positions[:, :1], memory=self.pool.memory(positions))[:, 0])


def _build_stage(in_channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = Bottleneck(in_channels, width, stride)
    return nn.Sequential(first, *(Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)))
