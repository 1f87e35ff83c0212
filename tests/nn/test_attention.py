"""Attention and blocks: masks as drawn; caches, shared memories and packed weights change the cost, not the numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sightloop.checkpoints.key_map import load_weights
from sightloop.nn.attention import (
    Attention,
    KeyValue,
    KeyValueCache,
    Linear,
    attend,
    attention_mask,
    mask_from_lengths,
    relative_buckets,
)
from sightloop.nn.blocks import Block, BlockConfig
from sightloop.nn.prepack import can_pack, pack, pack_hook, unpack


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with random weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return module.eval()


def by_hand(query: torch.Tensor, memory: KeyValue, visible: torch.Tensor) -> torch.Tensor:
    """Attention written out: softmax(q k / sqrt(d)) v over the visible positions, `[R, H, L, d]`."""
    scores = query @ memory.key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(~visible, -torch.inf).softmax(dim=-1) @ memory.value


DRAWN = {
    "padding": ("0111", None, ["x...", ".x..", ".xx.", ".xxx"]),
    "causal": ("1111", None, ["x...", "xx..", "xxx.", "xxxx"]),
    "prefix-LM": ("1111", "1100", ["xx..", "xx..", "xxx.", "xxxx"]),
}


@pytest.mark.parametrize(("valid", "prefix", "rows"), DRAWN.values(), ids=DRAWN)
def test_masks_are_as_drawn_in_the_docstring(valid: str, prefix: str | None, rows: list[str]) -> None:
    valid_mask, prefix_mask = (
        None if text is None else torch.tensor([[character == "1" for character in text]])
        for text in (valid, prefix)
    )
    mask = attention_mask(valid_mask, prefix_mask=prefix_mask)[0, 0]  # pyright: ignore[reportArgumentType]
    assert ["".join("x" if seen else "." for seen in row) for row in mask.tolist()] == rows
    drawing = [" ".join(row) for row in rows]
    assert all(line in (attention_mask.__doc__ or "") for line in drawing)


def test_relative_buckets_are_as_written_in_the_docstring() -> None:
    buckets = relative_buckets(torch.tensor([13]), torch.arange(13, -1, -1), 8, 16, bidirectional=False)
    assert buckets.tolist() == [[0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7]]


@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 3), st.booleans())
@settings(max_examples=25, deadline=None)
@torch.inference_mode()
def test_self_attention(rows: int, length: int, heads: int, causal: bool) -> None:
    dim = 4 * heads
    attention = drawn(Attention(dim, heads))
    x = torch.randn(rows, length, dim)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    split = [part.view(rows, length, heads, 4).transpose(1, 2) for part in (q, k, v)]
    visible = torch.ones(length, length, dtype=torch.bool)
    mixed = by_hand(split[0], KeyValue(split[1], split[2]), visible.tril() if causal else visible)
    wanted = attention.out(mixed.transpose(1, 2).reshape(rows, length, dim))
    assert torch.allclose(attention(x, causal=causal), wanted, atol=1e-5)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
@torch.inference_mode()
def test_a_cache_in_any_steps_is_causal_attention(steps: list[int], rows: int) -> None:
    attention = drawn(Attention(8, 2))
    x = torch.randn(rows, sum(steps), 8)
    cache, done, parts = KeyValueCache((rows, 2, sum(steps), 4), x), 0, []
    for step in steps:
        parts.append(attention(x[:, done : done + step], cache=(cache, done)))
        done += step
    assert torch.allclose(torch.cat(parts, dim=1), attention(x, causal=True), atol=1e-5)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
@torch.inference_mode()
def test_rows_that_share_a_memory(images: int, each: int, length: int, tokens: int) -> None:
    attention = drawn(Attention(8, 2, memory_dim=6))
    memory, x = torch.randn(images, tokens, 6), torch.randn(images * each, length, 8)
    apart = torch.cat(
        [
            attention(x[i : i + 1], memory=attention.memory(memory[i // each : i // each + 1]))
            for i in range(images * each)
        ]
    )
    assert torch.allclose(attention(x, memory=attention.memory(memory)), apart, atol=1e-5)


@torch.inference_mode()
def test_selecting_rows_of_a_cache() -> None:
    attention = drawn(Attention(8, 2))
    x = torch.randn(2, 5, 8)
    cache = KeyValueCache((2, 2, 5, 4), x)
    attention(x[:, :3], cache=(cache, 0))
    cache.select(torch.tensor([1, 1, 0]), 3)
    rows = torch.cat([x[1:], x[1:], x[:1]])
    after = attention(rows[:, 3:4], cache=(cache, 3))
    assert torch.allclose(after, attention(rows[:, :4], causal=True)[:, 3:], atol=1e-5)
    cache.select(torch.tensor([2, 0, 1]), 4)  # in place: sources are read before they are written over
    after = attention(rows[[2, 0, 1], 4:5], cache=(cache, 4))
    assert torch.allclose(after, attention(rows[[2, 0, 1]], causal=True)[:, 4:], atol=1e-5)


@pytest.mark.parametrize("post_norm", [False, True])
@torch.inference_mode()
def test_padding_changes_nothing(post_norm: bool) -> None:
    block = drawn(Block(BlockConfig(8, 2, 16, "gelu", 1e-5, post_norm)))
    x, lengths = torch.randn(3, 6, 8), torch.tensor([6, 2, 4])
    padded = block(x, mask=mask_from_lengths(lengths, 6))
    for row, length in enumerate(lengths.tolist()):
        assert torch.allclose(padded[row, :length], block(x[row : row + 1, :length])[0], atol=1e-5)


@pytest.mark.skipif(not can_pack(), reason="this torch has no oneDNN packed linear layers")
@torch.inference_mode()
def test_packing_and_back() -> None:
    block = drawn(Block(BlockConfig(48, 3, 70, "gelu", 1e-5, True, 32)))
    before = {name: value.clone() for name, value in block.state_dict().items()}
    x, memory = torch.randn(4, 5, 48), torch.randn(2, 7, 32)
    wanted = block(x, memory=block.cross.memory(memory))
    pack(block)
    assert all(module.packed is not None for module in block.modules() if isinstance(module, Linear))
    assert torch.allclose(block(x, memory=block.cross.memory(memory)), wanted, atol=1e-5)
    unpack(block)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert torch.equal(block(x, memory=block.cross.memory(memory)), wanted)


@pytest.mark.skipif(not can_pack(), reason="this torch has no oneDNN packed linear layers")
@torch.inference_mode()
def test_packing_one_by_one_is_packing() -> None:
    plain = drawn(Block(BlockConfig(48, 3, 70, "gelu", 1e-5, True)))
    x = torch.randn(4, 5, 48)
    with torch.device("meta"):
        block = Block(BlockConfig(48, 3, 70, "gelu", 1e-5, True))
    load_weights(
        block,
        {name: value.clone() for name, value in plain.state_dict().items()},
        None,
        weight_hook=pack_hook(block),
    )
    assert block.attn.qkv.weight.is_meta
    pack(plain)
    assert torch.equal(block(x), plain(x))
    unpack(block)
    unpack(plain)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in block.state_dict().items())


@torch.inference_mode()
def test_packing_leaves_shared_weights_in_place() -> None:
    words = nn.Embedding(11, 8)
    head = Linear(8, 11)
    head.weight = words.weight
    net = nn.ModuleDict({"words": words, "head": head})
    drawn(net)
    x = torch.randn(5, 8)
    wanted = head(x)
    pack(net)
    assert head.weight is words.weight
    assert not words.weight.is_meta
    assert head.packed is None
    assert torch.allclose(head(x), wanted, atol=1e-5)
    unpack(net)
    assert head.kernel is None


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_bfloat16_learns_as_in_float32(causal: bool, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 9, 8, generator=generator) for _ in range(3))
    mask = mask_from_lengths(torch.tensor([9, 5]), 9) if masked and not causal else None
    gradients: list[list[torch.Tensor]] = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (query, key, value)]
        attend(*inputs, mask, causal=causal).float().square().sum().backward()
        gradients.append([x.grad.float() for x in inputs if x.grad is not None])
    for exact, rough in zip(*gradients, strict=True):
        assert (exact - rough).norm() <= 0.03 * exact.norm()
