"""Quantized weights: their error as the module states it, both int4 layouts, which layers keep their precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sightloop.errors import UsageError
from sightloop.nn import quantize
from sightloop.nn.attention import Linear
from sightloop.nn.prepack import pack
from sightloop.nn.quantize import (
    Int4Weight,
    Int8Product,
    Int8Weight,
    can_multiply_int8,
    is_quantized,
    quantize_hook,
    quantize_shared,
    quantized_names,
)

CPU = torch.device("cpu")


def error(kernel: nn.Module, weight: torch.Tensor, rows: int, dtype: torch.dtype) -> float:
    x = torch.randn(2, rows, weight.shape[1])
    bias = torch.randn(weight.shape[0])
    exact = x @ weight.T
    y = kernel(x.to(dtype), torch.empty(0), bias.to(dtype))
    assert y.dtype == dtype
    return float((y.float() - bias - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.parametrize(("width_out", "width_in"), [(64, 64), (2080, 128), (48, 512)])
def test_the_error_is_the_stated_one(width_out: int, width_in: int, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(width_out, width_in)
    assert error(Int8Weight(weight), weight, rows, dtype) < 0.01
    for packed in (True, False):
        assert 0.05 < error(Int4Weight(weight, packed=packed), weight, rows, dtype) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width_out", "width_in"), [(64, 64), (2112, 1088), (48, 512)])
def test_many_rows_are_multiplied_as_few_are(width_out: int, width_in: int, dtype: torch.dtype) -> None:
    """Many rows use dequantized weights, few use torch's kernels: the same up to bfloat16."""
    torch.manual_seed(0)
    weight, bias = torch.randn(width_out, width_in), torch.randn(width_out).to(dtype)
    x = torch.randn(3, 100, width_in).to(dtype)
    for kernel in (Int8Weight(weight), Int4Weight(weight, packed=True), Int4Weight(weight, packed=False)):
        many = kernel(x, weight, bias).float()
        few = torch.cat([kernel(part, weight, bias) for part in x.split(5, dim=1)], dim=1).float()
        assert many.shape == (3, 100, width_out)
        assert (many - few).norm() < 0.005 * few.norm()


def test_the_layout_of_this_processor_is_known() -> None:
    """In an unknown layout, many rows are slow but correct."""
    row_group = quantize._kernel_row_group()
    if row_group == 0:
        pytest.skip("torch packs 4-bit weights otherwise here")
    assert 64 % row_group == 0


