"""The one linear layer, the one attention and the one mask rule.

`Attention` is self-attention, cross-attention over a memory, or cached self-attention, by what it is given. A memory
(the keys and values of a picture, say) may be shared: R query rows over B memories, R a multiple of B, are folded to
`[B, R/B * L]` queries, so that beams, prompts and candidate texts read one picture without copying it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_POINTWISE = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_HAS_ONEDNN = _POINTWISE is not None and torch.backends.mkldnn.is_available()
# Multiplications from which oneDNN's kernels pay for their call: below it is dearer than the product.
_WORTH_ONEDNN = 1 << 22


class Linear(nn.Module):
    """The one linear layer: y = x W^T + b. weight `[out, in]`, bias `[out]` or None; x `[..., in]` -> `[..., out]`.

    packed: the weight in oneDNN's own layout where `nn.packing` has put it there, for inference on a CPU.
    lora: what `nn.lora` adds to the output, if anything; merged: the weight as it was, where that is merged into it.
    """

    def __init__(self, width_in: int, width_out: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_out, width_in))
        self.bias = nn.Parameter(torch.empty(width_out)) if bias else None
        self.packed: Tensor | None = None
        self.lora: nn.Module | None = None
        self.merged: tuple[Tensor, nn.Module] | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = self._product(x)
        return out if self.lora is None else out + self.lora(x)

    def _product(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return _product(x, self.packed, self.bias)
        if _gains_by_onednn(x, self.weight):
            return _OnednnLinear.apply(x, self.weight, self.bias)  # pyright: ignore[reportReturnType]
        return nn.functional.linear(x, self.weight, self.bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b by oneDNN, in float32; weight `[out, in]` with any strides, or packed."""
    return _POINTWISE(x, weight, bias, "none", [], "")  # pyright: ignore[reportOptionalCall]


def _gains_by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether an unpacked product is float32 on a CPU, and large enough."""
    return (
        _HAS_ONEDNN
        and weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= _WORTH_ONEDNN
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class _OnednnLinear(torch.autograd.Function):
    """`nn.functional.linear` for training on a CPU: all three products by oneDNN.

    torch's own float32 products are MKL's there, which is slow on processors of other makers: measured on one Zen 5
    core, 115 GFLOP/s against 250 forward and 200 backward. The sums are the same up to float32 rounding.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _ = inputs
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  # [rows, out]
        of_x = None if weight is None else _product(rows, weight.t(), None).view(*grad.shape[:-1], -1)
        of_weight = None if x is None else _product(rows.t(), x.reshape(-1, x.shape[-1]).t(), None)
        return of_x, of_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


class KeyValue(NamedTuple):
    """Keys and values, both `[B, H, N, head]`."""

    key: Tensor
    value: Tensor


class Cache:
    """Preallocated keys and values of one self-attention layer while decoding: `[R, H, capacity, head]`."""

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor) -> None:
        self.key = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.value = torch.empty_like(self.key)

    def append(self, new: KeyValue, at: int) -> KeyValue:
        """Write `[R, H, L, head]` at position `at`; returns all positions up to the new end."""
        end = at + new.key.shape[2]
        self.key[:, :, at:end] = new.key
        self.value[:, :, at:end] = new.value
        return KeyValue(self.key[:, :, :end], self.value[:, :, :end])

    def select(self, rows: Tensor, length: int) -> None:
        """Row i becomes a copy of row `rows[i]`, up to `length` positions; the number of rows may change."""
        if rows.shape[0] != self.key.shape[0]:
            shape = (rows.shape[0], *self.key.shape[1:])
            key, value = self.key.new_empty(shape), self.value.new_empty(shape)
        else:
            key, value = self.key, self.value
        key[:, :, :length] = self.key[rows, :, :length]
        value[:, :, :length] = self.value[rows, :, :length]
        self.key, self.value = key, value


def mask_from_lengths(lengths: Tensor, length: int) -> Tensor:
    """bool `[R, 1, 1, L]`, True = attend: the first `lengths[r]` positions of row r."""
    positions = torch.arange(length, device=lengths.device)
    return (positions < lengths[:, None])[:, None, None, :]


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(head)) v: query `[B, H, Q, head]` over key, value `[B, H, N, head]`.

    mask: bool, True = attend. causal: query i sees keys up to i, where Q = N.
    """
    slow = query.requires_grad and query.device.type == "cpu" and query.dtype == torch.bfloat16
    if not slow:
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    # Measured on one AVX-512 core in bfloat16, forward and backward, 14 to 577 keys: 1.5 to 6 times as fast as torch's
    # kernel for CPUs. In float32 that one is as fast or faster.
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1, dtype=scores.dtype) @ value


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2) with fused projections.

    dim: width of the queries. memory_dim: width of the memory's tokens for cross-attention, None for self-attention.
    """

    def __init__(self, dim: int, heads: int, *, memory_dim: int | None = None) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"a width of {dim} cannot be split into {heads} heads")
        self.heads = heads
        if memory_dim is None:
            self.qkv = Linear(dim, 3 * dim)
        else:
            self.q = Linear(dim, dim)
            self.kv = Linear(memory_dim, 2 * dim)
        self.out = Linear(dim, dim)

    def memory(self, tokens: Tensor) -> KeyValue:
        """Keys and values of a memory, computed once: tokens `[B, N, memory_dim]`."""
        fused = self.kv(tokens)
        key, value = self._split(fused, 2)
        if fused.requires_grad:
            return KeyValue(key, value)
        return KeyValue(
            key.contiguous(), value.contiguous()
        )  # read at every step of decoding: worth one copy

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        memory: KeyValue | None = None,
        cache: tuple[Cache, int] | None = None,
    ) -> Tensor:
        """x `[R, L, D]` -> `[R, L, D]`.

        mask: bool, True = attend, broadcast over `[R, H, L, keys]` (over `[B, H, R/B * L, N]` with a memory).
        causal: position i sees positions up to i. cache: (cache, tokens already in it); causal is then implied.
        """
        if memory is not None:
            return self.out(self._over_memory(self.q(x), memory, mask))
        query, key, value = self._split(self.qkv(x), 3)
        if cache is not None:
            store, length = cache
            key, value = store.append(KeyValue(key, value), length)
            causal = length == 0 and x.shape[1] > 1
            if length > 0 and x.shape[1] > 1:
                mask = torch.ones(x.shape[1], key.shape[2], dtype=torch.bool, device=x.device).tril(length)
        mixed = attend(query, key, value, mask, causal=causal)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _over_memory(self, query: Tensor, memory: KeyValue, mask: Tensor | None) -> Tensor:
        rows, length, dim = query.shape
        # [R, L, D] -> [B, R/B * L, D]: the rows of one memory are consecutive.
        folded = query.view(memory.key.shape[0], -1, self.heads, dim // self.heads).transpose(1, 2)
        mixed = attend(folded, memory.key, memory.value, mask)
        return mixed.transpose(1, 2).reshape(rows, length, dim)

    def _split(self, fused: Tensor, parts: int) -> tuple[Tensor, ...]:
        """`[R, L, parts * D]` -> parts x `[R, H, L, head]`."""
        rows, length, width = fused.shape
        shape = (rows, length, self.heads, width // (parts * self.heads))
        # Cut before it is turned, so that the gradient is put together with one copy.
        return tuple(part.view(shape).transpose(1, 2) for part in fused.chunk(parts, dim=-1))
