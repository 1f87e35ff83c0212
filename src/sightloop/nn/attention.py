"""The one linear layer, the one attention and the one mask rule.

`Attention` is self-attention, cross-attention over a memory, or cached self-attention, by what it is given. A memory
(the keys and values of an image, say) may be shared: R query rows over B memories, R a multiple of B, are folded to
`[B, R/B * L]` queries, so that beams, prompts and candidate texts read one image without copying it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """The one linear layer: y = x W^T + b. weight `[out, in]`, bias `[out]` or None; x `[..., in]` -> `[..., out]`.

    kernel: what multiplies in torch's place, if anything (`nn.prepack`), and packed: the weight in that one's layout.
    lora: what `nn.lora` adds to the output, if anything; merged: the weight as it was, where that is merged into it.
    """

    def __init__(self, width_in: int, width_out: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_out, width_in))
        self.bias = nn.Parameter(torch.empty(width_out)) if bias else None
        self.kernel: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None
        self.packed: Tensor | None = None
        self.lora: nn.Module | None = None
        self.merged: tuple[Tensor, nn.Module] | None = None

    def forward(self, x: Tensor) -> Tensor:
        product = self.kernel or nn.functional.linear
        out = product(x, self.weight if self.packed is None else self.packed, self.bias)
        return out if self.lora is None else out + self.lora(x)


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


def attention_mask(
    valid_mask: Tensor,
    *,
    prefix_mask: Tensor | None = None,
    window: int = 0,
    start: int = 0,
    length: int | None = None,
) -> Tensor:
    """The one mask rule of texts that are written: bool `[R, 1, L, N]`, True = attend, for N keys.

    Position i sees j where j <= i, with a `window` only less than `window` positions back (Beltagy et al. 2020), or
    where both belong to a prefix that sees itself whole; never padding. real: bool `[R, N]`, False = padding.
    whole: bool `[R, N]`, True = prefix. The L = `length` queries (default: all to the end) stand at `start` and after.
    """
    keys = torch.arange(valid_mask.shape[1], device=valid_mask.device)
    queries = keys[start:] if length is None else keys[start : start + length]
    back = queries[:, None] - keys  # [L, N]
    seen = (back >= 0)[None]
    if window:
        seen = seen & (back < window)
    if prefix_mask is not None:
        seen = seen | (prefix_mask[:, queries, None] & prefix_mask[:, None, :])
    # A row of padding sees itself, so that no softmax is over nothing.
    return (seen & (valid_mask[:, None, :] | (back == 0)))[:, None]


def apply_rope(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions (Su et al. 2021, section 3.4.2), the halves of a head as pairs: x `[R, H, L, head]`.

    turn: cosines and sines `[1 or R, 1, L, head / 2]` of each position's angles.
    """
    cos, sin = turn
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def rope_table(positions: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[R, 1, L, width / 2]` for `attention.rotate` (Su et al. 2021, section 3.2.2).

    positions: int `[R, L]`. width: of a head. theta: the base of the wavelengths.
    """
    powers = torch.arange(0, width, 2, device=positions.device).float() / width
    angles = positions[:, None, :, None].float() * (1.0 / theta**powers)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def relative_buckets(queries: Tensor, keys: Tensor, buckets: int, farthest: int, *, both: bool) -> Tensor:
    """T5's bucket of each distance, `[L, N]` (Raffel et al. 2020, section 2.1).

    Half of the buckets are for single distances, the others grow with the logarithm up to `farthest`; all beyond it
    share the last. both: half of all buckets are for keys that follow the query (encoders); else those count as near.
    """
    ahead = keys[None, :] - queries[:, None]
    start = torch.zeros_like(ahead)
    if both:
        buckets //= 2
        start = (ahead > 0).long() * buckets
        back = ahead.abs()
    else:
        back = (-ahead).clamp(min=0)
    exact = buckets // 2
    share = torch.log(back.clamp(min=1).float() / exact) / math.log(farthest / exact)
    far = (exact + (share * (buckets - exact)).long()).clamp(max=buckets - 1)
    return start + torch.where(back < exact, back, far)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """softmax(q k^T * scale) v: query `[B, H, Q, head]` over key, value `[B, H, N, head]`.

    mask: bool, True = attend, or floats that are added to the scores. causal: query i sees keys up to i, where Q = N.
    scale: 1 / sqrt(head) by default. softcap c: scores become c tanh(scores / c) (Gemma 2, section 2).
    """
    slow = query.requires_grad and query.device.type == "cpu" and query.dtype == torch.bfloat16
    if not slow and not softcap:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scale
        )
    # Measured on one AVX-512 core in bfloat16, forward and backward, 14 to 577 keys: 1.5 to 6 times as fast as torch's
    # kernel for CPUs. In float32 that one is as fast or faster.
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-1, -2)
    if softcap:
        scores = (scores / softcap).tanh() * softcap
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1, dtype=scores.dtype) @ value


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """What attention may do otherwise than Vaswani et al. have it; 0 is "the usual".

    width: of one head (dim / heads). kv: heads of keys and values, each read by heads / kv queries (Ainslie et al.
    2023). bias: of queries, keys and values; out_bias: of the projection after. scale: of the scores
    (1 / sqrt(width)). softcap: see `attend`.
    """

    width: int = 0
    kv: int = 0
    bias: bool = True
    out_bias: bool = True
    scale: float = 0.0
    softcap: float = 0.0


STANDARD_HEADS = HeadConfig()


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2) with fused projections.

    dim: width of the queries. memory_dim: width of the memory's tokens for cross-attention, None for self-attention.
    """

    def __init__(
        self, dim: int, heads: int, *, memory_dim: int | None = None, options: HeadConfig = STANDARD_HEADS
    ) -> None:
        super().__init__()
        if not options.width and dim % heads:
            raise ValueError(f"a width of {dim} cannot be split into {heads} heads")
        self.heads, self.kv_heads = heads, options.kv or heads
        if heads % self.kv_heads:
            raise ValueError(f"{heads} heads cannot share {self.kv_heads} heads of keys and values")
        self.width = options.width or dim // heads
        self.scale, self.softcap = options.scale or None, options.softcap
        if memory_dim is None:
            self.qkv = Linear(dim, (heads + 2 * self.kv_heads) * self.width, bias=options.bias)
        else:
            self.q = Linear(dim, heads * self.width, bias=options.bias)
            self.kv = Linear(memory_dim, 2 * self.kv_heads * self.width, bias=options.bias)
        self.out = Linear(heads * self.width, dim, bias=options.out_bias)

    def memory(self, tokens: Tensor) -> KeyValue:
        """Keys and values of a memory, computed once: tokens `[B, N, memory_dim]`."""
        fused = self.kv(tokens)
        key, value = self._split(fused, self.kv_heads, self.kv_heads)
        if fused.requires_grad:
            return KeyValue(key, value)
        # Read at every step of decoding: worth one copy.
        return KeyValue(key.contiguous(), value.contiguous())

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        memory: KeyValue | None = None,
        cache: tuple[Cache, int] | None = None,
        turn: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """x `[R, L, D]` -> `[R, L, D]`.

        mask: bool, True = attend, broadcast over `[R, H, L, keys]` (over `[B, H, R/B * L, N]` with a memory), or
        floats that are added to the scores. causal: position i sees positions up to i. cache: (cache, tokens already
        in it); causal is then implied where no mask is given. turn: rotary positions, see `rotate`.
        """
        if memory is not None:
            return self.out(self._over_memory(self.q(x), memory, mask))
        query, key, value = self._split(self.qkv(x), self.heads, self.kv_heads, self.kv_heads)
        if turn is not None:
            query, key = apply_rope(query, turn), apply_rope(key, turn)
        if cache is not None:
            store, length = cache
            key, value = store.append(KeyValue(key, value), length)
            causal = mask is None and length == 0 and x.shape[1] > 1
            if mask is None and length > 0 and x.shape[1] > 1:
                mask = torch.ones(x.shape[1], key.shape[2], dtype=torch.bool, device=x.device).tril(length)
        mixed = self._attend(query, key, value, mask, causal=causal)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool = False
    ) -> Tensor:
        """`attend`, also where queries share heads: query `[R, H, L, head]`, key, value `[R, kv heads, N, head]`."""
        shared = self.heads // self.kv_heads
        if shared == 1:
            return attend(query, key, value, mask, causal=causal, scale=self.scale, softcap=self.softcap)
        if (
            query.shape[2] == 1
        ):  # the heads of a group as queries of one head: nothing is copied while decoding
            rows, _, _, width = query.shape
            grouped = query.reshape(rows, self.kv_heads, shared, width)
            mixed = attend(grouped, key, value, mask, scale=self.scale, softcap=self.softcap)
            return mixed.reshape(rows, self.heads, 1, width)
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
        return attend(query, key, value, mask, causal=causal, scale=self.scale, softcap=self.softcap)

    def _over_memory(self, query: Tensor, memory: KeyValue, mask: Tensor | None) -> Tensor:
        rows, length, dim = query.shape
        # [R, L, D] -> [B, R/B * L, D]: the rows of one memory are consecutive.
        folded = query.view(memory.key.shape[0], -1, self.heads, self.width).transpose(1, 2)
        mixed = self._attend(folded, memory.key, memory.value, mask)
        return mixed.transpose(1, 2).reshape(rows, length, dim)

    def _split(self, fused: Tensor, *heads: int) -> tuple[Tensor, ...]:
        """`[R, L, (heads + ...) * head]` -> a part for each: `[R, heads, L, head]`."""
        rows, length, _ = fused.shape
        # Cut before it is turned, so that the gradient is put together with one copy.
        parts = fused.split([count * self.width for count in heads], dim=-1)
        return tuple(
            part.view(rows, length, count, self.width).transpose(1, 2)
            for part, count in zip(parts, heads, strict=True)
        )
