"""AdamW with parameter groups, freezing, and clamps of parameters.

A pattern selects parameters: a shell pattern over the full name (`*.attn.*`), or a module with all of its parameters
(`vision`, `encoder.word`). A tied parameter is selected by any of its names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sightloop.errors import UsageError
from sightloop.nn.lora import name_matches
from sightloop.towers.text import TextTower
from sightloop.training.distributed import is_sharded
from sightloop.training.optimizer_config import OptimizerConfig
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
