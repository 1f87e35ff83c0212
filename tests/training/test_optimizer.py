"""Steps of the reference recipes against the same written out in a few lines; schedules; clamps; teachers."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sightloop.errors import UsageError
from sightloop.models import blip, clip
from sightloop.towers.text import TextConfig
from sightloop.towers.vit import VitConfig
from sightloop.training.ema import ema_copy, ema_decay, update_ema
from sightloop.training.optimizer import (
    build_optimizer,
    clamp_parameters,
    freeze,
    parameter_groups,
    set_lr,
)
from sightloop.training.optimizer_config import OptimizerConfig
from sightloop.training.schedule import ScheduleConfig, lr_at

VISION = VitConfig(32, 16, 8, 3, 2, 16, "gelu", 1e-6, False, True, True)
TEXT = TextConfig(20, 10, 8, 2, 2, 16, "gelu", 1e-6, True, 8)


def drawn(network: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.1, 0.3, generator=generator)
    return network


def a_blip() -> blip.Blip:
    return drawn(
        blip.Blip(blip.BlipConfig(VISION, TEXT, 8, True, True, True, 6, True, True, True, 2, 3, 0, None))
    )


def a_clip() -> clip.Clip:
    text = dataclasses.replace(TEXT, post_norm=False, memory_dim=None)
    return drawn(clip.Clip(clip.ClipConfig(VISION, text, 6, 3, False)))


def scales(network: nn.Module, config: OptimizerConfig, **options: Any) -> dict[str, tuple[float, float]]:
    """name -> (weight decay, scale)."""
    of = {
        parameter: (group["weight_decay"], group["scale"])
        for group in parameter_groups(network, config, **options)
        for parameter in group["params"]
    }
    return {name: of[p] for name, p in network.named_parameters() if p in of}


def give_gradients(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def adamw_by_hand(
    weights: dict[str, torch.Tensor],
    gradients: list[dict[str, torch.Tensor]],
    rates: list[float],
    decays: dict[str, float],
    betas: tuple[float, float],
    eps: float,
) -> dict[str, torch.Tensor]:
    """AdamW as the paper writes it (algorithm 2), in float64."""
    weights = {name: value.double() for name, value in weights.items()}
    first = {name: torch.zeros_like(value) for name, value in weights.items()}
    second = {name: torch.zeros_like(value) for name, value in weights.items()}
    for t, (step, now) in enumerate(zip(gradients, rates, strict=True), 1):
        for name in weights:
            g = step[name].double()
            first[name] = betas[0] * first[name] + (1 - betas[0]) * g
            second[name] = betas[1] * second[name] + (1 - betas[1]) * g * g
            mean, square = first[name] / (1 - betas[0] ** t), second[name] / (1 - betas[1] ** t)
            weights[name] = weights[name] - now * (
                mean / (square.sqrt() + eps) + decays[name] * weights[name]
            )
    return weights


def test_steps_of_blips_pretraining() -> None:
    """salesforce/BLIP, pretrain.py: everything decayed, linear warm-up in epoch 0, x0.9 an epoch, teacher at 0.995."""
    network = a_blip()
    teacher = ema_copy(network)
    config = OptimizerConfig(lr=3e-4, weight_decay=0.05, decay_on="all")
    schedule = ScheduleConfig("blip", warmup_steps=3, start=1e-6, floor=1e-6, decay=0.9)
    optimizer = build_optimizer(network, config)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    by_hand = {name: p.detach().double().clone() for name, p in teacher.named_parameters()}
    rates = [1e-6, 1e-6 + (3e-4 - 1e-6) / 3, 1e-6 + (3e-4 - 1e-6) * 2 / 3, 3e-4]  # epoch 0
    rates += [2.7e-4] * 4 + [2.43e-4] * 2
    gradients: list[dict[str, torch.Tensor]] = []
    for step, wanted in enumerate(rates):
        now = lr_at(schedule, step, 40, 4, config.lr)
        assert now == pytest.approx(wanted, rel=1e-12)
        set_lr(optimizer, now)
        give_gradients(network, step)
        gradients.append({name: p.grad.clone() for name, p in network.named_parameters()})  # type: ignore[union-attr]
        optimizer.step()
        update_ema(teacher, network, 0.995)
        by_hand = {n: by_hand[n] * 0.995 + network.get_parameter(n).double() * 0.005 for n in by_hand}
    after = adamw_by_hand(before, gradients, rates, dict.fromkeys(before, 0.05), (0.9, 0.999), 1e-8)
    for name, parameter in network.named_parameters():
        assert torch.allclose(parameter.double(), after[name], rtol=1e-6, atol=1e-7), name
    for name, parameter in teacher.named_parameters():
        assert torch.allclose(parameter.double(), by_hand[name], rtol=1e-6, atol=1e-7), name


def test_steps_of_clips_pretraining() -> None:
    """Radford et al. 2021, table 20 and open_clip: decay on gains and matrices apart, cosine, betas (0.9, 0.98)."""
    network = a_clip()
    config = OptimizerConfig(lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    optimizer = build_optimizer(network, config)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    decays = {
        name: 0.0 if p.ndim < 2 or "position" in name else 0.2 for name, p in network.named_parameters()
    }
    rates = [2.5e-4, 5e-4] + [0.5 * (1 + math.cos(math.pi * e / 6)) * 5e-4 for e in range(6)]
    gradients: list[dict[str, torch.Tensor]] = []
    for step, wanted in enumerate(rates):
        now = lr_at(ScheduleConfig(warmup_steps=2), step, 8, 4, config.lr)
        assert now == pytest.approx(wanted, rel=1e-12)
        set_lr(optimizer, now)
        give_gradients(network, step)
        gradients.append({name: p.grad.clone() for name, p in network.named_parameters()})  # type: ignore[union-attr]
        optimizer.step()
    after = adamw_by_hand(before, gradients, rates, decays, (0.9, 0.98), 1e-6)
    for name, parameter in network.named_parameters():
        assert torch.allclose(parameter.double(), after[name], rtol=1e-6, atol=1e-7), name


def test_what_is_decayed() -> None:
    found = scales(a_blip(), OptimizerConfig(weight_decay=0.1))
    decayed = {name for name, (decay, _) in found.items() if decay}
    assert "vision.blocks.0.attn.qkv.weight" in decayed
    assert {"encoder.word.weight", "decoder.head.words.bias", "vision.embed.proj.weight"} & decayed == {
        "encoder.word.weight",
        "vision.embed.proj.weight",
    }
    assert not [name for name in decayed if name.endswith("bias") or "norm" in name or "position" in name]
    assert not {"temperature", "vision.embed.class_token", "vision.embed.position"} & decayed


def test_layers_decay_towards_the_pixels() -> None:
    for network, text in ((a_blip(), "encoder"), (a_clip(), "text")):
        found = {
            name: scale for name, (_, scale) in scales(network, OptimizerConfig(layer_decay=0.5)).items()
        }
        assert found["vision.embed.position"] == found["vision.embed.proj.weight"] == 0.5**4
        assert [found[f"vision.blocks.{i}.mlp.fc1.weight"] for i in range(3)] == [0.5**3, 0.5**2, 0.5]
        assert found["vision.norm_out.weight"] == found["image_projection.weight"] == 1.0
        assert found[f"{text}.word.weight"] == 0.5**3
        assert found[f"{text}.norm.weight"] == (0.5**3 if text == "encoder" else 1.0)
        assert found[f"{text}.blocks.1.attn.out.bias"] == 0.5


def test_parts_have_their_own_rates() -> None:
    config = OptimizerConfig(lr=1e-3, multipliers={"vision": 0.1, "vision.blocks.2": 0.5, "*.bias": 2.0})
    network = a_blip()
    found = scales(network, config)
    assert found["vision.embed.proj.weight"][1] == 0.1
    assert found["vision.blocks.2.attn.qkv.weight"][1] == 0.5
    assert found["vision.blocks.2.attn.qkv.bias"][1] == found["match_head.bias"][1] == 2.0
    assert found["match_head.weight"][1] == 1.0
    optimizer = build_optimizer(network, config)
    set_lr(optimizer, 1e-4)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-5, 5e-5, 1e-4, 2e-4}
    with pytest.raises(UsageError, match='"vison" fits no parameter; the parts are'):
        parameter_groups(network, OptimizerConfig(multipliers={"vison": 0.1}))


def test_a_network_beside_its_heads() -> None:
    network, heads = a_blip(), nn.ModuleDict({"classes": nn.Linear(8, 3)})
    both = nn.ModuleDict({"network": network, "heads": heads})
    config = OptimizerConfig(multipliers={"vision": 0.1, "classes": 3.0}, layer_decay=0.5)
    found = scales(both, config, frozen=["encoder"])
    assert found["network.vision.norm_out.weight"][1] == 0.1
    assert found["network.vision.embed.position"][1] == 0.1 * 0.5**4
    assert found["heads.classes.weight"][1] == 3.0
    assert not [name for name in found if name.startswith("network.encoder")]


def test_frozen_parts() -> None:
    network = a_blip()
    with pytest.raises(UsageError, match='frozen: "visual" fits no parameter'):
        freeze(network, ["visual"])
    # The decoder's feed-forward layers are the encoder's: frozen under either name.
    names = freeze(network, ["vision", "decoder.text.blocks.*.mlp.*"])
    assert "encoder.blocks.0.mlp.fc1.weight" in names
    assert {name for name, p in network.named_parameters() if not p.requires_grad} == set(names)
    optimizer = build_optimizer(network, OptimizerConfig(), frozen=["vision.embed"])
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    assert trained == {p for name, p in network.named_parameters() if name not in names}
    with pytest.raises(UsageError, match="nothing to train"):
        build_optimizer(network, OptimizerConfig(), frozen=["*"])


@given(
    st.sampled_from(["cosine", "linear", "constant", "blip"]),
    st.integers(0, 30),
    st.integers(1, 100),
    st.integers(1, 40),
    st.floats(0, 1),
)
@settings(max_examples=100, deadline=None)
def test_schedules(kind: Any, warmup: int, total: int, epoch: int, final: float) -> None:
    schedule, peak = ScheduleConfig(kind, warmup, final, start=1e-6, floor=1e-6), 1e-3
    rates = [lr_at(schedule, step, total, epoch, peak) for step in range(total + 5)]
    assert all(1e-6 <= value <= peak for value in rates)
    assert all(a >= b for a, b in pairwise(rates[warmup:]))
    if kind != "blip" or warmup < epoch:
        assert all(a <= b for a, b in pairwise(rates[:warmup]))
    if kind in ("cosine", "linear") and warmup < total:
        assert rates[total] == pytest.approx(max(final * peak, 1e-6))
        assert max(rates) == pytest.approx(peak)


def test_settings_are_plain_and_checked() -> None:
    for config in (OptimizerConfig(multipliers={"vision": 0.1}), ScheduleConfig("blip", 10)):
        assert type(config)(**json.loads(json.dumps(dataclasses.asdict(config)))) is not None
    for wrong in (
        {"lr": 0.0},
        {"lr": math.nan},
        {"betas": (0.9, 1.0)},
        {"layer_decay": 1.5},
        {"name": "sgd"},
    ):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            OptimizerConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="cosine, linear, constant, blip"):
        ScheduleConfig("step")  # type: ignore[arg-type]


@pytest.mark.parametrize(("value", "clamped"), [(0.6, 0.5), (0.0001, 0.001), (0.07, 0.07)])
def test_blips_temperature_is_clamped(value: float, clamped: float) -> None:
    network = a_blip()
    with torch.no_grad():
        network.temperature.fill_(value)
    clamp_parameters(network)
    assert network.temperature.item() == pytest.approx(clamped)


def test_clips_scale_is_clamped() -> None:
    network = a_clip()
    with torch.no_grad():
        network.logit_scale.fill_(7.0)
    clamp_parameters(network, {})
    assert network.logit_scale.item() == 7.0
    clamp_parameters(network)
    assert network.logit_scale.exp().item() == pytest.approx(100, rel=1e-5)


def test_a_teacher_of_a_part() -> None:
    student = a_blip()
    teacher = ema_copy(student.vision)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    drawn(student)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    update_ema(teacher, student.vision, 1.0)
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    update_ema(teacher, student.vision, 0.0)
    assert all(torch.equal(p, student.vision.get_parameter(name)) for name, p in teacher.named_parameters())


def test_averages_forget_the_start() -> None:
    momenta = [ema_decay(step, 0.999) for step in range(20_000)]
    assert momenta[0] == 0.1
    assert momenta[-1] == 0.999
    assert all(a <= b for a, b in pairwise(momenta))
