"""EfficientNet-Lite0 (Tan and Le 2019, arXiv 1905.11946; the Lite variant of 2020) as an image tower.

A network of mobile convolutions that is small and quick on a CPU: no squeeze and excitation, ReLU6 everywhere. Its
batch norms are folded into the convolutions, so that it has no statistics. Its output becomes tokens for a text tower.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sightloop.nn.attention import Linear
from sightloop.nn.blocks import Block, BlockConfig
from sightloop.protocols import PatchAttention
from sightloop.types import Encoded

STEM = 32
# (blocks, kernel, stride of the first, expansion, channels) of each stage: EfficientNet-B0's.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
TRUNK_CHANNELS = STAGES[-1][-1]
HEAD = 1280


@dataclass(frozen=True, slots=True)
class EfficientNetConfig:
    """Sizes of an EfficientNet-Lite0 and of the transformer blocks behind it.

    Args:
        image_size: pixels a side, a multiple of `patch`.
        dim: width D of the tokens.
        layers: transformer blocks over the tokens; 0 for none.
        heads: attention heads of each block.
        mlp_dim: width of the MLPs' hidden layer.
        activation: of the MLPs, a key of `nn.blocks.ACTIVATIONS`.
        eps: of the norms.
    """

    image_size: int
    dim: int
    layers: int
    heads: int
    mlp_dim: int
    activation: str
    eps: float

    @property
    def patch(self) -> int:
        """Pixels between neighboring tokens."""
        return 32

    @property
    def has_class_token(self) -> bool:
        """Whether the first output token is a class token; it starts as the mean of the others."""
        return True

    def build(self) -> EfficientNet:
        """The tower, with torch's default initialization."""
        return EfficientNet(self)


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's padding "SAME": `[B, C, H, W]` -> `[B, C', ceil(H / stride), ceil(W / stride)]`.

    With stride 2 and even sides the right and the bottom get one pixel more than the left and the top.
    """

    def __init__(self, channels: int, width: int, size: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            channels, width, size, stride=stride, padding=size // 2 if stride == 1 else 0, groups=groups
        )

    def forward(self, input: Tensor) -> Tensor:
        if self.stride[0] > 1:
            total = [max(self.kernel_size[0] - (self.stride[0] - n % 2), 0) for n in input.shape[:1:-1]]
            input = nn.functional.pad(input, [side for n in total for side in (n // 2, n - n // 2)])
        return super().forward(input)


class MobileConv(nn.Module):
    """Inverted residual block (Sandler et al. 2018, arXiv 1801.04381): `[B, C, H, W]` -> `[B, C', H / s, W / s]`.

    A pointwise convolution to more channels (left out without expansion), one of each channel by itself, and one back
    to few, without activation; the sum with the input where the shape stays.
    """

    def __init__(self, channels: int, width: int, size: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.expand = SameConv(channels, inner, 1) if expansion > 1 else None
        self.depthwise = SameConv(inner, inner, size, stride=stride, groups=inner)
        self.project = SameConv(inner, width, 1)
        self.residual = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        hidden = x if self.expand is None else nn.functional.relu6(self.expand(x), inplace=True)
        hidden = self.project(nn.functional.relu6(self.depthwise(hidden), inplace=True))
        return x + hidden if self.residual else hidden


class Trunk(nn.Module):
    """The convolutions before the head: pixels `[B, 3, H, W]` -> features `[B, 320, H / 32, W / 32]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv(3, STEM, 3, stride=2)
        blocks: list[nn.Module] = []
        channels = STEM
        for count, size, stride, expansion, width in STAGES:
            for number in range(count):
                step = stride if number == 0 else 1
                blocks.append(MobileConv(channels, width, size, stride=step, expansion=expansion))
                channels = width
        self.stages = nn.Sequential(*blocks)

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.contiguous(memory_format=torch.channels_last)
        return self.stages(nn.functional.relu6(self.stem(x), inplace=True))


class EfficientNet(nn.Module):
    """EfficientNet-Lite0 tower: pixels `[B, 3, S, S]` -> Encoded(tokens `[B, 1 + (S / 32)^2, D]`, pooled `[B, D]`).

    In place of pixels it takes the features `[B, 320, S / 32, S / 32]` of its trunk, which a training with a frozen
    trunk computes once. The first token starts as the mean of the others; its last state is the pooled one.
    """

    def __init__(self, config: EfficientNetConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = Trunk()
        self.head = SameConv(TRUNK_CHANNELS, HEAD, 1)
        self.proj = Linear(HEAD, config.dim)
        self.position = nn.Parameter(torch.empty(1 + (config.image_size // config.patch) ** 2, config.dim))
        self.norm_in = nn.LayerNorm(config.dim, eps=config.eps)
        block = BlockConfig(config.dim, config.heads, config.mlp_dim, config.activation, config.eps)
        self.blocks = nn.ModuleList(Block(block) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(config.dim, eps=config.eps)

    def forward(self, pixels: Tensor) -> Encoded:
        features = self.trunk(pixels) if pixels.shape[1] == 3 else pixels
        x = nn.functional.relu6(self.head(features), inplace=True).flatten(2).transpose(1, 2)  # [B, N, 1280]
        x = self.proj(torch.cat([x.mean(1, keepdim=True), x], dim=1))
        x = self.norm_in(x + self.position)
        for block in self.blocks:
            x = block(x)
        x = self.norm_out(x)
        return Encoded(x, x[:, 0])

    def patch_attention(self) -> PatchAttention | None:
        """The attention that the class token reads the other tokens by; None without transformer blocks."""
        blocks = [block for block in self.blocks if isinstance(block, Block)]
        return PatchAttention([block.attn for block in blocks], "class", 1) if blocks else None
