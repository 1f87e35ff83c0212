"""Towers as other code names them: sizes in the hub's config.json files, read and written; tensors of their blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sightloop.checkpoints.key_map import RenamedTensors, cat
from sightloop.towers.text import TextConfig
from sightloop.towers.vit import VitConfig
from sightloop.types import JsonDict, JsonMapping

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


def from_hf_config(data: JsonMapping, names: Mapping[str, str], defaults: JsonMapping) -> JsonDict:
    """The fields of a tower's config from a part of config.json; what it leaves out is the reference's default."""
    return {ours: data.get(foreign, defaults[ours]) for ours, foreign in names.items()}


def image_token_id(data: JsonMapping, default: int | None) -> Any:
    """The image placeholder's token id, which config.json has under either name; the first wins."""
    return data.get("image_token_id", data.get("image_token_index", default))


def to_hf_config(config: VitConfig | TextConfig, names: Mapping[str, str]) -> JsonDict:
    """The inverse of `sizes`."""
    return {foreign: getattr(config, ours) for ours, foreign in names.items()}


def transformers_block_keys(ours: str, foreign: str) -> JsonDict:
    """The blocks of a tower in the layout of CLIP's and SigLIP's models on the hub."""
    layer = f"{foreign}.encoder.layers.{{}}"
    return {
        f"{ours}.blocks.{{}}.attn.qkv": cat(*(f"{layer}.self_attn.{part}_proj" for part in "qkv")),
        f"{ours}.blocks.{{}}.attn.out": f"{layer}.self_attn.out_proj",
        f"{ours}.blocks.{{}}.norm1": f"{layer}.layer_norm1",
        f"{ours}.blocks.{{}}.norm2": f"{layer}.layer_norm2",
        f"{ours}.blocks.{{}}.mlp.fc1": f"{layer}.mlp.fc1",
        f"{ours}.blocks.{{}}.mlp.fc2": f"{layer}.mlp.fc2",
    }


def open_clip_block_keys(ours: str, foreign: str) -> JsonDict:
    """The blocks of a tower in open_clip's and OpenAI's layout; `foreign` ends in a dot, or is empty."""
    layer = f"{foreign}transformer.resblocks.{{}}"
    return {
        f"{ours}.blocks.{{}}.attn.qkv.weight": f"{layer}.attn.in_proj_weight",
        f"{ours}.blocks.{{}}.attn.qkv.bias": f"{layer}.attn.in_proj_bias",
        f"{ours}.blocks.{{}}.attn.out": f"{layer}.attn.out_proj",
        f"{ours}.blocks.{{}}.norm1": f"{layer}.ln_1",
        f"{ours}.blocks.{{}}.norm2": f"{layer}.ln_2",
        f"{ours}.blocks.{{}}.mlp.fc1": f"{layer}.mlp.c_fc",
        f"{ours}.blocks.{{}}.mlp.fc2": f"{layer}.mlp.c_proj",
    }


def canonical_names(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The names of a language model beside an image tower in all files of the hub, as `transformers` 5 writes them:
    "language_model.model", "language_model.lm_head", "vision_tower", "multi_modal_projector"."""
    return RenamedTensors(tensors, {_canonical_name(name): name for name in tensors})


def _canonical_name(name: str) -> str:
    name = name.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.", 1)
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    if name.startswith("language_model.") and not name.startswith(
        ("language_model.model.", "language_model.lm_head.")
    ):
        return name.replace("language_model.", "language_model.model.", 1)
    return name
