"""Sizes of towers as the hub's config.json files name them (`transformers`), read and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sightread.towers.text import TextConfig
from sightread.towers.vit import VitConfig

_TOWER = {
    "dim": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "activation": "hidden_act",
    "eps": "layer_norm_eps",
}
# Our field -> their name.
VISION = {"image_size": "image_size", "patch": "patch_size", **_TOWER}
TEXT = {"vocab": "vocab_size", "positions": "max_position_embeddings", **_TOWER}


def sizes(data: Mapping[str, Any], names: Mapping[str, str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a tower's config from a part of config.json; what it leaves out is the reference's default."""
    return {ours: data.get(theirs, defaults[ours]) for ours, theirs in names.items()}


def described(config: VitConfig | TextConfig, names: Mapping[str, str]) -> dict[str, Any]:
    """The inverse of `sizes`."""
    return {theirs: getattr(config, ours) for ours, theirs in names.items()}