def test_int4_example_of_the_docstring() -> None:
    weight = torch.tensor([[-1.0, 0.05, 0.4, 2.0]]).repeat(1, quantize.GROUP // 4)
    q, scale_zero = quantize._quantize_int4(weight, False)
    assert q[0, :2].tolist() == [0x50, 0xF7]
    assert scale_zero.flatten().tolist() == pytest.approx([0.2, 0.6], rel=2**-8)
    dequantized = Int4Weight(weight.repeat(16, 1), packed=False)._dequantize(slice(0, 1), torch.float32)
    assert dequantized[:4, 0].tolist() == pytest.approx([-1.0, 0.0, 0.4, 2.0], abs=0.01)
    a, b, c, d = ([10 * row + 1, 10 * row + 2] for row in range(4))  # rows of two columns
    grouped = [[a[0], b[0]], [a[1], b[1]]], [[c[0], d[0]], [c[1], d[1]]]
    low, high = (torch.tensor(rows, dtype=torch.uint8) % 16 for rows in grouped)
    assert torch.equal(
        quantize._unpack_int4((low | high << 4).view(4, 1), 4).T, torch.tensor([a, b, c, d]) % 16
    )


def test_both_layouts_hold_the_same_numbers() -> None:
    torch.manual_seed(0)
    weight = torch.randn(80, 192)
    weight[3] = 0
    weight[4, :64] = 5.0
    x = torch.eye(192)
    plain, packed = (Int4Weight(weight, packed=packed)(x, weight, None) for packed in (False, True))
    assert torch.allclose(plain, packed, rtol=0.01, atol=0.01)
    assert (plain[:, 3].abs().max(), plain[:64, 4].unique().tolist()) == (0, [5.0])


class Small(nn.Module):
    """A language model's shape: a tied table, layers, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = Linear(64, 64)
        self.language = nn.Module()
        self.language.table = nn.Embedding(32, 64)
        self.language.tied = Linear(64, 32, bias=False)
        self.language.tied.weight = self.language.table.weight
        self.language.fc = Linear(64, 32)
        self.language.narrow = Linear(40, 32)
        self.language.head = Linear(64, 32, bias=False)


def test_which_weights_the_hook_quantizes() -> None:
    net = Small()
    hook = quantize_hook(net, "int4", CPU)
    quantized = {name for name, value in net.state_dict().items() if hook(name, torch.randn(value.shape))}
    assert quantized == {"language.fc.weight", "language.narrow.weight", "language.head.weight"}
    assert isinstance(net.language.fc.kernel, Int4Weight)
    assert isinstance(net.language.narrow.kernel, Int8Weight)
    assert isinstance(net.language.head.kernel, Int8Weight)
    assert not is_quantized(net.vision)
    assert "language.fc.kernel.q" not in net.state_dict()
    with pytest.raises(UsageError, match="int8"):
        quantize_hook(net, "int3", CPU)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="language model"):
        quantize_hook(nn.Module(), "int4", CPU)


class Towers(nn.Module):
    """A model without a language model: blocks, a head that is also the embedding, a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Module()
        self.vision.patches = Linear(48, 64)
        self.vision.blocks = nn.ModuleList([Linear(64, 64)])
        self.decoder = nn.Module()
        self.decoder.table = nn.Embedding(96, 64)
        self.decoder.head = nn.ModuleDict({"words": Linear(64, 96)})
        self.image_projection = Linear(64, 32)
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        self.decoder.head["words"].weight = self.decoder.table.weight  # pyright: ignore[reportAttributeAccessIssue]


def test_of_towers_blocks_and_head_are_quantized() -> None:
    net = Towers()
    hook = quantize_hook(net, "int8", CPU)
    quantize_shared(net, CPU)
    assert net.decoder.head["words"].kernel is None  # nothing is quantized yet
    quantized = {name for name, value in net.state_dict().items() if hook(name, torch.randn(value.shape))}
    assert quantized == {"vision.blocks.0.weight"}
    quantize_shared(net, CPU)
    words = net.decoder.head["words"]
    assert is_quantized(words)
    assert not words.weight.is_meta
    assert quantized_names(net) == {"vision.blocks.0.weight", "decoder.head.words.weight"}
    assert isinstance(words.kernel, Int8Product if can_multiply_int8() else Int8Weight)
    pack(net)  # leaves quantized layers alone
    assert is_quantized(words)
    x = torch.randn(5, 64)
    exact = x @ words.weight.T + words.bias
    assert (words(x) - exact).norm() < 0.02 * exact.norm()


products = pytest.mark.skipif(not can_multiply_int8(), reason="this torch has no int8 products")


def engines() -> list[bool]:
    """FBGEMM, and oneDNN where this torch has its products."""
    return [False, *([True] if quantize._has_onednn_int8() else [])]


@products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.parametrize(("width_out", "width_in"), [(64, 64), (2080, 128), (30, 36)])
def test_the_error_of_int8_products_is_the_stated_one(
    width_out: int, width_in: int, rows: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(width_out, width_in)
    for onednn in engines():
        assert error(Int8Product(weight, onednn=onednn), weight, rows, dtype) < 0.015


@products
@pytest.mark.parametrize("steps", [63, 127])
def test_an_int8_product_does_not_depend_on_the_batch(steps: int) -> None:
    """A token alone gives what it gives beside tokens a thousand times as large; both engines give the same."""
    torch.manual_seed(0)
    weight, bias = torch.randn(40, 64), torch.randn(40)
    x = torch.randn(7, 64) * torch.tensor([1, 1e3, 1e-3, 0, 1, 1, 1])[:, None]
    results: list[torch.Tensor] = []
    for onednn in engines():
        kernel = Int8Product(weight, onednn=onednn)
        kernel.steps = steps
        together = kernel(x, weight, bias)
        alone = torch.cat([kernel(row[None], weight, bias) for row in x])
        assert ((together - alone).norm(dim=1) <= 0.003 * (together - bias).norm(dim=1)).all()
        assert torch.equal(together[3], bias)
        results.append(together)
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-4)


@products
def test_int8_products_of_nothing_and_of_what_is_no_number() -> None:
    kernel = Int8Product(torch.randn(8, 16))
    assert kernel(torch.empty(0, 3, 16), torch.empty(0), None).shape == (0, 3, 8)
    for rows in (1, 2):
        x = torch.ones(rows, 16)
        x[0, 3] = torch.nan
        assert not kernel(x, torch.empty(0), None)[0].isfinite().any()


@pytest.mark.parametrize("rows", [1, 3, 50])
@pytest.mark.parametrize("kind", [Int8Weight, Int4Weight, Int8Product])
def test_the_gradient_of_the_input_is_that_of_the_weight(
    kind: type[Int8Weight | Int4Weight | Int8Product], rows: int
) -> None:
    if kind is Int8Product and not can_multiply_int8():
        pytest.skip("this torch multiplies no bytes")
    torch.manual_seed(0)
    weight, grad = torch.randn(192, 128), torch.randn(2, rows, 192)
    kernel = Int4Weight(weight, packed=True) if kind is Int4Weight else kind(weight)
    x = torch.randn(2, rows, 128, requires_grad=True)
    y = kernel(x, torch.empty(0), torch.randn(192))
    assert y.requires_grad
    y.backward(grad)
    expected = grad @ weight
    assert x.grad is not None
    off = float((x.grad - expected).norm() / expected.norm())
    assert off < (0.12 if kind is Int4Weight else 0.02)
