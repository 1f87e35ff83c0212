"""Kernels: the choice follows the times, all kernels agree to rounding, and a pinned one is used without timing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sightloop.nn import attention, kernels
from sightloop.nn.attention import Linear
from sightloop.nn.kernels import FEW, MANY, MOST, ONE, SOME, Choice, Shape
from sightloop.nn.prepack import pack, timed_shapes, unpack

SHAPE = Shape(96, 64, torch.float32)
needs_onednn = pytest.mark.skipif(not kernels.can_pack(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing pinned, nothing known; afterwards as `conftest` has it."""
    kernels.pin("auto")
    kernels.forget_times()
    yield
    kernels.pin("packed")
    kernels.forget_times()


def times(plain: float, onednn: float, packed: float) -> kernels.Times:
    """The same times at every row count."""
    return {"plain": [plain] * 5, "onednn": [onednn] * 5, "packed": [packed] * 5}


@needs_onednn
@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (times(1.0, 1.0, 1.0), Choice(False)),  # a tie
        (times(1.0, 0.99, 0.98), Choice(False)),  # within the noise of timing
        (times(1.0, 2.0, 0.5), Choice(True)),
        (times(1.0, 0.5, 0.5), Choice(False, ("onednn",) * 5)),
        (times(0.5, 1.0, 1.0), Choice(False)),
    ],
)
def test_the_quickest_is_chosen(known: kernels.Times, expected: Choice) -> None:
    kernels.add_times({SHAPE.key: known})
    assert kernels.choose(SHAPE, range(5)) == expected


@needs_onednn
def test_each_layer_chooses_for_the_row_counts_that_it_sees() -> None:
    """Packed weights that lose with many rows and win with few, as on Intel."""
    known = {"plain": [1.0] * 5, "onednn": [1.0, 1.0, 0.5, 1.0, 1.0], "packed": [1.0, 0.4, 0.6, 0.9, 1.3]}
    kernels.add_times({SHAPE.key: known})
    assert not kernels.choose(SHAPE, kernels.row_classes("vision.blocks.0.mlp.fc1")).packed
    assert not kernels.choose(SHAPE, kernels.row_classes("decoder.text.blocks.0.cross.kv")).packed
    assert kernels.choose(SHAPE, kernels.row_classes("decoder.head.words")).packed
    shared = kernels.choose(SHAPE, {ONE, FEW, SOME}, packable=False)
    assert shared == Choice(False, ("plain", "plain", "onednn", "plain", "plain"))


@needs_onednn
@given(st.lists(st.floats(1e-6, 1), min_size=15, max_size=15), st.sets(st.sampled_from(range(5)), min_size=1))
def test_no_choice_is_slower_than_torch_at_any_row_count(seconds: list[float], seen: set[int]) -> None:
    kernels.forget_times()
    known = {"plain": seconds[:5], "onednn": seconds[5:10], "packed": seconds[10:]}
    kernels.add_times({SHAPE.key: known})
    choice = kernels.choose(SHAPE, seen)
    chosen = ["packed"] * 5 if choice.packed else choice.by_rows
    ratios = [known[chosen[c]][c] / known["plain"][c] for c in seen]
    assert sum(ratios) <= len(seen) * (1 + 1e-9)
    assert max(ratios) <= (1.02 if choice.packed else 1)


@needs_onednn
def test_measuring_prefers_what_the_clock_says() -> None:
    """A clock by which oneDNN's packed products take no time, and others a second."""
    calls = count()
    seconds = iter(range(10**9))

    def clock() -> float:
        # Rounds go plain, onednn, packed, with two readings each.
        kernel = next(calls) // 2 % 3
        return 0.0 if kernel == 2 else float(next(seconds))

    new = kernels.measure({SHAPE: {MANY}}, clock=clock)
    assert set(new) == {SHAPE.key}
    assert kernels.choose(SHAPE, {MANY}).packed
    assert new[SHAPE.key]["plain"][:MANY] == [0.0] * MANY
    assert kernels.measure({SHAPE: {MANY}}) == {}  # known: not timed again
    assert kernels.measure({SHAPE: {MANY, ONE}})[SHAPE.key]["plain"][ONE] > 0


