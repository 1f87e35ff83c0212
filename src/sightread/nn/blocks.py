"""The one transformer block (pre- or post-norm, with or without cross-attention), its MLP and its activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sightread.errors import UsageError
from sightread.nn.attention import Attention, Cache, KeyValue, Linear


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


class BlockConfig(NamedTuple):
    """One block's shape. memory_dim: width of the tokens that cross-attention reads, None for no cross-attention."""

    dim: int
    heads: int
    mlp_dim: int
    activation: str
    eps: float
    post_norm: bool = False
    memory_dim: int | None = None


class Mlp(nn.Module):
    """Two linear layers with an activation between: `[..., D]` -> `[..., D]`."""

    def __init__(self, dim: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """Self-attention, optional cross-attention, MLP; each with its residual and its norm.

    Pre-norm (CLIP, ViT): x + f(norm(x)). Post-norm (BERT): norm(x + f(x)).
    """

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.post_norm = config.post_norm
        self.attn = Attention(config.dim, config.heads)
        self.norm1 = nn.LayerNorm(config.dim, eps=config.eps)
        if config.memory_dim is not None:
            self.cross = Attention(config.dim, config.heads, memory_dim=config.memory_dim)
            self.norm_cross = nn.LayerNorm(config.dim, eps=config.eps)
        self.mlp = Mlp(config.dim, config.mlp_dim, config.activation)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.eps)
        # For training alone, and so no part of a config: see `regularise` and `checkpoint_blocks`.
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
    ) -> Tensor:
        """x `[R, L, D]` -> `[R, L, D]`. Cross-attention is left out where no memory is given."""
        if self.recompute and torch.is_grad_enabled() and cache is None:
            given = (x, mask, causal, memory, memory_mask)
            return cast(Tensor, checkpoint(self._forward, *given, use_reentrant=False))
        return self._forward(x, mask, causal, memory, memory_mask, cache)

    def _forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        causal: bool,
        memory: KeyValue | None,
        memory_mask: Tensor | None,
        cache: tuple[Cache, int] | None = None,
    ) -> Tensor:
        if self.post_norm:
            x = self.norm1(x + self._thinned(self.attn(x, mask=mask, causal=causal, cache=cache)))
            if memory is not None:
                x = self.norm_cross(x + self._thinned(self.cross(x, memory=memory, mask=memory_mask)))
            return self.norm2(x + self._thinned(self.mlp(x)))
        x = x + self._thinned(self.attn(self.norm1(x), mask=mask, causal=causal, cache=cache))
        if memory is not None:
            x = x + self._thinned(self.cross(self.norm_cross(x), memory=memory, mask=memory_mask))
        return x + self._thinned(self.mlp(self.norm2(x)))

    def _thinned(self, branch: Tensor) -> Tensor:
        """What a residual branch `[R, L, D]` adds: all of it, but in training what dropout and drop path leave."""
        if not self.training:
            return branch
        if self.dropout:
            branch = nn.functional.dropout(branch, self.dropout)
        if self.drop_path:
            kept = 1 - self.drop_path
            branch = branch * branch.new_empty(branch.shape[0], 1, 1).bernoulli_(kept).div_(kept)
        return branch


def regularise(network: nn.Module, *, dropout: float = 0.0, drop_path: float = 0.0) -> None:
    """Set what the blocks of a network leave out while they train (0: nothing, as in a new network).

    dropout: the share of single values of each residual branch (Srivastava et al. 2014). drop_path: the share of rows
    for which the last block of a stack leaves a whole branch out, rising in equal steps from 0 at the first block
    (stochastic depth, Huang et al. 2016). Both draw from torch's generator of the device: seed it for each step.
    """
    for name, value in (("dropout", dropout), ("drop_path", drop_path)):
        if not 0 <= value < 1:
            raise UsageError(f"{name}={value}: must be in [0, 1)")
    for stack in network.modules():
        if isinstance(stack, nn.ModuleList):
            blocks = [block for block in stack if isinstance(block, Block)]
            for depth, block in enumerate(blocks):
                block.dropout = dropout
                block.drop_path = drop_path * depth / max(len(blocks) - 1, 1)


def checkpoint_blocks(network: nn.Module, on: bool = True) -> None:
    """Whether blocks keep only their input for the backward pass and compute the rest again (Chen et al. 2016).

    A third more arithmetic for a fraction of the memory; the numbers, random ones too, are the same.
    """
    for module in network.modules():
        if isinstance(module, Block):
            module.recompute = on
