"""U-Net and autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752).

Both are levels of residual convolutions, each level at half the resolution of the one above it. The U-Net has
transformer blocks beside them that read a text (section 3.3), as in Stable Diffusion 1, 2 and XL.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sightloop.nn.attention import Attention, HeadConfig, KeyValue, Linear
from sightloop.nn.blocks import Block, BlockConfig, Convolution, UpConvolution, sinusoids

_NO_BIAS = HeadConfig(bias=False)
_LOG_VARIANCE = (-30.0, 20.0)  # bounds of the encoder's log variance


@dataclass(frozen=True, slots=True)
class UnetConfig:
    """Sizes of the U-Net.

    Args:
        image_size: pixels a side that it was trained on.
        patch: pixels a side of one latent position.
        channels: of the latents.
        dims: channels of each level, from the finest.
        layers: residual convolutions of a level on the way down; on the way up one more.
        depths: transformer blocks after each residual convolution, one number a level; 0 for none.
        middle_depth: transformer blocks at the coarsest level between the two ways.
        heads: attention heads of each level.
        memory_dim: width of the text's tokens.
        groups: of the group norms.
        eps: of the residual convolutions' norms.
        sizes_dim: width of the embedding of each number that describes the image's size (SDXL, section 2.2); 0: none.
        pooled_dim: width of the pooled text beside them.
    """

    image_size: int
    patch: int
    channels: int
    dims: tuple[int, ...]
    layers: int
    depths: tuple[int, ...]
    middle_depth: int
    heads: tuple[int, ...]
    memory_dim: int
    groups: int = 32
    eps: float = 1e-5
    sizes_dim: int = 0
    pooled_dim: int = 0

    @property
    def dim(self) -> int:
        """Channels of the finest level."""
        return self.dims[0]

    @property
    def has_class_token(self) -> bool:
        """It has no tokens."""
        return False

    def build(self) -> Unet:
        """The U-Net."""
        return Unet(self)


@dataclass(frozen=True, slots=True)
class AutoencoderConfig:
    """Sizes of the autoencoder.

    Args:
        dims: channels of each level, from the finest.
        layers: residual convolutions of a level of the encoder; the decoder has one more.
        channels: of the latents.
        groups: of the group norms.
        scale: factor of the latents that makes their variance 1.
        quantized: whether 1 x 1 convolutions surround the latents.
        full_precision: whether its activations leave the range of float16 (SDXL).
    """

    dims: tuple[int, ...]
    layers: int
    channels: int = 4
    groups: int = 32
    scale: float = 0.18215
    quantized: bool = True
    full_precision: bool = False


class TwoLinear(nn.Module):
    """Two linear layers with SiLU between them: `[..., in]` -> `[..., out]`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = Linear(in_features, out_features)
        self.fc2 = Linear(out_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.silu(self.fc1(x)))


