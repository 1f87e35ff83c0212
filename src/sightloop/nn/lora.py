"""LoRA (Hu et al. 2021): linear layers y = W x + b learn y = W x + b + (alpha / rank) B A x, all else is frozen.

Adapters are held in PEFT's names and shapes, `base_model.model.NAME.lora_A.weight` `[rank, in]` and `.lora_B.weight`
`[out, rank]`, where NAME is the layer's name in our network. As our attention is fused, an adapter of `attn.qkv` has
one A for queries, keys and values, and a B of three times the width; PEFT's own, over three layers, cannot be read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from sightloop.errors import CheckpointError, UsageError
from sightloop.nn.attention import Linear
from sightloop.nn.prepack import unpack
from sightloop.types import JsonDict, JsonMapping

_PREFIX = "base_model.model."


class Lora(nn.Module):
    """What one layer adds: `[..., in]` -> `[..., out]`; zero until it has learned. Weights are float32."""

    def __init__(self, layer: Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        width_out, width_in = layer.weight.shape
        self.a = Linear(width_in, rank, bias=False)
        self.b = Linear(rank, width_out, bias=False)
        self.alpha, self.scale, self.dropout = alpha, alpha / rank, dropout
        self.to(layer.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        inside = nn.functional.dropout(x.to(self.a.weight.dtype), self.dropout, self.training)
        return (self.b(self.a(inside)) * self.scale).to(x.dtype)

    def product(self) -> Tensor:
        """What is added to the weight: float32 `[out, in]`."""
        return self.scale * (self.b.weight.detach() @ self.a.weight.detach())


def add_lora(
    network: nn.Module,
    patterns: Iterable[str],
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Give the linear layers that fit any pattern an adapter and freeze all else; the layers' names.

    patterns: shell patterns over layers' names (`*.attn.qkv`), or a part with all in it (`vision`). A layer that shares
    its matrix with another module (tied words), from which a merged one could not be told, is left out. A is drawn
    uniformly from +-1/sqrt(in), with `seed`; B is zero. UsageError: a pattern fits no layer, or none but tied ones; a
    layer has an adapter already.
    """
    if rank < 1:
        raise UsageError(f"rank={rank}: must be 1 or more")
    unpack(network)
    layers = _layers(network)
    owners = [id(p) for module in network.modules() for p in module.parameters(recurse=False)]
    chosen: dict[str, Linear] = {}
    for pattern in patterns:
        found = {names[0]: layer for layer, names in layers.items() if name_matches(names, pattern)}
        if not found:
            raise UsageError(
                f'lora: "{pattern}" fits no linear layer, such as {", ".join(_examples(layers))}'
            )
        free = {name: layer for name, layer in found.items() if owners.count(id(layer.weight)) == 1}
        if not free:
            raise UsageError(f"lora: {', '.join(found)} shares its matrix with another layer; choose others")
        chosen |= free
    for name, layer in chosen.items():
        if layer.lora is not None or layer.merged is not None:
            raise UsageError(f"lora: {name} has an adapter already")
        if layer.weight.is_meta:
            raise UsageError(f"lora: {name} has its weight in few bits; load the model without `quantize`")
    network.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in chosen.values():
        lora = Lora(layer, rank, alpha, dropout).train(layer.training)
        bound = layer.weight.shape[1] ** -0.5
        with torch.no_grad():
            drawn = torch.empty(lora.a.weight.shape).uniform_(-bound, bound, generator=generator)
            lora.a.weight.copy_(drawn)
            lora.b.weight.zero_()
        layer.lora = lora
    return [*chosen]


@torch.no_grad()
def merge_lora(network: nn.Module) -> None:
    """Add every adapter to its layer's weight: the same outputs, at no cost. Saving and packing see plain layers."""
    unpack(network)
    for layer in _layers(network):
        lora = layer.lora
        if isinstance(lora, Lora):
            layer.merged, layer.lora = (layer.weight.data, lora), None
            layer.weight.data = (layer.weight + lora.product()).to(layer.weight.dtype)


