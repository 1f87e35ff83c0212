"""The diffusion transformer: its parts against few-line formulas, and adaLN-Zero's start."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sightloop.nn.blocks import Block, Modulation, sinusoids
from sightloop.nn.init import initialize
from sightloop.towers.dit import Dit, DitConfig, from_patches, grid_positions, to_patches
from sightloop.types import Encoded

CONFIG = DitConfig(8, 2, 3, dim=16, layers=2, heads=2, mlp_dim=32, memory_dim=12)


def _inputs(rows: int = 3, words: int = 5) -> tuple[Tensor, Tensor, Encoded]:
    random = torch.Generator().manual_seed(0)
    mask = torch.arange(words) < torch.tensor([[5], [3], [1]])[:rows]
    text = Encoded(
        torch.randn(rows, words, 12, generator=random), torch.randn(rows, 12, generator=random), mask
    )
    return torch.randn(rows, 3, 8, 8, generator=random), torch.rand(rows, generator=random), text


def _filled(seed: int = 0) -> Dit:
    network = Dit(CONFIG)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=random))
    return network.eval()


def test_patches_are_squares_row_by_row_and_go_back() -> None:
    image = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    patches = to_patches(image, 2)
    assert patches.shape == (2, 6, 12)
    assert torch.equal(patches[1, 4].sort().values, image[1, :, 2:4, 2:4].flatten().sort().values)
    assert torch.equal(from_patches(patches, 2, (2, 3)), image)


def test_a_start_of_zero_predicts_zero_whatever_the_input() -> None:
    network = Dit(CONFIG)
    initialize(network, 0)
    assert not network(*_inputs()).any()
    network.last.weight.data.normal_()
    assert network(*_inputs()).any()  # it was the last layer that was zero


def test_a_block_with_zero_gates_changes_x_by_its_cross_attention_alone() -> None:
    block = Block(CONFIG.block)
    initialize(block, 1)
    x, memory = torch.randn(2, 4, 16), torch.randn(2, 5, 12)
    zero = torch.zeros(2, 16)
    keys = block.cross.memory(memory)
    expected = x + block.cross(block.norm_cross(x), memory=keys)
    assert torch.allclose(block(x, memory=keys, modulation=Modulation(*[zero] * 6)), expected)
    assert not torch.allclose(block(x, memory=keys, modulation=Modulation(*[zero + 1] * 6)), expected)


def test_the_forward_pass_is_that_of_the_paper() -> None:
    """Peebles and Xie 2023, section 3.2 and figure 3, and PixArt's cross-attention, in few lines."""
    network = _filled()
    latents, times, text = _inputs()

    def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * layer.weight + layer.bias

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        heads = [x.unflatten(-1, (2, 8)).transpose(1, 2) for x in (q, k, v)]
        scores = heads[0] @ heads[1].transpose(-1, -2) / math.sqrt(8)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        return (scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)

    angles = 1000 * times[:, None] * 10_000 ** -(torch.arange(128) / 128)
    waves = torch.cat([angles.cos(), angles.sin()], -1)
    condition = network.time.fc2(nn.functional.silu(network.time.fc1(waves))) + network.pooled(text.pooled)
    active = nn.functional.silu(condition)[:, None]
    x = network.embed(to_patches(latents, 2)) + grid_positions(4, 4, 16, 4)
    for i, block in enumerate(network.blocks):
        assert isinstance(block, Block)
        a, b, c, d, e, f = network.modulations[i](active).chunk(6, -1)
        q, k, v = block.attn.qkv(norm(x, block.norm1) * (1 + b) + a).chunk(3, -1)  # pyright: ignore
        x = x + c * block.attn.out(attention(q, k, v))
        k, v = block.cross.kv(text.tokens).chunk(2, -1)
        x = x + block.cross.out(attention(block.cross.q(norm(x, block.norm_cross)), k, v, text.mask))  # pyright: ignore
        hidden = nn.functional.gelu(
            block.mlp.fc1(norm(x, block.norm2) * (1 + e) + d),
            approximate="tanh",  # pyright: ignore
        )
        x = x + f * block.mlp.fc2(hidden)
    shift, scale = network.modulations[2](active).chunk(2, -1)
    expected = from_patches(network.last(norm(x, network.norm) * (1 + scale) + shift), 2, (4, 4))
    with torch.no_grad():
        assert torch.allclose(network(latents, times, text), expected, atol=1e-4)


def test_padding_of_the_text_has_no_effect() -> None:
    network, (latents, times, text) = _filled(), _inputs()
    assert text.mask is not None
    noise = torch.where(text.mask[..., None], text.tokens, 100.0)
    with torch.no_grad():
        same = network(latents, times, Encoded(noise, text.pooled, text.mask))
        assert torch.allclose(network(latents, times, text), same, atol=1e-5)


def test_positions_differ_and_are_stretched_to_the_grid_of_training() -> None:
    table = grid_positions(4, 4, 16, 4)
    assert len({tuple(row) for row in table.tolist()}) == 16
    assert torch.equal(
        grid_positions(8, 8, 16, 4)[::2][:4], table[:4]
    )  # every second column of the first row
    assert torch.equal(table[:, :8].view(4, 4, 8)[2, 0], sinusoids(torch.tensor([2.0]), 8)[0])
