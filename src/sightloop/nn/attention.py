"""The linear layer, the attention layer, the attention mask and the position encodings of every tower.

`Attention` is self-attention, self-attention with a cache, or cross-attention over a memory, depending on its
arguments. R query rows may read B memories (such as the keys and values of B images), R a multiple of B: the queries
are folded to `[B, R/B * L]`, so beams, prompts and candidate texts read one image without copying it.

Shape letters: see `sightloop.types`; `head` is the width of one attention head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """Linear layer, y = x W^T + b: `[..., in]` -> `[..., out]`, used by every tower.

    Attributes:
        weight: `[out, in]`.
        bias: `[out]`, or None.
        kernel: function (x, weight, bias) -> y that replaces `torch.nn.functional.linear` (`nn.prepack`,
            `nn.quantize`), or None.
        packed: the weight in the memory layout of `kernel`, or None.
        lora: LoRA adapter whose output is added (`nn.lora`), or None.
        merged: the LoRA adapter whose product was added to `weight`, or empty. A tuple, because a plain attribute would
            register the adapter as a submodule and put it into the state dict.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.kernel: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None
        self.packed: Tensor | None = None
        self.lora: nn.Module | None = None
        self.merged: tuple[nn.Module, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel or nn.functional.linear
        out = kernel(x, self.weight if self.packed is None else self.packed, self.bias)  # [..., out]
        return out if self.lora is None else out + self.lora(x)


class KeyValue(NamedTuple):
    """Keys and values of attention, both `[B, H, N, head]`."""

    key: Tensor
    value: Tensor


class KeyValueCache:
    """Preallocated keys and values of one self-attention layer during decoding, `[R, H, capacity, head]` each."""

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor) -> None:
        self.key = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.value = torch.empty_like(self.key)

    def append(self, new: KeyValue, position: int) -> KeyValue:
        """Write `new` `[R, H, L, head]` at `position`; returns positions 0 to position + L, `[R, H, N, head]`."""
        end = position + new.key.shape[2]
        self.key[:, :, position:end] = new.key
        self.value[:, :, position:end] = new.value
        return KeyValue(self.key[:, :, :end], self.value[:, :, :end])

    def select(self, rows: Tensor, length: int) -> None:
        """Replace row i by a copy of row `rows[i]`.

        Args:
            rows: int64 `[R']`; R' may differ from R.
            length: positions of a row that are filled, and so copied.
        """
        if rows.shape[0] != self.key.shape[0]:
            shape = (rows.shape[0], *self.key.shape[1:])
            key, value = self.key.new_empty(shape), self.value.new_empty(shape)
        else:
            key, value = (
                self.key,
                self.value,
            )  # in place: indexing copies the source rows before they are written
        key[:, :, :length] = self.key[rows, :, :length]
        value[:, :, :length] = self.value[rows, :, :length]
        self.key, self.value = key, value


def mask_from_lengths(lengths: Tensor, length: int) -> Tensor:
    """Attention mask of texts padded at the end: int64 lengths `[R]` -> bool `[R, 1, 1, L]`, True = attend."""
    positions = torch.arange(length, device=lengths.device)
    return (positions < lengths[:, None])[:, None, None, :]


