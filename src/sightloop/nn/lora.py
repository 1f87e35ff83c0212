"""LoRA adapters (Hu et al. 2021): y = W x + b becomes y = W x + b + (alpha / rank) B A x; only A and B are trained.

Adapters are stored under PEFT's names and shapes, `base_model.model.NAME.lora_A.weight` `[rank, in]` and
`.lora_B.weight` `[out, rank]`, where NAME is the layer's name in our network. Our attention is fused: an adapter of
`attn.qkv` has one A for queries, keys and values and a B of three times the width. Adapters that PEFT trained over
three separate layers cannot be loaded.
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
    """Adapter of one layer, (alpha / rank) B A x in float32: `[..., in]` -> `[..., out]`. Zero before training."""

    def __init__(self, layer: Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        out_features, in_features = layer.weight.shape
        self.a = Linear(in_features, rank, bias=False)
        self.b = Linear(rank, out_features, bias=False)
        self.alpha, self.scale, self.dropout = alpha, alpha / rank, dropout
        self.to(layer.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        dropped = nn.functional.dropout(x.to(self.a.weight.dtype), self.dropout, self.training)
        return (self.b(self.a(dropped)) * self.scale).to(x.dtype)

    def weight_delta(self) -> Tensor:
        """(alpha / rank) B A, the change of the layer's weight: float32 `[out, in]`."""
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
    """Add an adapter to every linear layer that matches a pattern, and freeze all other parameters.

    A layer that shares its matrix with another module (tied embeddings) is skipped: merging would change both.

    Args:
        network: changed in place; packed weights are unpacked.
        patterns: shell patterns over layer names (`*.attn.qkv`), or the name of a submodule for all in it (`vision`).
        rank: of A and B.
        alpha: numerator of the adapter's scale.
        dropout: of the adapter's input, in training.
        seed: of A, which is uniform in +-1 / sqrt(in); B is zero.

    Returns:
        Names of the layers with a new adapter.

    Raises:
        UsageError: the rank is below 1; a pattern matches no layer, or only tied ones; a layer already has an
            adapter, or is quantized.
    """
    if rank < 1:
        raise UsageError(f"rank={rank}: must be 1 or more")
    unpack(network)
    layers = _linear_layers(network)
    owners = [id(p) for module in network.modules() for p in module.parameters(recurse=False)]
    chosen: dict[str, Linear] = {}
    for pattern in patterns:
        matches = {names[0]: layer for layer, names in layers.items() if name_matches(names, pattern)}
        if not matches:
            examples = ", ".join(_example_patterns(layers))
            raise UsageError(f'lora: "{pattern}" fits no linear layer, such as {examples}')
        untied = {name: layer for name, layer in matches.items() if owners.count(id(layer.weight)) == 1}
        if not untied:
            tied = ", ".join(matches)
            raise UsageError(f"lora: {tied} shares its matrix with another layer; choose others")
        chosen |= untied
    for name, layer in chosen.items():
        if layer.lora is not None or layer.merged:
            raise UsageError(f"lora: {name} has an adapter already")
        if layer.weight.is_meta:
            raise UsageError(f"lora: {name} is quantized; load the model without `quantize`")
    network.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in chosen.values():
        lora = Lora(layer, rank, alpha, dropout).train(layer.training)
        bound = layer.weight.shape[1] ** -0.5
        with torch.no_grad():
            values = torch.empty(lora.a.weight.shape).uniform_(-bound, bound, generator=generator)
            lora.a.weight.copy_(values)
            lora.b.weight.zero_()
        layer.lora = lora
    return [*chosen]


@torch.no_grad()
def merge_lora(network: nn.Module) -> None:
    """Add every adapter's product to its layer's weight: same outputs, plain layers for saving and packing.

    The adapters can still be saved (`adapter_tensors`).
    """
    unpack(network)
    for layer in _linear_layers(network):
        lora = layer.lora
        if isinstance(lora, Lora):
            layer.merged, layer.lora = (lora,), None
            layer.weight.data = (layer.weight + lora.weight_delta()).to(layer.weight.dtype)


