"""What changes weights: parameter groups, rates over time, clamps of temperatures, teachers that follow.

A pattern names parameters: a shell pattern over the whole name (`*.attn.*`), or a part with all that is in it
(`vision`, `encoder.word`). A parameter that two modules share is named by either of its names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from sightloop.errors import UsageError
from sightloop.nn.lora import name_matches
from sightloop.towers.text import TextTower
from sightloop.training.config_parser import check_option
from sightloop.training.distributed import is_sharded
from sightloop.types import JsonDict

# Bounds of parameters, by the last part of their name. temperature: ITC divides by it (ALBEF's and BLIP's code).
# logit_scale: logits are multiplied by at most 100 (Radford et al. 2021, section 2.5), never by less than 1.
# SigLIP bounds nothing: its recipes pass {}.
CLAMPS: Mapping[str, tuple[float, float]] = {
    "temperature": (0.001, 0.5),
    "logit_scale": (0.0, math.log(100)),
}

# Tables that say where or what a token is, not what it is worth: decay would only pull them together.
_NEVER_DECAYED = {"position", "class_token", "mask_token", "probe"}
# What a tower applies before its first block; all else outside its blocks comes after the last.
_BEFORE_BLOCKS = {"embed", "norm_in", "word", "position"}


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019) and how it treats the parts of a network.

    lr: the peak rate. decay_on: "matrices" leaves biases, norms, class tokens, positions and temperatures without
    weight decay (CLIP, ViT); "all" decays everything, as BLIP's code does. layer_decay: a block's rate is the rate of
    the one above it times this (1.0: equal rates). clip_norm: the largest norm of the whole gradient, None for no
    limit. multipliers: pattern -> factor of the rate; the last pattern that fits a parameter counts.
    """

    name: Literal["adamw"] = "adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    decay_on: Literal["matrices", "all"] = "matrices"
    layer_decay: float = 1.0
    clip_norm: float | None = None
    multipliers: Mapping[str, float] = field(default_factory=dict[str, float])

    def __post_init__(self) -> None:
        check_option("name", self.name, self.name == "adamw", '"adamw"')
        check_option("lr", self.lr, self.lr > 0, "more than 0")
        check_option(
            "betas", self.betas, len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two in [0, 1)"
        )
        check_option("eps", self.eps, self.eps > 0, "more than 0")
        check_option("weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or more")
        check_option("decay_on", self.decay_on, self.decay_on in ("matrices", "all"), '"matrices" or "all"')
        check_option("layer_decay", self.layer_decay, 0 < self.layer_decay <= 1, "in (0, 1]")
        check_option(
            "clip_norm", self.clip_norm, self.clip_norm is None or self.clip_norm > 0, "more than 0, or None"
        )
        for pattern, factor in self.multipliers.items():
            check_option(f"multipliers[{pattern!r}]", factor, factor >= 0, "0 or more")