@torch.no_grad()
def unmerge(network: nn.Module) -> None:
    """Undo `merge`: the weights are those from before, bit for bit, and the adapters go on learning."""
    unpack(network)
    for layer in _layers(network):
        if layer.merged is not None:
            layer.weight.data, layer.lora = layer.merged
            layer.merged = None


def adapter_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Every adapter's A and B by their names in PEFT's `adapter_model.safetensors`."""
    return {
        f"{_PREFIX}{name}.lora_{part}.weight": matrix.weight.detach().contiguous()
        for name, lora in _adapters(network).items()
        for part, matrix in (("A", lora.a), ("B", lora.b))
    }


def adapter_config(network: nn.Module) -> JsonDict:
    """What PEFT's `adapter_config.json` says of the adapters. UsageError if there are none, or of several ranks."""
    adapters = _adapters(network)
    kinds = {(lora.a.weight.shape[0], lora.alpha, lora.dropout) for lora in adapters.values()}
    if len(kinds) != 1:
        raise UsageError(f"adapters of {len(kinds)} kinds: one file holds one rank and one alpha")
    ((rank, alpha, dropout),) = kinds
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": [*adapters],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def load_adapter(network: nn.Module, tensors: Mapping[str, Tensor], config: JsonMapping) -> list[str]:
    """Give a network the adapters of such tensors and such a config; the layers' names. All else is frozen.

    Raises CheckpointError if they do not fit each other or the network, or do more than this LoRA does.
    """
    more = [key for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or more:
        raise CheckpointError(f"the adapter is no plain LoRA: {', '.join(more) or config.get('peft_type')}")
    if absent := [key for key in ("r", "lora_alpha") if not isinstance(config.get(key), int | float)]:
        raise CheckpointError(f"the adapter's config does not say {', '.join(absent)}")
    parts = {name: re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_[AB]\.weight", name) for name in tensors}
    names = list(dict.fromkeys(found[1] for found in parts.values() if found))
    layers = {name: layer for layer, given in _layers(network).items() for name in given}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        if name in layers:
            width_out, width_in = layers[name].weight.shape
            shapes[f"{_PREFIX}{name}.lora_A.weight"] = (config["r"], width_in)
            shapes[f"{_PREFIX}{name}.lora_B.weight"] = (width_out, config["r"])
    wrong = [name for name, value in tensors.items() if shapes.get(name) != tuple(value.shape)]
    wrong += [name for name in shapes if name not in tensors]
    if wrong or not names:
        raise CheckpointError(
            f"the adapter does not fit the network: {', '.join(wrong[:6]) or 'it is empty'}"
        )
    add_lora(
        network, names, rank=config["r"], alpha=config["lora_alpha"], dropout=config.get("lora_dropout", 0.0)
    )
    with torch.no_grad():
        for name in names:
            lora = layers[name].lora
            assert isinstance(lora, Lora)
            lora.a.weight.copy_(tensors[f"{_PREFIX}{name}.lora_A.weight"])
            lora.b.weight.copy_(tensors[f"{_PREFIX}{name}.lora_B.weight"])
    return names


def name_matches(names: Iterable[str], pattern: str) -> bool:
    """Whether a pattern means what has these names: a shell pattern over a whole name, or a part with all in it."""
    return any(
        name == pattern or name.startswith(pattern + ".") or fnmatchcase(name, pattern) for name in names
    )


def _layers(network: nn.Module) -> dict[Linear, list[str]]:
    """Every linear layer but those of adapters, with all its names."""
    found: dict[Linear, list[str]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, Linear) and ".lora." not in f".{name}.":
            found.setdefault(module, []).append(name)
    return found


def _adapters(network: nn.Module) -> dict[str, Lora]:
    found: dict[str, Lora] = {}
    for layer, names in _layers(network).items():
        lora = layer.merged[1] if layer.merged is not None else layer.lora
        if isinstance(lora, Lora):
            found[names[0]] = lora
    return found


def _examples(layers: Mapping[Linear, list[str]]) -> list[str]:
    return sorted({re.sub(r"\.\d+\.", ".*.", names[0]) for names in layers.values()})[:4]