def adapter_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Tensors of PEFT's `adapter_model.safetensors`: A `[rank, in]` and B `[out, rank]` of every adapter, by name."""
    return {
        f"{_PREFIX}{name}.lora_{part}.weight": matrix.weight.detach().contiguous()
        for name, lora in _adapters(network).items()
        for part, matrix in (("A", lora.a), ("B", lora.b))
    }


def adapter_config(network: nn.Module) -> JsonDict:
    """Content of PEFT's `adapter_config.json` for the network's adapters.

    Raises:
        UsageError: there are no adapters, or adapters of different rank, alpha or dropout.
    """
    adapters = _adapters(network)
    options = {(lora.a.weight.shape[0], lora.alpha, lora.dropout) for lora in adapters.values()}
    if len(options) != 1:
        raise UsageError(f"adapters of {len(options)} kinds: one file holds one rank and one alpha")
    ((rank, alpha, dropout),) = options
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
    """Add the adapters of a PEFT file to a network, and freeze all other parameters.

    Args:
        network: changed in place.
        tensors: A `[rank, in]` and B `[out, rank]` by name, as from `adapter_tensors`.
        config: as from `adapter_config`.

    Returns:
        Names of the layers with an adapter.

    Raises:
        CheckpointError: tensors, config and network do not fit together, or the adapter is not plain LoRA.
    """
    unsupported = [
        key for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if config.get(key)
    ]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unsupported:
        kind = ", ".join(unsupported) or config.get("peft_type")
        raise CheckpointError(f"the adapter is no plain LoRA: {kind}")
    if absent := [key for key in ("r", "lora_alpha") if not isinstance(config.get(key), int | float)]:
        raise CheckpointError(f"the adapter's config lacks {', '.join(absent)}")
    matches = [re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_[AB]\.weight", name) for name in tensors]
    names = list(dict.fromkeys(match[1] for match in matches if match))
    layers = {name: layer for layer, aliases in _linear_layers(network).items() for name in aliases}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        if name in layers:
            out_features, in_features = layers[name].weight.shape
            shapes[f"{_PREFIX}{name}.lora_A.weight"] = (config["r"], in_features)
            shapes[f"{_PREFIX}{name}.lora_B.weight"] = (out_features, config["r"])
    misfits = [name for name, value in tensors.items() if shapes.get(name) != tuple(value.shape)]
    misfits += [name for name in shapes if name not in tensors]
    if misfits or not names:
        raise CheckpointError(
            f"the adapter does not fit the network: {', '.join(misfits[:6]) or 'it is empty'}"
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
    """Whether a pattern matches one of a module's names: as a shell pattern, or as a prefix that ends at a dot."""
    return any(
        name == pattern or name.startswith(pattern + ".") or fnmatchcase(name, pattern) for name in names
    )


def _linear_layers(network: nn.Module) -> dict[Linear, list[str]]:
    """Every linear layer outside of adapters, with all its names (a shared module has several)."""
    names_of: dict[Linear, list[str]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, Linear) and ".lora." not in f".{name}.":
            names_of.setdefault(module, []).append(name)
    return names_of


def _adapters(network: nn.Module) -> dict[str, Lora]:
    """Every adapter, merged or not, by the first name of its layer."""
    adapters: dict[str, Lora] = {}
    for layer, names in _linear_layers(network).items():
        lora = layer.merged[0] if layer.merged else layer.lora
        if isinstance(lora, Lora):
            adapters[names[0]] = lora
    return adapters


def _example_patterns(layers: Mapping[Linear, list[str]]) -> list[str]:
    return sorted({re.sub(r"\.\d+\.", ".*.", names[0]) for names in layers.values()})[:4]
