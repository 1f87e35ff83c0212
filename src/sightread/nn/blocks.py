"""The one transformer block (pre- or post-norm, with or without cross-attention), its MLP and its activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sightread.nn.attention import Attention, Cache, KeyValue, Linear


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): the approximation that OpenAI's CLIP was trained with (Hendrycks and Gimpel 2016)."""
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
        if self.post_norm:
            x = self.norm1(x + self.attn(x, mask=mask, causal=causal, cache=cache))
            if memory is not None:
                x = self.norm_cross(x + self.cross(x, memory=memory, mask=memory_mask))
            return self.norm2(x + self.mlp(x))
        x = x + self.attn(self.norm1(x), mask=mask, causal=causal, cache=cache)
        if memory is not None:
            x = x + self.cross(self.norm_cross(x), memory=memory, mask=memory_mask)
        return x + self.mlp(self.norm2(x))
