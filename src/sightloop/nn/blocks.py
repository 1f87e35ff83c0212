"""The transformer block (pre- or post-norm, with or without cross-attention), its MLP, norms and activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.utils.checkpoint import checkpoint

from sightloop.nn.attention import STANDARD_HEADS, Attention, HeadConfig, KeyValue, KeyValueCache, Linear


class _QuickGeluFunction(torch.autograd.Function):
    """x * sigmoid(1.702 x) as silu(1.702 x) / 1.702: saves one tensor for the backward pass instead of two."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        scaled = 1.702 * x
        ctx.save_for_backward(scaled)
        return nn.functional.silu(scaled).mul_(1 / 1.702)

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (scaled,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, scaled)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), `[...]` -> `[...]`: the GELU approximation of OpenAI's CLIP (Hendrycks and Gimpel 2016)."""
    if x.requires_grad:
        return _QuickGeluFunction.apply(x)  # pyright: ignore[reportReturnType]
    return (1.702 * x).sigmoid_().mul_(x)  # in place: a third of the time is memory otherwise


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, `[...]` -> `[...]` (Hendrycks and Gimpel 2016, section 2)."""
    return nn.functional.gelu(x, approximate="tanh")


# Name in a checkpoint's config -> function.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "quick_gelu": quick_gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
}


class RmsNorm(nn.Module):
    """RMSNorm, x / rms(x) * (offset + weight), computed in float32 (Zhang and Sennrich 2019): `[..., D]` -> `[..., D]`.

    Args:
        dim: width D.
        eps: added to the mean square.
        offset: 1 for weights that are stored around zero (Gemma), else 0.
    """

    def __init__(self, dim: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float()
        if self.offset:
            weight = weight + self.offset
        return nn.functional.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)


NormKind = Literal["layer", "rms", "rms_offset"]


def build_norm(kind: NormKind, dim: int, eps: float) -> nn.Module:
    """LayerNorm (Ba et al. 2016), RMSNorm, or RMSNorm with weights stored around zero ("rms_offset")."""
    if kind == "layer":
        return nn.LayerNorm(dim, eps=eps)
    return RmsNorm(dim, eps, 1.0 if kind == "rms_offset" else 0.0)


class Modulation(NamedTuple):
    """What a condition does to the self-attention and MLP branches of a block (adaLN, Peebles and Xie 2023), `[R, D]`.

    A branch f becomes gate * f(norm(x) * (1 + scale) + shift). With all three at zero (adaLN-Zero) a block is the
    identity, but for its cross-attention.
    """

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift of each row: x `[R, L, D]`, shift and scale `[R, D]` -> `[R, L, D]`."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class BlockConfig(NamedTuple):
    """Shape and options of one `Block`.

    Attributes:
        dim: width D.
        heads: query heads of the attention layers.
        mlp_dim: width of the MLP's hidden layer.
        activation: of the MLP, a key of `ACTIVATIONS`.
        eps: of the norms.
        post_norm: norms follow the residual sum (BERT) instead of opening each branch (CLIP, ViT).
        memory_dim: width of the tokens that cross-attention reads, None for no cross-attention.
        attention: options of the attention heads.
        norm: kind of the norms.
        gated: the MLP's activation is multiplied with a second projection (GLU variants, Shazeer 2020).
        mlp_bias: whether the MLP's linear layers have a bias.
        sandwich: each branch also ends in a norm, before the residual sum (Gemma 2).
    """

    dim: int
    heads: int
    mlp_dim: int
    activation: str
    eps: float
    post_norm: bool = False
    memory_dim: int | None = None
    attention: HeadConfig = STANDARD_HEADS
    norm: NormKind = "layer"
    gated: bool = False
    mlp_bias: bool = True
    sandwich: bool = False


class Mlp(nn.Module):
    """Two linear layers with an activation between them: `[..., D]` -> `[..., D]`.

    With `gated`, `fc1` is twice as wide: its first half is activated and multiplied with its second half.
    """

    def __init__(
        self, dim: int, hidden: int, activation: str, *, gated: bool = False, bias: bool = True
    ) -> None:
        super().__init__()
        self.gated = gated
        self.fc1 = Linear(dim, hidden * (1 + gated), bias=bias)
        self.fc2 = Linear(hidden, dim, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)  # [..., hidden], [..., 2 * hidden] if gated
        if self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            return self.fc2(self.activation(gate) * up)
        return self.fc2(self.activation(hidden))


class Convolution(nn.Module):
    """Convolution over the positions of a feature map: `[B, in, H, W]` -> `[B, out, H', W']`.

    Attributes:
        weight: `[out, in, k, k]`.
        bias: `[out]`.
        stride: positions between neighboring outputs.
        padding: zeros around the map; None for as many as keep its size at stride 1.
        kernel: function (x, packed, bias) -> y that replaces torch's (`nn.prepack`), or None.
        packed: the weight in the memory layout of `kernel`, or None.
    """

    def __init__(
        self, in_channels: int, channels: int, size: int = 3, *, stride: int = 1, padding: int | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, in_channels, size, size))
        self.bias = nn.Parameter(torch.empty(channels))
        self.stride, self.padding = stride, size // 2 if padding is None else padding
        self.kernel: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
        self.packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is not None and self.packed is not None:
            return self.kernel(x, self.packed, self.bias)
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class UpConvolution(nn.Module):
    """Nearest neighbors at twice the resolution, then a 3 x 3 convolution: `[B, C, H, W]` -> `[B, C, 2 H, 2 W]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Convolution(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.kernel is not None:
            return self.conv(x)  # both at once
        return self.conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResidualLayer(Protocol):
    """A layer with residual branches and the training options of `nn.regularization`: `Block`, DaViT's layers."""

    training: bool
    dropout: float
    drop_path: float
    activation_checkpointing: bool


class Block(nn.Module):
    """Transformer block: self-attention, optional cross-attention and MLP, each a residual branch with its norm.

    Pre-norm (CLIP, ViT): x + f(norm(x)). Post-norm (BERT): norm(x + f(x)).
    """

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        dim, heads, options = config.dim, config.heads, config.attention
        self.post_norm = config.post_norm
        self.sandwich = config.sandwich
        self.attn = Attention(dim, heads, options=options)
        self.norm1 = build_norm(config.norm, dim, config.eps)
        if config.memory_dim is not None:
            self.cross = Attention(dim, heads, memory_dim=config.memory_dim, options=options)
            self.norm_cross = build_norm(config.norm, dim, config.eps)
        self.mlp = Mlp(dim, config.mlp_dim, config.activation, gated=config.gated, bias=config.mlp_bias)
        self.norm2 = build_norm(config.norm, dim, config.eps)
        if config.sandwich:
            self.norm1_out = build_norm(config.norm, dim, config.eps)
            self.norm2_out = build_norm(config.norm, dim, config.eps)
        # Set by `nn.regularization` for training; not part of the config.
        self.dropout = 0.0
        self.drop_path = 0.0
        self.activation_checkpointing = False

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        memory: KeyValue | None = None,
        memory_mask: Tensor | None = None,
        cache: tuple[KeyValueCache, int] | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        modulation: Modulation | None = None,
    ) -> Tensor:
        """`[R, L, D]` -> `[R, L, D]`.

        Args:
            x: `[R, L, D]`.
            mask, causal, cache, rope: of self-attention, see `Attention.forward`.
            memory: keys and values for cross-attention, which is skipped without them.
            memory_mask: mask over the memory, broadcast over `[B, H, R/B * L, N]`.
            modulation: of a pre-norm block without a cache, the condition of each row; None for none.
        """

        def both_halves(x: Tensor) -> Tensor:
            if modulation is not None:
                return self._modulated(x, modulation, mask, memory, memory_mask)
            return self.mlp_half(self.self_attention_half(x, mask, causal, cache, rope), memory, memory_mask)

        if self.activation_checkpointing and torch.is_grad_enabled() and cache is None:
            out: Tensor = checkpoint(both_halves, x, use_reentrant=False)
            return out
        return both_halves(x)

    def self_attention_half(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: tuple[KeyValueCache, int] | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Self-attention branch, in which positions exchange information: `[R, L, D]` -> `[R, L, D]`."""
        if self.post_norm:
            mixed = self.attn(x, mask=mask, causal=causal, cache=cache, rope=rope)
            return self.norm1(x + drop_branch(mixed, self))
        mixed = self.attn(self.norm1(x), mask=mask, causal=causal, cache=cache, rope=rope)
        return x + drop_branch(self.norm1_out(mixed) if self.sandwich else mixed, self)

    def mlp_half(
        self, x: Tensor, memory: KeyValue | None = None, memory_mask: Tensor | None = None
    ) -> Tensor:
        """Cross-attention (with a memory) and MLP branches, computed per position: `[R, L, D]` -> `[R, L, D]`."""
        cross, mlp = self.cross if memory is not None else None, self.mlp
        if self.post_norm:
            if cross is not None:
                x = self.norm_cross(x + drop_branch(cross(x, memory=memory, mask=memory_mask), self))
            return self.norm2(x + drop_branch(mlp(x), self))
        if cross is not None:
            x = x + drop_branch(cross(self.norm_cross(x), memory=memory, mask=memory_mask), self)
        hidden = mlp(self.norm2(x))
        return x + drop_branch(self.norm2_out(hidden) if self.sandwich else hidden, self)

    def _modulated(
        self,
        x: Tensor,
        modulation: Modulation,
        mask: Tensor | None,
        memory: KeyValue | None,
        memory_mask: Tensor | None,
    ) -> Tensor:
        """`forward` with a condition; cross-attention is not modulated (PixArt, Chen et al. 2023, section 2.3)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        mixed = self.attn(modulate(self.norm1(x), shift1, scale1), mask=mask)
        x = x + gate1[:, None] * drop_branch(mixed, self)
        if memory is not None:
            crossed = self.cross(self.norm_cross(x), memory=memory, mask=memory_mask)
            x = x + drop_branch(crossed, self)
        hidden = self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x + gate2[:, None] * drop_branch(hidden, self)


def drop_branch(branch: Tensor, layer: ResidualLayer) -> Tensor:
    """Dropout and drop path of a residual branch `[R, ..., D]` in training; the branch itself in evaluation."""
    if layer.training and layer.dropout:
        branch = nn.functional.dropout(branch, layer.dropout)
    if layer.training and layer.drop_path:
        # One draw per row: the branch of a dropped row is zero, the others are scaled to keep the mean.
        keep_prob, row_shape = 1 - layer.drop_path, (len(branch), *[1] * (branch.ndim - 1))
        branch = branch * branch.new_empty(row_shape).bernoulli_(keep_prob).div_(keep_prob)
    return branch


def sinusoids(values: Tensor, dim: int) -> Tensor:
    """Cosines and sines of numbers, frequencies 1 to 1/10,000 (Ho et al. 2020): `[...]` -> float32 `[..., dim]`."""
    steps = torch.arange(dim // 2, dtype=torch.float32, device=values.device)
    angles = values.float()[..., None] * torch.exp(-math.log(10_000) / (dim // 2) * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