def freeze(network: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Parameters that fit any pattern get no gradient from now on; their names. UsageError: a pattern fits none."""
    frozen: dict[str, None] = {}
    named = _named(network)
    for pattern in patterns:
        fitting = [names for names in named if name_matches(names, pattern)]
        _check_matched("frozen", pattern, fitting, named)
        for names in fitting:
            network.get_parameter(names[0]).requires_grad_(False)
            frozen[names[0]] = None
    return [*frozen]


def parameter_groups(
    network: nn.Module, config: OptimizerConfig, frozen: Sequence[str] = ()
) -> list[JsonDict]:
    """Parameter groups of all that has a gradient, after `freeze(network, frozen)`; `scale` is each group's share of
    the rate. UsageError: nothing is left to train, or a pattern fits no parameter.
    """
    freeze(network, frozen)
    named = _named(network)
    for pattern in config.multipliers:
        _check_matched(
            "multipliers", pattern, [names for names in named if name_matches(names, pattern)], named
        )
    towers = _towers(network)
    # Sharded parameters in groups of their own: a kernel takes one kind at a time.
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for names in named:
        parameter = network.get_parameter(names[0])
        if parameter.requires_grad:
            decay = (
                config.weight_decay if config.decay_on == "all" or _is_decayed(names[0], parameter) else 0.0
            )
            scale = config.layer_decay ** _blocks_above(names[0], network, towers)
            factors = [
                factor for pattern, factor in config.multipliers.items() if name_matches(names, pattern)
            ]
            scale *= factors[-1] if factors else 1.0
            groups.setdefault((decay, scale, is_sharded(parameter)), []).append(parameter)
    if not groups:
        raise UsageError(
            "nothing to train: every parameter is frozen; network.requires_grad_(True) frees them"
        )
    return [
        {"params": parameters, "weight_decay": decay, "scale": scale, "lr": config.lr * scale}
        for (decay, scale, _), parameters in groups.items()
    ]


def build_optimizer(
    network: nn.Module, config: OptimizerConfig, frozen: Sequence[str] = ()
) -> torch.optim.Optimizer:
    """The optimizer over `groups`; one fused, deterministic kernel a group where torch has one for the device."""
    groups = parameter_groups(network, config, frozen)
    fused = all(
        p.is_floating_point() and p.device.type in ("cpu", "cuda") for g in groups for p in g["params"]
    )
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, value: float) -> None:
    """The rate of the next step: each group's `scale` times `value`."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["scale"]


@torch.no_grad()
def clamp_parameters(network: nn.Module, clamps: Mapping[str, tuple[float, float]] = CLAMPS) -> None:
    """Put parameters back into their bounds, in place: after every step, and once before the first."""
    for name, parameter in network.named_parameters():
        bounds = clamps.get(name.rpartition(".")[2])
        if bounds is not None and parameter.requires_grad:
            parameter.clamp_(*bounds)


def _named(network: nn.Module) -> list[tuple[str, ...]]:
    """Of every parameter all its names, in the order of `named_parameters()`.

    In a ModuleDict (a network and its heads for training) a name without the module's key is a name, too.
    """
    names: dict[Tensor, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        known = [name, name.partition(".")[2]] if isinstance(network, nn.ModuleDict) else [name]
        names.setdefault(parameter, []).extend(known)
    return [tuple(found) for found in names.values()]


def _check_matched(
    option: str, pattern: str, fitting: Sequence[object], named: Sequence[Sequence[str]]
) -> None:
    if not fitting:
        parts = sorted({name.partition(".")[0] for names in named for name in names})
        raise UsageError(
            f'{option}: "{pattern}" fits no parameter; the parts are {", ".join(parts)} (shell patterns over '
            "whole names work too)"
        )


def _is_decayed(name: str, parameter: Tensor) -> bool:
    return parameter.dim() > 1 and not _NEVER_DECAYED & set(name.split("."))


def _towers(network: nn.Module) -> dict[str, int]:
    """Every stack of blocks: the name of the module that holds it, with a dot, and how many blocks there are."""
    return {
        name.removesuffix("blocks"): len(module)
        for name, module in network.named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "blocks"
    }


def _blocks_above(name: str, network: nn.Module, towers: Mapping[str, int]) -> int:
    """How many levels lie between a parameter and the top of its tower, 0 outside of towers."""
    for tower, blocks in towers.items():
        if name.startswith(tower):
            rest = name.removeprefix(tower)
            if inside := re.match(r"blocks\.(\d+)\.", rest):
                return blocks - int(inside[1])
            first, module = rest.partition(".")[0], network.get_submodule(tower.removesuffix("."))
            # BERT norms its embeddings where the other towers norm what leaves the last block.
            of_embedding = first == "norm" and isinstance(module, TextTower) and module.config.post_norm
            return blocks + 1 if of_embedding or first in _BEFORE_BLOCKS else 0
    return 0
