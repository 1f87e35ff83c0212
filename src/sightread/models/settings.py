"""Towers as other code names them: sizes in the hub's config.json files, read and written; tensors of their blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sightread.models.weights import cat
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


def transformers_tower(ours: str, theirs: str) -> dict[str, Any]:
    """The blocks of a tower in the layout of CLIP's and SigLIP's models on the hub."""
    layer = f"{theirs}.encoder.layers.{{}}"
    return {
        f"{ours}.blocks.{{}}.attn.qkv": cat(*(f"{layer}.self_attn.{part}_proj" for part in "qkv")),
        f"{ours}.blocks.{{}}.attn.out": f"{layer}.self_attn.out_proj",
        f"{ours}.blocks.{{}}.norm1": f"{layer}.layer_norm1",
        f"{ours}.blocks.{{}}.norm2": f"{layer}.layer_norm2",
        f"{ours}.blocks.{{}}.mlp.fc1": f"{layer}.mlp.fc1",
        f"{ours}.blocks.{{}}.mlp.fc2": f"{layer}.mlp.fc2",
    }


def open_clip_tower(ours: str, theirs: str) -> dict[str, Any]:
    """The blocks of a tower in open_clip's and OpenAI's layout; `theirs` ends in a dot, or is empty."""
    layer = f"{theirs}transformer.resblocks.{{}}"
    return {
        f"{ours}.blocks.{{}}.attn.qkv.weight": f"{layer}.attn.in_proj_weight",
        f"{ours}.blocks.{{}}.attn.qkv.bias": f"{layer}.attn.in_proj_bias",
        f"{ours}.blocks.{{}}.attn.out": f"{layer}.attn.out_proj",
        f"{ours}.blocks.{{}}.norm1": f"{layer}.ln_1",
        f"{ours}.blocks.{{}}.norm2": f"{layer}.ln_2",
        f"{ours}.blocks.{{}}.mlp.fc1": f"{layer}.mlp.c_fc",
        f"{ours}.blocks.{{}}.mlp.fc2": f"{layer}.mlp.c_proj",
    }
