"""Weights to start from: every parameter is set, by its role, from the seed alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from sightloop.models.blip import Blip
from sightloop.models.clip import Clip, ClipConfig
from sightloop.nn.init import initialize
from sightloop.training.model_sizes import SIZES


def network(name: str, seed: int = 0) -> Any:
    family, config = SIZES[name]
    if name == "clip-vit-b-32":  # two of its twelve layers: the others are like them
        assert isinstance(config, ClipConfig)
        vision, text = replace(config.vision, layers=2), replace(config.text, layers=2, vocab=500)
        config = replace(config, vision=vision, text=text)
    net: Any = Blip(config) if family == "blip" else Clip(config)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(math.nan)
    initialize(net, seed)
    return net


@pytest.mark.parametrize("name", ["blip-nano", "world", "clip-vit-b-32"])
def test_every_parameter_is_set(name: str) -> None:
    for key, value in network(name).named_parameters():
        assert bool(value.isfinite().all()), key
        if key.endswith("bias"):
            assert not value.any(), key
        elif "norm" in key:
            assert bool((value == 1).all()), key


def test_the_seed_alone_decides() -> None:
    first, again, other = network("world"), network("world"), network("world", seed=1)
    torch.manual_seed(7)
    for (key, a), b, c in zip(
        first.state_dict().items(), again.state_dict().values(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), key
        assert a.ndim < 2 or not torch.equal(a, c), key


def test_deviations() -> None:
    net = network("blip-nano")
    cut = 0.8796  # the deviation of a unit normal that is cut at two
    block, stem = net.vision.blocks[0], net.vision.embed.stem
    assert block.attn.qkv.weight.std().item() == pytest.approx(cut * (0.4 / 256) ** 0.5, rel=0.02)
    assert net.encoder.word.weight.std().item() == pytest.approx(0.02 * cut, rel=0.02)
    additions = 2 * len(net.vision.blocks)
    fc2, std = block.mlp.fc2.weight, cut * (0.4 / block.mlp.fc2.weight.shape[1]) ** 0.5
    assert fc2.std().item() == pytest.approx(std / additions**0.5, rel=0.02)
    assert net.encoder.blocks[0].mlp.fc2.weight.std().item() == pytest.approx(std, rel=0.02)
    conv = stem[-3].conv1.weight  # the last two are a norm and an activation
    assert conv.std().item() == pytest.approx(cut * (9 * conv.shape[1]) ** -0.5, rel=0.02)
    assert net.temperature.item() == pytest.approx(0.07)
    assert net.decoder.head.words.weight is net.encoder.word.weight
    assert network("clip-vit-b-32").logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_a_network_without_memory_is_refused() -> None:
    with torch.device("meta"):
        net = Blip(SIZES["world"][1])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="real device"):
        initialize(net, 0)