def test_a_pinned_kernel_is_not_timed() -> None:
    kernels.add_times({SHAPE.key: times(1.0, 0.1, 0.1)})
    kernels.pin("plain")
    assert kernels.choose(SHAPE, range(4)) == Choice(False)
    assert kernels.measure({Shape(8, 8, torch.float32): {ONE}}) == {}
    kernels.pin("packed")
    assert kernels.choose(SHAPE, range(4)).packed == kernels.can_pack()


def test_deterministic_mode_pins_torchs_own() -> None:
    kernels.add_times({SHAPE.key: times(1.0, 0.1, 0.1)})
    torch.use_deterministic_algorithms(True)
    try:
        assert kernels.pinned() == "plain"
        assert kernels.choose(SHAPE, range(4)) == Choice(False)
    finally:
        torch.use_deterministic_algorithms(False)


class Net(nn.Module):
    """A tower's layer, a decoder's layer, and a head that shares its matrix with an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.ModuleDict({"fc": Linear(64, 96)})
        self.decoder = nn.ModuleDict({"fc": Linear(64, 96), "table": nn.Embedding(96, 64)})
        self.head = Linear(64, 96, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        self.head.weight = self.decoder["table"].weight  # pyright: ignore[reportAttributeAccessIssue]


@needs_onednn
@pytest.mark.parametrize("known", [times(1.0, 2.0, 0.1), times(1.0, 0.1, 2.0), times(0.1, 1.0, 1.0)])
def test_results_agree_whatever_is_chosen(known: kernels.Times) -> None:
    torch.manual_seed(0)
    net = Net()
    kernels.add_times({SHAPE.key: known})
    before = {name: value.clone() for name, value in net.state_dict().items()}
    xs = [torch.randn(rows, 64) for rows in (1, 3, 20, 200, 600)]
    layers = [net.vision["fc"], net.decoder["fc"], net.head]
    with torch.inference_mode():
        expected = [[layer(x) for x in xs] for layer in layers]
        pack(net)
        for layer, own in zip(layers, expected, strict=True):
            for x, y in zip(xs, own, strict=True):
                torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-4)
    unpack(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(layer.kernel is None for layer in layers)


def test_which_shapes_are_timed() -> None:
    net = Net()
    net.tiny = Linear(8, 8)
    assert timed_shapes(net, torch.float32) == {SHAPE: {ONE, FEW, SOME, MANY, MOST}}
    assert timed_shapes(net, torch.float32, {"decoder.fc.weight", "head.weight"}) == {SHAPE: {MANY, MOST}}


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 96, 97, 384, 385, 10_000])
def test_row_classes(rows: int) -> None:
    bounds = {ONE: (1, 1), FEW: (2, 8), SOME: (9, 96), MANY: (97, 384), MOST: (385, 10**9)}
    low, high = bounds[kernels.row_class(rows)]
    assert low <= rows <= high
    assert bounds[kernels.row_class(kernels.ROW_COUNTS[kernels.row_class(rows)])] == (low, high)


@pytest.mark.parametrize("make", [lambda: None, lambda: torch.rand(2, 1, 1, 70) < 0.5])
def test_attention_in_bfloat16_agrees_whichever_kernel_is_quicker(
    make: Callable[[], torch.Tensor | None],
) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 70, 16).bfloat16()
    mask = make()
    results: list[torch.Tensor] = []
    for quicker in ("plain", "onednn"):
        kernels.forget_times()
        own = {name: [1.0 if name == quicker else 2.0] * 4 for name in ("plain", "onednn")}
        kernels.add_times({"bfloat16 attention": own})
        assert kernels.prefers_products(query, key) == (quicker == "onednn")
        results.append(attention.attend(query, key, value, mask).float())
    exact = attention.attend(query.float(), key.float(), value.float(), mask)
    for result in results:
        assert (result - exact).norm() < 0.02 * exact.norm()
    assert not kernels.prefers_products(query.float(), key.float())
