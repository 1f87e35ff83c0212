"""Checkpoints of CLIP with a ResNet: the layout of open_clip and OpenAI, as data. Their configs are read in `clip`."""

from __future__ import annotations

from sightloop.checkpoints.clip import (
    IGNORED,
    OPEN_CLIP_TEXT_KEYS,
    config_from_open_clip,
    default_image,
    strip_text_prefix,
)
from sightloop.checkpoints.key_map import KeyMap, cat
from sightloop.checkpoints.layout import Family, Layout
from sightloop.errors import UnsupportedError
from sightloop.models.clip import Clip, ClipConfig
from sightloop.towers.resnet import ResnetConfig
from sightloop.types import JsonDict


def to_transformers(config: ClipConfig) -> dict[str, tuple[JsonDict, tuple[str, ...]]]:
    """Raises UnsupportedError: there is no such model."""
    raise UnsupportedError("transformers has no CLIP with a ResNet; save it in our own layout")


def _resnet_keys() -> JsonDict:
    """The ResNets of open_clip and OpenAI."""
    keys: JsonDict = {
        "vision.position": "visual.attnpool.positional_embedding",
        "vision.pool.q": "visual.attnpool.q_proj",
        "vision.pool.kv": cat("visual.attnpool.k_proj", "visual.attnpool.v_proj"),
        "vision.pool.out": "visual.attnpool.c_proj",
    }
    parts = {"first": 1, "second": 2, "third": 3}
    for number in parts.values():
        keys[f"vision.stem{number}.conv"] = f"visual.conv{number}"
        keys[f"vision.stem{number}.norm"] = f"visual.bn{number}"
    for stage in range(1, 5):
        ours, foreign = f"vision.stage{stage}.{{}}", f"visual.layer{stage}.{{}}"
        keys |= {
            f"{ours}.shortcut.conv": f"{foreign}.downsample.0",
            f"{ours}.shortcut.norm": f"{foreign}.downsample.1",
        }
        for part, number in parts.items():
            keys[f"{ours}.{part}.conv"] = f"{foreign}.conv{number}"
            keys[f"{ours}.{part}.norm"] = f"{foreign}.bn{number}"
    return keys


KEYS: KeyMap = {**OPEN_CLIP_TEXT_KEYS, **_resnet_keys()}

FAMILY = Family(
    name="clip_resnet",
    network=Clip,
    config=ClipConfig,
    towers={"vision": ResnetConfig},
    layouts={
        "open_clip": Layout(
            keys=KEYS,
            ignored=IGNORED,
            prepare=strip_text_prefix,
            markers=("visual.attnpool.c_proj.weight",),
            configure=config_from_open_clip,
        ),
    },
    tokenizer="clip",
    image_processor="CLIPImageProcessor",
    to_transformers=to_transformers,
    default_image=default_image,
)
