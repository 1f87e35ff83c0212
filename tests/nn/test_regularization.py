"""Training through the primitives: the fast products, and what is done only while training."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sightloop.errors import UsageError
from sightloop.nn import prepack
from sightloop.nn.attention import KeyValueCache, Linear
from sightloop.nn.blocks import Block, BlockConfig, drop_branch, quick_gelu
from sightloop.nn.regularization import set_activation_checkpointing, set_regularization


def linear(width_in: int, width_out: int, *, bias: bool = True) -> Linear:
    layer = Linear(width_in, width_out, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.3)
    prepack.use_training_kernels(layer)
    return layer


def gradients(layer: Linear, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of x and of every parameter that has one."""
    x = x.clone().requires_grad_()
    out = layer(x)
    return out.detach(), *torch.autograd.grad(out, [x, *layer.parameters()], grad)


def in_float64(layer: Linear, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    x = x.double().requires_grad_()
    parameters = [p.detach().double().requires_grad_() for p in layer.parameters()]
    out = torch.nn.functional.linear(x, *parameters)
    return out.detach(), *torch.autograd.grad(out, [x, *parameters], grad.double())


@pytest.fixture
def always_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    if not prepack.HAS_ONEDNN:
        pytest.skip("this torch has no oneDNN linear layers")
    monkeypatch.setattr(prepack, "_MIN_ONEDNN_PRODUCTS", 0)


@pytest.mark.usefixtures("always_fast")
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 33), st.integers(1, 33), st.booleans()
)
@settings(max_examples=40, deadline=None)
def test_fast_products_are_exact(rows: list[int], width_in: int, width_out: int, bias: bool) -> None:
    layer = linear(width_in, width_out, bias=bias)
    x, grad = torch.randn(*rows, width_in), torch.randn(*rows, width_out)
    assert prepack._is_faster_with_onednn(x, layer.weight)
    for ours, wanted in zip(gradients(layer, x, grad), in_float64(layer, x, grad), strict=True):
        assert ours.dtype == torch.float32
        assert ours.is_contiguous()
        assert torch.allclose(ours.double(), wanted, rtol=1e-5, atol=1e-5)


def test_fast_products_of_a_real_size() -> None:
    layer = linear(768, 1024)
    x, grad = torch.randn(2, 50, 768), torch.randn(2, 50, 1024)
    assert prepack._is_faster_with_onednn(x, layer.weight) == prepack.HAS_ONEDNN
    for ours, wanted in zip(gradients(layer, x, grad), in_float64(layer, x, grad), strict=True):
        assert (ours - wanted).norm() <= 1e-6 * wanted.norm()
        assert (ours - wanted).abs().max() <= 4e-6 * wanted.abs().max()


@pytest.mark.usefixtures("always_fast")
def test_strided_rows() -> None:
    layer, x = linear(6, 4), torch.randn(6, 5, 3).permute(2, 1, 0)
    grad = torch.randn(4, 5, 3).permute(2, 1, 0)
    for ours, wanted in zip(gradients(layer, x, grad), in_float64(layer, x, grad), strict=True):
        assert torch.allclose(ours.double(), wanted, atol=1e-5)


@pytest.mark.usefixtures("always_fast")
def test_what_is_frozen_gets_no_gradient() -> None:
    first, second = linear(5, 4), linear(4, 3)
    first.requires_grad_(False)
    second.weight.requires_grad_(False)
    second(first(torch.randn(2, 5))).sum().backward()
    assert first.weight.grad is first.bias.grad is second.weight.grad is None
    assert torch.equal(second.bias.grad, torch.full((3,), 2.0))
    x = torch.randn(2, 5, requires_grad=True)
    second(first(x)).sum().backward()
    assert torch.allclose(x.grad, (second.weight.sum(0) @ first.weight).expand(2, 5), atol=1e-5)


@pytest.mark.usefixtures("always_fast")
def test_recomputation_gives_the_same_bits() -> None:
    layer, x = linear(7, 7), torch.randn(3, 7, requires_grad=True)
    layer(torch.tanh(layer(x))).sum().backward()
    wanted = x.grad, layer.weight.grad, layer.bias.grad
    x.grad = layer.weight.grad = layer.bias.grad = None
    checkpoint(lambda y: layer(torch.tanh(layer(y))), x, use_reentrant=False).sum().backward()
    for ours, kept in zip((x.grad, layer.weight.grad, layer.bias.grad), wanted, strict=True):
        assert torch.equal(ours, kept)


