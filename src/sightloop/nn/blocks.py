"""The one transformer block (pre- or post-norm, with or without cross-attention), its MLP and its activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sightloop.nn.attention import STANDARD_HEADS, Attention, Cache, HeadConfig, KeyValue, Linear


class _QuickGelu(torch.autograd.Function):
    """silu(1.702 x) / 1.702, which is x * sigmoid(1.702 x): one tensor kept and one pass backward, not two and five."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        scaled = 1.702 * x
        ctx.save_for_backward(scaled)
        return nn.functional.silu(scaled).mul_(1 / 1.702)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (scaled,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, scaled)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): the approximation that OpenAI's CLIP was trained with (Hendrycks and Gimpel 2016)."""
    if x.requires_grad:
        return _QuickGelu.apply(x)  # pyright: ignore[reportReturnType]
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (Hendrycks and Gimpel 2016)."""
    return nn.functional.gelu(x, approximate="tanh")


# The names are those of checkpoint configs.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "quick_gelu": quick_gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
}


class RmsNorm(nn.Module):
    """x / rms(x) * (offset + weight) over the last dimension (Zhang and Sennrich 2019): `[..., D]` -> `[..., D]`.

    offset: 1 where weights are stored as what they differ from one by (Gemma). Computed in float32.
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


Norm = Literal["layer", "rms", "rms_offset"]


def norm_of(kind: Norm, dim: int, eps: float) -> nn.Module:
    """The norm of that kind: LayerNorm (Ba et al. 2016), RMSNorm, or RMSNorm with weights around zero."""
    if kind == "layer":
        return nn.LayerNorm(dim, eps=eps)
    return RmsNorm(dim, eps, 1.0 if kind == "rms_offset" else 0.0)


class BlockConfig(NamedTuple):
    """One block's shape. memory_dim: width of the tokens that cross-attention reads, None for no cross-attention.

    gated: the MLP multiplies its activation with a second projection (Shazeer 2020). mlp_bias: of its projections.
    sandwich: a norm after each branch too, before it is added (Gemma 2).
    """

    dim: int
    heads: int
    mlp_dim: int
    activation: str
    eps: float
    post_norm: bool = False
    memory_dim: int | None = None
    attention: HeadConfig = STANDARD_HEADS
    norm: Norm = "layer"
    gated: bool = False
    mlp_bias: bool = True
    sandwich: bool = False


class Mlp(nn.Module):
    """Two linear layers with an activation between: `[..., D]` -> `[..., D]`. gated: see `BlockConfig`; `fc1` then
    holds what is activated and what it is multiplied with, one after the other."""

    def __init__(
        self, dim: int, hidden: int, activation: str, *, gated: bool = False, bias: bool = True
    ) -> None:
        super().__init__()
        self.gated = gated
        self.fc1 = Linear(dim, hidden * (1 + gated), bias=bias)
        self.fc2 = Linear(hidden, dim, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        if self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            return self.fc2(self.activation(gate) * up)
        return self.fc2(self.activation(hidden))


class Block(nn.Module):
    """Self-attention, optional cross-attention, MLP; each with its residual and its norm.

    Pre-norm (CLIP, ViT): x + f(norm(x)). Post-norm (BERT): norm(x + f(x)).
    """

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        dim, heads, options = config.dim, config.heads, config.attention
        self.post_norm = config.post_norm
        self.sandwich = config.sandwich
        self.attn = Attention(dim, heads, options=options)
        self.norm1 = norm_of(config.norm, dim, config.eps)
        if config.memory_dim is not None:
            self.cross = Attention(dim, heads, memory_dim=config.memory_dim, options=options)
            self.norm_cross = norm_of(config.norm, dim, config.eps)
        self.mlp = Mlp(dim, config.mlp_dim, config.activation, gated=config.gated, bias=config.mlp_bias)
        self.norm2 = norm_of(config.norm, dim, config.eps)
        if config.sandwich:
            self.norm1_out = norm_of(config.norm, dim, config.eps)
            self.norm2_out = norm_of(config.norm, dim, config.eps)
        # For training alone, and so no part of a config: see `nn.regularization`.
        self.dropout = 0.0
        self.drop_path = 0.0
        self.recompute = False

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        memory: KeyValue | None = None,
        memory_mask: Tensor | None = None,
        cache: tuple[Cache, int] | None = None,
        turn: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """x `[R, L, D]` -> `[R, L, D]`. Cross-attention is left out where no memory is given.

        mask, causal, cache, turn: of self-attention, as `Attention` has them.
        """

        def halves(x: Tensor) -> Tensor:
            return self.mlp_half(self.self_attention_half(x, mask, causal, cache, turn), memory, memory_mask)

        if self.recompute and torch.is_grad_enabled() and cache is None:
            return cast(Tensor, checkpoint(halves, x, use_reentrant=False))
        return halves(x)

    def self_attention_half(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: tuple[Cache, int] | None = None,
        turn: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The first half, in which positions see each other: self-attention with its residual and norm."""
        if self.post_norm:
            mixed = self.attn(x, mask=mask, causal=causal, cache=cache, turn=turn)
            return self.norm1(x + drop_branch(mixed, self))
        mixed = self.attn(self.norm1(x), mask=mask, causal=causal, cache=cache, turn=turn)
        return x + drop_branch(self.norm1_out(mixed) if self.sandwich else mixed, self)

    def mlp_half(
        self, x: Tensor, memory: KeyValue | None = None, memory_mask: Tensor | None = None
    ) -> Tensor:
        """The second half, each position for itself: cross-attention where there is a memory, and the MLP."""
        cross, mlp = self.cross if memory is not None else None, self.mlp
        if self.post_norm:
            if cross is not None:
                x = self.norm_cross(x + drop_branch(cross(x, memory=memory, mask=memory_mask), self))
            return self.norm2(x + drop_branch(mlp(x), self))
        if cross is not None:
            x = x + drop_branch(cross(self.norm_cross(x), memory=memory, mask=memory_mask), self)
        hidden = mlp(self.norm2(x))
        return x + drop_branch(self.norm2_out(hidden) if self.sandwich else hidden, self)


def drop_branch(branch: Tensor, block: Any) -> Tensor:
    """What a residual branch `[R, ..., D]` adds: all, but in training what the block's dropout and drop path leave."""
    if block.training and block.dropout:
        branch = nn.functional.dropout(branch, block.dropout)
    if block.training and block.drop_path:
        kept, rows = 1 - block.drop_path, (len(branch), *[1] * (branch.ndim - 1))
        branch = branch * branch.new_empty(rows).bernoulli_(kept).div_(kept)
    return branch
