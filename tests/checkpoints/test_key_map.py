"""The weight engine: every rule is undone exactly, and nothing that does not fit passes."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from sightloop.checkpoints.key_map import (
    Rule,
    cat,
    cat_grouped_query,
    count_layers,
    export_state_dict,
    load_weights,
    row_slice,
    squeezed,
    tied_names,
    transposed,
)
from sightloop.errors import CheckpointError
from sightloop.nn.attention import Linear

KEYS = {
    "layers.{}": "model.layer_{}.dense",
    "fused": cat("model.q", "model.k"),
    "projection.weight": transposed("proj"),
    "token": squeezed("cls", 2),
    "words": "embed",
    "head.words": "lm",
}


class Net(nn.Module):
    """One parameter of every kind of rule, and a tied pair."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Linear(3, 3) for _ in range(12))
        self.fused = Linear(3, 8)
        self.projection = Linear(3, 5, bias=False)
        self.token = nn.Parameter(torch.empty(3))
        self.words = nn.Embedding(7, 3)
        self.head = nn.Module()
        self.head.words = Linear(3, 7)
        self.head.words.weight = self.words.weight


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {
        f"model.layer_{i}.dense.{p}": (3, 3) if p == "weight" else (3,)
        for i in range(12)
        for p in ("weight", "bias")
    }
    shapes |= {f"model.{q}.{p}": (4, 3) if p == "weight" else (4,) for q in "qk" for p in ("weight", "bias")}
    shapes |= {"proj": (3, 5), "cls": (1, 1, 3), "embed.weight": (7, 3), "lm.bias": (7,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def empty() -> Net:
    with torch.device("meta"):
        return Net()


def test_there_and_back() -> None:
    net, given = empty(), tensors()
    assert tied_names(net) == {"head.words.weight": "words.weight"}
    load_weights(net, given, KEYS)
    assert net.head.words.weight is net.words.weight
    assert torch.equal(net.layers[11].weight, given["model.layer_11.dense.weight"])
    assert torch.equal(net.fused.weight, torch.cat([given["model.q.weight"], given["model.k.weight"]]))
    out = export_state_dict(net, KEYS)
    assert out.keys() == given.keys()
    assert all(torch.equal(out[name], given[name]) for name in given)


def test_a_tied_tensor_may_be_repeated_but_not_differ() -> None:
    given = tensors()
    load_weights(empty(), given | {"lm.weight": given["embed.weight"].clone()}, KEYS)
    with pytest.raises(CheckpointError, match=r"lm\.weight \(differs"):
        load_weights(empty(), given | {"lm.weight": given["embed.weight"] + 1}, KEYS)


@pytest.mark.parametrize("name", sorted(tensors()))
def test_every_missing_and_every_misshapen_tensor_is_named(name: str) -> None:
    given = tensors()
    with pytest.raises(CheckpointError, match="missing") as caught:
        load_weights(
            empty(), {key: value for key, value in given.items() if key != name}, KEYS, source="a file"
        )
    assert name in str(caught.value)
    assert str(caught.value).startswith("a file: ")
    with pytest.raises(CheckpointError, match="misshapen") as caught:
        load_weights(empty(), given | {name: torch.zeros(2, 2, 2)}, KEYS)
    assert name in str(caught.value)


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.int64])
def test_weights_that_are_no_numbers_with_a_fraction(kind: torch.dtype) -> None:
    given = tensors() | {"proj": torch.ones(3, 5, dtype=kind)}
    name = str(kind).removeprefix("torch.")
    with pytest.raises(CheckpointError, match=rf"proj \(3, 5\) of {name} \(expected \(5, 3\) for projection"):
        load_weights(empty(), given, KEYS)


def test_parts_that_only_add_up_do_not_fit() -> None:
    given = tensors() | {"model.q.weight": torch.zeros(3, 3), "model.k.weight": torch.zeros(5, 3)}
    with pytest.raises(
        CheckpointError, match=r"model\.q\.weight \(3, 3\), model\.k\.weight \(5, 3\) \(expected \(8"
    ):
        load_weights(empty(), given, KEYS)
    rule = cat_grouped_query(4, 1, "q", "k", "v")
    assert rule.read([torch.zeros(8, 3), torch.zeros(2, 3), torch.zeros(2, 3)]).shape == (12, 3)
    with pytest.raises(ValueError, match="shares"):
        rule.read([torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4, 3)])
    with pytest.raises(ValueError, match="7 rows"):
        row_slice("x", 0, 1, 3).read([torch.zeros(7, 3)])


class Counted(dict[str, torch.Tensor]):
    """Tensors that are made when they are asked for, and how many of them are still there when the next one is."""

    def __init__(self, given: dict[str, torch.Tensor]) -> None:
        super().__init__(given)
        self.asked: list[int] = []
        self.most = 0
        self.alive: list[weakref.ref[torch.Tensor]] = []

    def __getitem__(self, name: str) -> torch.Tensor:
        value = super().__getitem__(name).clone()
        self.asked.append(value.numel())
        self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(value)]
        self.most = max(self.most, len(self.alive))
        return value


def test_the_largest_come_first_and_what_is_taken_is_let_go() -> None:
    net, given = empty(), Counted(tensors())
    taken: dict[str, torch.Tensor] = {}

    def take(name: str, value: torch.Tensor) -> bool:
        taken[name] = value + 0
        return name != "token"

    load_weights(net, given, KEYS, weight_hook=take)
    fused = KEYS["fused"]
    assert isinstance(fused, Rule)
    assert given.most <= len(fused.names) + 1
    assert given.asked[:4] == [12, 12, 21, 15]  # two parts of one, the words, the projection
    assert net.projection.weight.is_meta
    assert torch.equal(net.token, taken["token"])


def test_unknown_tensors_are_named_unless_ignored() -> None:
    given = tensors() | {"a.position_ids": torch.zeros(1), "b": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"2 unknown: a\.position_ids, b"):
        load_weights(empty(), given, KEYS)
    load_weights(empty(), given, KEYS, ignore=[r"\.position_ids$", "^b$"])


def test_counting_layers() -> None:
    assert count_layers(["x.0.a", "x.11.a", "y.30.a"], r"x\.(\d+)\.") == 12
    assert count_layers([], r"x\.(\d+)\.") == 0