def attention_mask(
    valid_mask: Tensor, *, prefix_mask: Tensor | None = None, window: int = 0, start: int = 0
) -> Tensor:
    """Self-attention mask of a decoder: causal, except inside a bidirectional prefix; padding is never attended to.

    Query i attends to key j if key j is valid and either j <= i (with a `window`: i - window < j <= i, Beltagy et al.
    2020, section 3.1) or both lie in the prefix. One row of four tokens; x = attend, rows are queries i, columns j:

        padding on the left      causal                   prefix-LM
        valid  0 1 1 1           valid  1 1 1 1           valid  1 1 1 1
                                                          prefix 1 1 0 0

             j 0 1 2 3                j 0 1 2 3                j 0 1 2 3
        i 0    x . . .           i 0    x . . .           i 0    x x . .
          1    . x . .             1    x x . .             1    x x . .
          2    . x x .             2    x x x .             2    x x x .
          3    . x x x             3    x x x x             3    x x x x

    A padding position attends to itself (i = j = 0 on the left), so that its softmax is over one score, not none.

    Args:
        valid_mask: bool `[R, N]`, False = padding.
        prefix_mask: bool `[R, N]`, True = prefix; None for no prefix.
        window: how many positions back a query sees, itself included; 0 for all.
        start: position of the first query; the queries are positions start to N - 1, L of them.

    Returns:
        bool `[R, 1, L, N]`, True = attend.
    """
    keys = torch.arange(valid_mask.shape[1], device=valid_mask.device)
    queries = keys[start:]
    distance = queries[:, None] - keys  # [L, N], negative for keys after the query
    visible = (distance >= 0)[None]
    if window:
        visible = visible & (distance < window)
    if prefix_mask is not None:
        visible = visible | (prefix_mask[:, queries, None] & prefix_mask[:, None, :])  # [R, L, N]
    return (visible & (valid_mask[:, None, :] | (distance == 0)))[:, None]


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding (Su et al. 2021, section 3.4.2), channel c paired with channel c + head / 2.

    Args:
        x: queries or keys, `[R, H, L, head]`.
        rope: cosines and sines from `rope_table`, each `[1 or R, 1, L, head / 2]`.

    Returns:
        `[R, H, L, head]`.
    """
    cos, sin = rope
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def rope_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `apply_rope` (Su et al. 2021, section 3.2.2), each `[R, 1, L, head_dim / 2]`.

    Args:
        positions: int `[R, L]`.
        head_dim: width of one head.
        theta: base of the wavelengths; channel pair c turns by theta^(-2c / head_dim) radians a position.
        dtype: of the result; the angles are computed in float32.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions[:, None, :, None].float() * (1.0 / theta**exponents)  # [R, 1, L, head_dim / 2]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def relative_buckets(
    query_positions: Tensor,
    key_positions: Tensor,
    num_buckets: int,
    max_distance: int,
    *,
    bidirectional: bool,
) -> Tensor:
    """Buckets of T5's relative position bias (Raffel et al. 2020, section 2.1).

    Half of the buckets hold one distance each; the ranges of the others grow with the logarithm of the distance, up to
    `max_distance`, and the last bucket also holds everything beyond. For 8 buckets, max_distance 16, not bidirectional:

        distance  0  1  2  3  4  5  6  7  8 .. 11  12 ...
        bucket    0  1  2  3  4  4  5  5  6 ..  6   7 ...

    Args:
        query_positions: int64 `[L]`.
        key_positions: int64 `[N]`.
        num_buckets: rows of the bias table.
        max_distance: distance from which all share the last bucket.
        bidirectional: the upper half of the buckets is for keys after the query (encoders); otherwise those count as
            distance 0 (decoders, where the mask hides them).

    Returns:
        int64 `[L, N]`, 0 .. num_buckets - 1.
    """
    offset = key_positions[None, :] - query_positions[:, None]  # [L, N], positive for keys after the query
    first_bucket = torch.zeros_like(offset)
    if bidirectional:
        num_buckets //= 2
        first_bucket = (offset > 0).long() * num_buckets
        distance = offset.abs()
    else:
        distance = (-offset).clamp(min=0)
    num_exact = num_buckets // 2
    # 0 at distance num_exact, 1 at max_distance.
    log_fraction = torch.log(distance.clamp(min=1).float() / num_exact) / math.log(max_distance / num_exact)
    far_bucket = (num_exact + (log_fraction * (num_buckets - num_exact)).long()).clamp(max=num_buckets - 1)
    return first_bucket + torch.where(distance < num_exact, distance, far_bucket)


ProductRule: TypeAlias = Callable[[Tensor, Tensor], bool]
"""(query, key) of attention without a gradient -> whether plain products are quicker than torch's kernel."""

_product_rules: list[ProductRule] = []


def use_products_where(rule: ProductRule) -> None:
    """Attention without a gradient is computed by plain products where a rule says so (`nn.kernels`)."""
    _product_rules[:] = [rule]


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
    """Scaled dot-product attention, softmax(q k^T * scale) v (Vaswani et al. 2017, section 3.2.1).

    Args:
        query: `[B, H, Q, head]`.
        key: `[B, H, N, head]`.
        value: `[B, H, N, head]`.
        mask: broadcast over `[B, H, Q, N]`; bool (True = attend), or floats added to the scores.
        causal: query i attends to keys 0 .. i; needs Q = N and no mask.
        scale: factor of the scores; None for 1 / sqrt(head).
        softcap: c > 0 maps scores to c tanh(scores / c) before the mask (Gemma 2, section 2); 0 for off.

    Returns:
        `[B, H, Q, head]`.
    """
    # Measured on one AVX-512 core in bfloat16, forward and backward, 14 to 577 keys: plain products are 1.5 to 6 times
    # as fast as torch's kernel for CPUs. In float32 that kernel is as fast or faster.
    use_matmul = query.requires_grad and query.device.type == "cpu" and query.dtype == torch.bfloat16
    use_matmul = use_matmul or any(rule(query, key) for rule in _product_rules)
    if not use_matmul and not softcap:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scale
        )
    return attention_weights(query, key, mask, causal=causal, scale=scale, softcap=softcap) @ value