class ResidualConvolution(nn.Module):
    """Two convolutions with group norms and SiLU, and a time added between them: `[B, C, H, W]` -> `[B, C', H, W]`."""

    def __init__(
        self, in_channels: int, channels: int, groups: int, eps: float, time_dim: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = Convolution(in_channels, channels)
        if time_dim is not None:
            self.time = Linear(time_dim, channels)
        self.norm2 = nn.GroupNorm(groups, channels, eps)
        self.conv2 = Convolution(channels, channels)
        if in_channels != channels:
            self.shortcut = Convolution(in_channels, channels, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """time: `[B, time_dim]`, after its SiLU."""
        hidden = self.conv1(_silu(self.norm1(x)))
        if time is not None:
            hidden = _add(hidden, self.time(time)[:, :, None, None])
        hidden = self.conv2(_silu(self.norm2(hidden)))
        return _add(hidden, self.shortcut(x) if hasattr(self, "shortcut") else x)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, which read a text: `[B, C, H, W]` -> `[B, C, H, W]`."""

    def __init__(self, config: UnetConfig, level: int, depth: int) -> None:
        super().__init__()
        dim = config.dims[level]
        self.norm = nn.GroupNorm(config.groups, dim, 1e-6)
        self.proj_in = Linear(dim, dim)
        block = BlockConfig(
            dim,
            config.heads[level],
            4 * dim,
            "gelu",
            1e-5,
            memory_dim=config.memory_dim,
            attention=_NO_BIAS,
            gated=True,
        )
        self.blocks = nn.ModuleList(Block(block) for _ in range(depth))
        self.proj_out = Linear(dim, dim)

    def forward(self, x: Tensor, memory: Iterator[KeyValue]) -> Tensor:
        """`[B, C, H, W]` -> `[B, C, H, W]`; memory: the text's keys and values of each block, in order."""
        tokens = self.proj_in(_tokens(self.norm(x)))  # [B, H * W, C]
        for block in self.blocks:
            tokens = block(tokens, memory=next(memory))
        return _add(_image(self.proj_out(tokens), x), x)


class Level(nn.Module):
    """One level of the U-Net or the autoencoder: residual convolutions, transformers, a change of resolution."""

    def __init__(
        self,
        convolutions: Sequence[ResidualConvolution],
        transformers: Sequence[nn.Module] = (),
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(convolutions)
        self.attentions = nn.ModuleList(transformers)
        self.resample = resample

    def transformers(self) -> list[SpatialTransformer]:
        """The transformers, in order."""
        return [module for module in self.attentions if isinstance(module, SpatialTransformer)]

    def layers(self) -> Iterator[tuple[nn.Module, SpatialTransformer | None]]:
        """Each residual convolution with the transformer after it, if there is one."""
        transformers = self.transformers()
        for i, convolution in enumerate(self.resnets):
            yield convolution, transformers[i] if i < len(transformers) else None


class Unet(nn.Module):
    """Noise predictor: latents `[B, C, h, w]`, times `[B]` and a text's tokens -> `[B, C, h, w]`."""

    def __init__(self, config: UnetConfig) -> None:
        super().__init__()
        self.config = config
        dims, time_dim = config.dims, 4 * config.dims[0]
        levels = range(len(dims))
        self.conv_in = Convolution(config.channels, dims[0])
        self.time = TwoLinear(dims[0], time_dim)
        if config.sizes_dim:
            self.added = TwoLinear(config.pooled_dim + 6 * config.sizes_dim, time_dim)

        def level(at: int, inputs: Sequence[int], depth: int, resample: nn.Module | None = None) -> Level:
            layers = [ResidualConvolution(c, dims[at], config.groups, config.eps, time_dim) for c in inputs]
            transformers = [SpatialTransformer(config, at, depth) for _ in inputs] if depth else []
            return Level(layers, transformers, resample)

        before = [dims[max(0, at - 1)] for at in levels]  # channels that reach a level from above
        self.down = nn.ModuleList(
            level(
                at,
                [before[at], *[dims[at]] * (config.layers - 1)],
                config.depths[at],
                Convolution(dims[at], dims[at], stride=2) if at < levels[-1] else None,
            )
            for at in levels
        )
        last = levels[-1]
        self.middle = Level(
            [ResidualConvolution(dims[last], dims[last], config.groups, config.eps, time_dim) for _ in "12"],
            [SpatialTransformer(config, last, config.middle_depth)],
        )
        self.up = nn.ModuleList()
        for at in reversed(levels):
            below = dims[min(at + 1, last)]
            carried = [below, *[dims[at]] * config.layers]  # channels from the layer before
            skipped = [*[dims[at]] * config.layers, before[at]]  # and from the way down
            inputs = [a + b for a, b in zip(carried, skipped, strict=True)]
            self.up.append(level(at, inputs, config.depths[at], UpConvolution(dims[at]) if at else None))
        self.norm_out = nn.GroupNorm(config.groups, dims[0], config.eps)
        self.conv_out = Convolution(dims[0], config.channels)

    def memory(self, tokens: Tensor) -> list[KeyValue]:
        """Keys and values of a text's tokens `[B, N, memory_dim]` for each block, in the order of `forward`."""
        return [
            block.cross.memory(tokens)
            for level in (*_levels(self.down), self.middle, *_levels(self.up))
            for transformer in level.transformers()
            for block in transformer.blocks
            if isinstance(block, Block)
        ]

    def forward(
        self, latents: Tensor, times: Tensor, memory: Sequence[KeyValue], added: Tensor | None = None
    ) -> Tensor:
        """The prediction `[B, C, h, w]`.

        Args:
            latents: `[B, C, h, w]`; h and w divide by 2 at each level but the last.
            times: `[B]`, from 0 to 999.
            memory: of `self.memory`.
            added: pooled text and sizes, `[B, pooled_dim + 6 * sizes_dim]` (SDXL).
        """
        keys = iter(memory)
        time = self.time(sinusoids(times, self.config.dims[0]).to(latents.dtype))
        if added is not None:
            time = time + self.added(added)
        time = nn.functional.silu(time)  # [B, time_dim]
        x = self.conv_in(latents.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for level in _levels(self.down):
            for convolution, transformer in level.layers():
                x = convolution(x, time)
                x = x if transformer is None else transformer(x, keys)
                skips.append(x)
            if level.resample is not None:
                x = level.resample(x)
                skips.append(x)
        x = self.middle.resnets[0](x, time)
        x = self.middle.resnets[1](self.middle.transformers()[0](x, keys), time)
        for level in _levels(self.up):
            for convolution, transformer in level.layers():
                x = convolution(torch.cat([x, skips.pop()], dim=1), time)
                x = x if transformer is None else transformer(x, keys)
            if level.resample is not None:
                x = level.resample(x)
        return self.conv_out(_silu(self.norm_out(x)))


class Coder(nn.Module):
    """Encoder or decoder of the autoencoder: convolutions, and one attention layer at the coarsest level."""

    def __init__(self, config: AutoencoderConfig, *, decodes: bool) -> None:
        super().__init__()
        self.decodes = decodes
        dims, eps = config.dims, 1e-6
        wide, last = dims[-1], len(dims) - 1
        self.conv_in = Convolution(config.channels if decodes else 3, wide if decodes else dims[0])
        self.levels = nn.ModuleList()
        for at in reversed(range(len(dims))) if decodes else range(len(dims)):
            first = dims[min(at + 1, last)] if decodes else dims[max(at - 1, 0)]
            inputs = [first, *[dims[at]] * (config.layers - (not decodes))]
            layers = [ResidualConvolution(c, dims[at], config.groups, eps) for c in inputs]
            if decodes:
                resample = UpConvolution(dims[at]) if at else None
            else:
                resample = Convolution(dims[at], dims[at], stride=2, padding=0) if at < last else None
            self.levels.append(Level(layers, (), resample))
        self.middle = Level([ResidualConvolution(wide, wide, config.groups, eps) for _ in "12"])
        self.norm = nn.GroupNorm(config.groups, wide, eps)
        self.attention = Attention(wide, 1)
        self.norm_out = nn.GroupNorm(config.groups, dims[0] if decodes else wide, eps)
        self.conv_out = Convolution(dims[0] if decodes else wide, 3 if decodes else 2 * config.channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        x = self._middle(x) if self.decodes else x
        for level in _levels(self.levels):
            for convolution in level.resnets:
                x = convolution(x)
            if level.resample is not None:
                x = level.resample(x if self.decodes else nn.functional.pad(x, (0, 1, 0, 1)))
        x = x if self.decodes else self._middle(x)
        return self.conv_out(_silu(self.norm_out(x)))

    def _middle(self, x: Tensor) -> Tensor:
        x = self.middle.resnets[0](x)
        x = _add(_image(self.attention(_tokens(self.norm(x))), x), x)
        return self.middle.resnets[1](x)


class Autoencoder(nn.Module):
    """Variational autoencoder of images (Rombach et al. 2022, section 3.1)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Coder(config, decodes=False), Coder(config, decodes=True)
        if config.quantized:
            self.quant = Convolution(2 * config.channels, 2 * config.channels, 1)
            self.post_quant = Convolution(config.channels, config.channels, 1)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, `[B, C, h, w]` each, of pixels `[B, 3, H, W]` from -1 to 1."""
        moments = self.encoder(pixels)
        mean, log_variance = (self.quant(moments) if self.config.quantized else moments).chunk(2, dim=1)
        return mean, (log_variance.clamp(*_LOG_VARIANCE) / 2).exp()

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels `[B, 3, H, W]`, from -1 to 1, of latents `[B, C, h, w]`."""
        return self.decoder(self.post_quant(latents) if self.config.quantized else latents)


def _levels(modules: nn.ModuleList) -> list[Level]:
    return [module for module in modules if isinstance(module, Level)]


def _silu(x: Tensor) -> Tensor:
    """In place where no gradient is asked for."""
    return nn.functional.silu(x, inplace=not x.requires_grad)


def _add(branch: Tensor, x: Tensor) -> Tensor:
    """The sum, in the memory of the branch where no gradient is asked for."""
    return branch + x if branch.requires_grad else branch.add_(x)


def _tokens(x: Tensor) -> Tensor:
    """`[B, C, H, W]` -> `[B, H * W, C]`, a view where channels come last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _image(tokens: Tensor, like: Tensor) -> Tensor:
    """`[B, H * W, C]` -> `[B, C, H, W]` of `like`, a view."""
    rows, _, height, width = like.shape
    return tokens.view(rows, height, width, -1).permute(0, 3, 1, 2)
