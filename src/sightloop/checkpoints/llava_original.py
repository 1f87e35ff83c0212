"""LLaVA's checkpoints in the layout of its original code (liuhaotian/llava-v1.5-7b, 1.6), as those of the hub's layout.

config.json names the image tower (`mm_vision_tower`), whose weights 1.5 leaves out: they are read from a folder of that
name inside the checkpoint's folder or beside it, or from the hub. 1.6 holds a tower of its own.
https://github.com/haotian-liu/LLaVA
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sightloop.checkpoints.hub import CheckpointFiles, locate, read_json
from sightloop.checkpoints.key_map import RenamedTensors
from sightloop.checkpoints.tensors import read_tensors
from sightloop.errors import CheckpointError
from sightloop.types import JsonDict, JsonMapping

_PROJECTOR = "model.mm_projector."
_OWN_TOWER = "model.vision_tower.vision_tower."
_NAMES = {
    "model.mm_projector.0.": "multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "multi_modal_projector.linear_2.",
    "model.image_newline": "image_newline",
    _OWN_TOWER: "vision_tower.",
    "model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
# Setting -> the only values that are supported; absent is the first.
_SUPPORTED: dict[str, tuple[object, ...]] = {
    "mm_projector_type": ("linear", "mlp2x_gelu"),
    "mm_use_im_start_end": (False, None),
    "mm_resampler_type": (None,),
    "mm_vision_select_feature": ("patch", "cls_patch"),
}


class _JoinedTensors(Mapping[str, Tensor]):
    """The tensors of two checkpoints, which have no name in common; each is still read when it is asked for."""

    def __init__(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
        self._first, self._second = first, second

    def __getitem__(self, name: str) -> Tensor:
        return self._first[name] if name in self._first else self._second[name]

    def __contains__(self, name: object) -> bool:
        return name in self._first or name in self._second

    def __iter__(self) -> Iterator[str]:
        yield from self._first
        yield from self._second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)


def is_original(config: JsonMapping, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint is one of LLaVA's original code."""
    return isinstance(config.get("mm_vision_tower"), str) and any(
        name.startswith(_PROJECTOR) for name in tensors
    )


def as_hub_layout(
    located: CheckpointFiles, config: JsonMapping, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[JsonDict, Mapping[str, Tensor]]:
    """The config and the tensors, the image tower's included, as the hub has them for the same model.

    Args:
        located: the checkpoint's files.
        config: its config.json.
        tensors: its tensors.
        dtype: that the tower's tensors are read as.

    Returns:
        The config, with the settings of its image processor as `image_processor`, and the tensors.

    Raises:
        CheckpointError: another projector, or an image tower that is not there.
    """
    for name, allowed in _SUPPORTED.items():
        value = config.get(name, allowed[0])
        if value not in allowed or (name == "mm_projector_type" and value != "mlp2x_gelu"):
            raise CheckpointError(f"{located.name}: config.json: {name}={value!r} is not supported")
    tower = _find_tower(located, str(config["mm_vision_tower"]))
    renamed = RenamedTensors(tensors, {_hub_name(name): name for name in tensors})
    joined: Mapping[str, Tensor] = renamed
    if not any(name.startswith(_OWN_TOWER) for name in tensors):
        joined = _JoinedTensors(renamed, _vision_tensors(read_tensors(tower.weights, dtype)))
    return _hub_config(located.name, config, tower), joined


def _hub_name(name: str) -> str:
    for original, hub in _NAMES.items():
        if name.startswith(original):
            return hub + name.removeprefix(original)
    return name


def _vision_tensors(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The image tower of a CLIP, under the hub's names in a LLaVA."""
    names = {f"vision_tower.{name}": name for name in tensors if name.startswith("vision_model.")}
    return RenamedTensors(tensors, names)


def _find_tower(located: CheckpointFiles, tower: str) -> CheckpointFiles:
    """The files of the image tower: of a folder in the checkpoint's or beside it, or of the hub."""
    name = Path(tower.replace("\\", "/")).name
    for folder in (located.folder / name, located.folder.parent / name):
        if name and folder.is_dir():
            return locate(folder)
    try:
        if not _HUB_ID.fullmatch(tower):
            raise CheckpointError(f"there is no folder {name} beside it")
        return locate(tower)
    except CheckpointError as error:
        raise CheckpointError(
            f"{located.name}: its image tower {tower} (mm_vision_tower) is not on this machine; put that checkpoint's "
            f"folder beside it as {name!r}, or load the same weights with it from the hub, such as "
            f"llava-hf/llava-1.5-7b-hf ({error})"
        ) from error


def _hub_config(name: str, config: JsonMapping, tower: CheckpointFiles) -> JsonDict:
    whole = tower.config or {}
    vision = whole.get("vision_config") or whole
    if not isinstance(vision, dict) or not vision:
        raise CheckpointError(
            f"{name}: the config.json of its image tower ({tower.name}) has no settings of a tower"
        )
    if whole.get("model_type") not in ("clip", "clip_vision_model"):
        raise CheckpointError(
            f"{name}: its image tower is of the type {whole.get('model_type')!r}; only CLIP's are supported"
        )
    kind = "mistral" if "mistral" in str(config.get("model_type")) else "llama"
    is_tiled = config.get("image_aspect_ratio") == "anyres"
    if is_tiled and config.get("mm_patch_merge_type") != "spatial_unpad":
        raise CheckpointError(
            f"{name}: config.json: mm_patch_merge_type={config.get('mm_patch_merge_type')!r} is not supported"
        )
    hub: JsonDict = {
        "model_type": "llava_next" if is_tiled else "llava",
        "vision_config": {**vision, "model_type": "clip_vision_model"},
        "text_config": {**config, "model_type": kind},
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "full"
        if config.get("mm_vision_select_feature") == "cls_patch"
        else "default",
        # The token of an image, which the original code has no id for: the first after the vocabulary.
        "image_token_index": config.get("vocab_size", 32_000),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
    }
    if is_tiled:
        hub["image_grid_pinpoints"] = config.get("image_grid_pinpoints")
    return hub | {"image_processor": _image_processor(config, tower, vision.get("image_size", 224))}


def _image_processor(config: JsonMapping, tower: CheckpointFiles, side: int) -> JsonDict:
    """Settings of the image processor: those of the tower, and how LLaVA brings an image to a square."""
    file = tower.folder / "preprocessor_config.json"
    settings = read_json(file) if file.is_file() else {"size": {"shortest_edge": side}, "crop_size": side}
    settings = {key: value for key, value in settings.items() if not key.endswith("_type")}
    shape = config.get("image_aspect_ratio")
    if shape == "anyres":
        grids = {"image_grid_pinpoints": config.get("image_grid_pinpoints")}
        return settings | {"image_processor_type": "LlavaNextImageProcessor"} | grids
    return settings | {"image_processor_type": "LlavaImageProcessor", "do_pad": shape == "pad"}