def attention_weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Attention weights, softmax(q k^T * scale), of the arguments of `attend`: `[B, H, Q, N]`, rows sum to 1."""
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(
        -1, -2
    )  # [B, H, Q, N]
    if softcap:
        scores = (scores / softcap).tanh() * softcap
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1, dtype=scores.dtype)


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """Options of the attention heads; the defaults are those of Vaswani et al. 2017.

    Args:
        width: of one head; 0 for dim / heads.
        kv: heads of keys and values, each shared by heads / kv query heads (grouped-query attention, Ainslie et al.
            2023); 0 for as many as query heads.
        bias: whether the projections of queries, keys and values have a bias.
        out_bias: whether the output projection has a bias.
        scale: factor of the scores; 0 for 1 / sqrt(width).
        softcap: see `attend`; 0 for off.
    """

    width: int = 0
    kv: int = 0
    bias: bool = True
    out_bias: bool = True
    scale: float = 0.0
    softcap: float = 0.0


STANDARD_HEADS = HeadConfig()


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2) with fused projections.

    Args:
        dim: width D of the queries and of the output.
        heads: number of query heads H.
        memory_dim: width of the memory's tokens for cross-attention; None for self-attention.
        options: see `HeadConfig`.

    Attributes:
        watcher: function that sees the attention weights `[B, H, Q, N]` and returns those to use, for explanations; it
            needs a slower product. None for none.

    Raises:
        ValueError: `dim` or the key-value heads do not divide evenly.
    """

    watcher: Callable[[Tensor], Tensor] | None = None

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
        """Keys and values for cross-attention, computed once per memory: `[B, N, memory_dim]` -> `[B, H, N, head]`."""
        fused = self.kv(tokens)
        key, value = self._split_heads(fused, self.kv_heads, self.kv_heads)
        if fused.requires_grad:
            return KeyValue(key, value)
        # Every decoding step reads them: contiguous memory pays for the copy.
        return KeyValue(key.contiguous(), value.contiguous())

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        memory: KeyValue | None = None,
        cache: tuple[KeyValueCache, int] | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention of `[R, L, D]`, to itself or to a memory.

        Args:
            x: `[R, L, D]`.
            mask: broadcast over `[R, H, L, keys]`, with a memory over `[B, H, R/B * L, N]`; bool (True = attend), or
                floats added to the scores.
            causal: position i attends to positions 0 .. i.
            memory: keys and values from `self.memory`, for cross-attention.
            cache: the cache and the number of tokens in it; without a mask, attention is then causal.
            rope: rotary positions from `rope_table`, for self-attention.

        Returns:
            `[R, L, D]`.
        """
        if memory is not None:
            return self.out(self._cross_attend(self.q(x), memory, mask))
        query, key, value = self._split_heads(self.qkv(x), self.heads, self.kv_heads, self.kv_heads)
        if rope is not None:
            query, key = apply_rope(query, rope), apply_rope(key, rope)
        if cache is not None:
            kv_cache, length = cache
            key, value = kv_cache.append(KeyValue(key, value), length)
            causal = mask is None and length == 0 and x.shape[1] > 1
            if mask is None and length > 0 and x.shape[1] > 1:
                # Query i is position length + i: the diagonal is moved right by the tokens in the cache.
                mask = torch.ones(x.shape[1], key.shape[2], dtype=torch.bool, device=x.device).tril(length)
        mixed = self._attend(query, key, value, mask, causal=causal)  # [R, H, L, head]
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool = False
    ) -> Tensor:
        """`attend` with grouped-query heads: query `[R, H, L, head]`, key and value `[R, kv_heads, N, head]`."""
        group_size = self.heads // self.kv_heads
        if self.watcher is not None:
            key, value = (x.repeat_interleave(group_size, dim=1) for x in (key, value))
            weights = attention_weights(
                query, key, mask, causal=causal, scale=self.scale, softcap=self.softcap
            )
            return self.watcher(weights) @ value
        if group_size == 1:
            return attend(query, key, value, mask, causal=causal, scale=self.scale, softcap=self.softcap)
        if query.shape[2] == 1:
            # One decoding step: a group's heads become the queries of one head, and no key or value is copied.
            rows, _, _, width = query.shape
            grouped = query.reshape(rows, self.kv_heads, group_size, width)
            mixed = attend(grouped, key, value, mask, scale=self.scale, softcap=self.softcap)
            return mixed.reshape(rows, self.heads, 1, width)
        key, value = key.repeat_interleave(group_size, dim=1), value.repeat_interleave(group_size, dim=1)
        return attend(query, key, value, mask, causal=causal, scale=self.scale, softcap=self.softcap)

    def _cross_attend(self, query: Tensor, memory: KeyValue, mask: Tensor | None) -> Tensor:
        """R query rows over B memories: `[R, L, H * head]` -> `[R, L, H * head]`."""
        rows, length, dim = query.shape
        # The rows of one memory are consecutive: [R, L, H * head] -> [B, H, R/B * L, head].
        folded = query.view(memory.key.shape[0], -1, self.heads, self.width).transpose(1, 2)
        mixed = self._attend(folded, memory.key, memory.value, mask)
        return mixed.transpose(1, 2).reshape(rows, length, dim)

    def _split_heads(self, fused: Tensor, *heads: int) -> tuple[Tensor, ...]:
        """Cut a fused projection `[R, L, sum(heads) * head]` into one tensor `[R, count, L, head]` per count."""
        rows, length, _ = fused.shape
        # Split before the transpose, so that the backward pass assembles the gradient with one copy.
        parts = fused.split([count * self.width for count in heads], dim=-1)
        return tuple(
            part.view(rows, length, count, self.width).transpose(1, 2)
            for part, count in zip(parts, heads, strict=True)
        )
