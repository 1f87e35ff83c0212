"""AdamW with parameter groups, freezing, and clamps of parameters.

A pattern selects parameters: a shell pattern over the full name (`*.attn.*`), or a module with all of its parameters
(`vision`, `encoder.word`). A tied parameter is selected by any of its names.
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
# SigLIP has no bounds: its recipes pass {}.
CLAMPS: Mapping[str, tuple[float, float]] = {
    "temperature": (0.001, 0.5),
    "logit_scale": (0.0, math.log(100)),
}

# Tables of positions and special tokens: decay would only pull their rows together.
_NEVER_DECAYED = {"position", "class_token", "mask_token", "probe"}
# Modules before a tower's first block; other modules outside its blocks follow the last one.
_BEFORE_BLOCKS = {"embed", "norm_in", "word", "position"}


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019).

    Args:
        name: "adamw".
        lr: peak learning rate, above 0.
        betas: decay of the first and second moments, in [0, 1).
        eps: added to the root of the second moment, above 0.
        weight_decay: decoupled, at least 0.
        decay_on: "matrices": no decay on biases, norms, class tokens, positions and temperatures (CLIP, ViT); "all":
            decay on all parameters, as in BLIP's code.
        layer_decay: learning rate of a block relative to the one above it, in (0, 1].
        clip_norm: largest norm of the gradient of all parameters, above 0; None for no limit.
        multipliers: pattern -> factor of the learning rate, at least 0; the last pattern that matches counts.
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
    """Freezes the parameters that match any pattern, in place.

    Returns:
        Their names.

    Raises:
        UsageError: a pattern matches no parameter.
    """
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
    """Parameter groups of AdamW: parameters of equal weight decay and learning rate.

    Args:
        network: in training.
        config: weight decay, layer decay, multipliers.
        frozen: patterns of parameters to freeze first.

    Returns:
        "params", "weight_decay", "lr" and "scale", the learning rate relative to the peak, of each group.

    Raises:
        UsageError: all parameters are frozen, or a pattern matches none.
    """
    freeze(network, frozen)
    named = _named(network)
    for pattern in config.multipliers:
        _check_matched(
            "multipliers", pattern, [names for names in named if name_matches(names, pattern)], named
        )
    towers = _towers(network)
    # Sharded parameters in separate groups: a fused kernel takes one kind. (decay, scale, sharded) -> parameters
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
            "nothing to train: every parameter is frozen; unfreeze some with network.requires_grad_(True)"
        )
    return [
        {"params": parameters, "weight_decay": decay, "scale": scale, "lr": config.lr * scale}
        for (decay, scale, _), parameters in groups.items()
    ]


def build_optimizer(
    network: nn.Module, config: OptimizerConfig, frozen: Sequence[str] = ()
) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`, with torch's fused kernel (deterministic) if the device has one."""
    groups = parameter_groups(network, config, frozen)
    fused = all(
        p.is_floating_point() and p.device.type in ("cpu", "cuda") for g in groups for p in g["params"]
    )
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets the learning rate of each group to its `scale` times `value`."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["scale"]


@torch.no_grad()
def clamp_parameters(network: nn.Module, clamps: Mapping[str, tuple[float, float]] = CLAMPS) -> None:
    """Clamps parameters to bounds, in place.

    Args:
        network: in training.
        clamps: last part of a name -> (least, greatest) value.
    """
    for name, parameter in network.named_parameters():
        bounds = clamps.get(name.rpartition(".")[2])
        if bounds is not None and parameter.requires_grad:
            parameter.clamp_(*bounds)


def _named(network: nn.Module) -> list[tuple[str, ...]]:
    """All names of each parameter, in the order of `named_parameters()`.

    In a ModuleDict (a network and its heads) names without the module's key are names, too.
    """
    names: dict[Tensor, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        known = [name, name.partition(".")[2]] if isinstance(network, nn.ModuleDict) else [name]
        names.setdefault(parameter, []).extend(known)
    return [tuple(known) for known in names.values()]


def _check_matched(
    option: str, pattern: str, fitting: Sequence[object], named: Sequence[Sequence[str]]
) -> None:
    if not fitting:
        parts = sorted({name.partition(".")[0] for names in named for name in names})
        raise UsageError(
            f'{option}: "{pattern}" fits no parameter; the parts are {", ".join(parts)} (shell patterns over '
            "full names work too)"
        )


def _is_decayed(name: str, parameter: Tensor) -> bool:
    return parameter.dim() > 1 and not _NEVER_DECAYED & set(name.split("."))


def _towers(network: nn.Module) -> dict[str, int]:
    """Prefix of the tower's names, with a dot -> number of its blocks."""
    return {
        name.removesuffix("blocks"): len(module)
        for name, module in network.named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "blocks"
    }


def _blocks_above(name: str, network: nn.Module, towers: Mapping[str, int]) -> int:
    """Levels between a parameter and the top of its tower: 0 after the blocks and outside towers, 1 in the last one."""
    for tower, blocks in towers.items():
        if name.startswith(tower):
            rest = name.removeprefix(tower)
            if inside := re.match(r"blocks\.(\d+)\.", rest):
                return blocks - int(inside[1])
            first, module = rest.partition(".")[0], network.get_submodule(tower.removesuffix("."))
            # BERT's norm follows its embeddings; that of other towers follows the last block.
            of_embedding = first == "norm" and isinstance(module, TextTower) and module.config.post_norm
            return blocks + 1 if of_embedding or first in _BEFORE_BLOCKS else 0
    return 0