@pytest.mark.usefixtures("always_fast")
def test_other_precisions_go_torchs_way() -> None:
    layer, x = linear(8, 8), torch.randn(2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not prepack._is_faster_with_onednn(x, layer.weight)
        assert layer(x).dtype == torch.bfloat16
    assert not prepack._is_faster_with_onednn(x.double(), layer.weight)
    assert layer.double()(x.double()).dtype == torch.float64


@pytest.mark.usefixtures("always_fast")
def test_shared_weights_add_their_gradients() -> None:
    layer, x = linear(6, 6), torch.randn(4, 6)
    layer(layer(x)).sum().backward()
    weight = layer.weight.detach().clone().requires_grad_()
    bias = layer.bias.detach()
    torch.nn.functional.linear(torch.nn.functional.linear(x, weight, bias), weight, bias).sum().backward()
    assert torch.allclose(layer.weight.grad, weight.grad, atol=1e-5)


@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_quick_gelu_in_training(values: list[float]) -> None:
    x = torch.tensor(values, requires_grad=True)
    out = quick_gelu(x)
    out.sum().backward()
    exact = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    wanted = exact * torch.sigmoid(1.702 * exact)
    wanted.sum().backward()
    assert torch.allclose(out.double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.allclose(quick_gelu(x.detach()).double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.allclose(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def stack(layers: int = 4, *, post_norm: bool = False, memory_dim: int | None = None) -> nn.ModuleList:
    blocks = nn.ModuleList(
        Block(BlockConfig(8, 2, 16, "gelu", 1e-5, post_norm, memory_dim)) for _ in range(layers)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in blocks.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return blocks.train()


def through(blocks: nn.ModuleList, x: Tensor, **options: Tensor) -> Tensor:
    for block in blocks:
        memory = block.cross.memory(options["tokens"]) if options else None
        x = block(x, memory=memory)
    return x


def test_nothing_is_left_out_by_default_or_in_evaluation() -> None:
    blocks, x = stack(), torch.randn(3, 5, 8)
    wanted = through(blocks, x)
    assert torch.equal(through(blocks.eval(), x), wanted)
    set_regularization(blocks, dropout=0.5, drop_path=0.5)
    assert torch.equal(through(blocks, x), wanted)
    assert not torch.equal(through(blocks.train(), x), wanted)
    set_regularization(blocks)
    assert torch.equal(through(blocks, x), wanted)
    for wrong in ({"dropout": 1.0}, {"drop_path": -0.1}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            set_regularization(blocks, **wrong)


@pytest.mark.parametrize("post_norm", [False, True])
def test_drop_path_leaves_out_branches_of_rows(post_norm: bool) -> None:
    blocks = stack(3, post_norm=post_norm)
    set_regularization(blocks, drop_path=0.5)
    assert [block.drop_path for block in blocks] == [0.0, 0.25, 0.5]
    torch.manual_seed(0)
    rows, branch = 4000, torch.randn(4000, 2, 8)
    kept = drop_branch(branch, blocks[2])
    left = (kept == 0).flatten(1).all(1)
    assert torch.equal(kept[~left], branch[~left] * 2)
    assert abs(left.float().mean() - 0.5) < 4 * 0.5 / rows**0.5
    assert torch.equal(drop_branch(branch, blocks[0]), branch)


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("random", [False, True])
def test_recomputed_blocks_train_the_same(post_norm: bool, random: bool) -> None:
    blocks = stack(post_norm=post_norm, memory_dim=6)
    x, tokens = torch.randn(4, 3, 8), torch.randn(2, 5, 6, requires_grad=True)
    if random:
        set_regularization(blocks, dropout=0.2, drop_path=0.3)
    found: list[list[Tensor]] = []
    for on in (False, True):
        set_activation_checkpointing(blocks, on)
        torch.manual_seed(1)
        out = through(blocks, x, tokens=tokens)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), [tokens, *blocks.parameters()])])
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


def test_recomputed_blocks_keep_less() -> None:
    blocks, kept = stack(), []

    def count(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    totals = []
    for on in (False, True):
        set_activation_checkpointing(blocks, on)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            through(blocks, torch.randn(3, 5, 8, requires_grad=True))
        totals.append(sum(kept))
    assert totals[1] < totals[0] / 8


def test_recomputation_leaves_decoding_alone() -> None:
    block, x = stack(1)[0], torch.randn(2, 3, 8)
    set_activation_checkpointing(block)
    cache = KeyValueCache((2, 2, 3, 4), x)
    assert torch.allclose(block(x, cache=(cache, 0)), block(x, causal=True), atol=1e-6)
