"""Writing a loaded model to a folder: in our layout, or in the one that `transformers` reads."""

from __future__ import annotations

import dataclasses
import os
import shutil
from os import PathLike
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import nn

from sightloop.checkpoints.key_map import export_state_dict, native_state_dict
from sightloop.checkpoints.mask_decoder import MASK_DECODER_FILE, save_mask_decoder
from sightloop.checkpoints.registry import FAMILIES, key_map_of
from sightloop.checkpoints.tensors import write_safetensors
from sightloop.data.atomic import write_json
from sightloop.data.images.processor_config import spec_to_transformers
from sightloop.data.text.tokenizer import Tokenizer
from sightloop.errors import UsageError
from sightloop.inference.generation_config import generation_config
from sightloop.models.paligemma import MaskDecoder
from sightloop.nn.attention import Linear
from sightloop.nn.prepack import pack, unpack
from sightloop.nn.quantize import is_quantized
from sightloop.protocols import Network, PromptedNetwork, ScheduledNetwork, require
from sightloop.tasks.region_parser import IGNORED_PHRASES
from sightloop.types import ImageSpec, JsonMapping

FORMAT = "sightloop/1"


class Saveable(Protocol):
    """What is written of a model."""

    name: str
    network: Network
    family: str
    tokenizer: Tokenizer
    image_spec: ImageSpec
    device: torch.device
    dtype: torch.dtype
    decoding: JsonMapping
    masks: MaskDecoder | None

    @property
    def module(self) -> nn.Module: ...


def save(
    model: Saveable,
    folder: str | PathLike[str],
    *,
    layout: Literal["sightloop", "transformers"] = "sightloop",
) -> None:
    """Write a folder that `load` reads back bit for bit; with layout="transformers" one that `transformers` reads.

    A BLIP with both a caption head and a matching head becomes two folders there (`captioning`, `retrieval`), as no
    one model of `transformers` holds both. The folder must not exist yet, or be empty: UsageError otherwise. It
    appears whole or not at all.
    """
    if layout not in ("sightloop", "transformers"):
        raise UsageError(f'layout="{layout}": must be "sightloop" or "transformers"')
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{folder}: is there already; choose a new folder, or empty this one first")
    target.parent.mkdir(parents=True, exist_ok=True)
    if any(isinstance(module, Linear) and is_quantized(module) for module in model.module.modules()):
        raise UsageError(f"{model.name}: was loaded in few bits; load it without `quantize` to save it")
    if isinstance(model.network, ScheduledNetwork):  # its convolutions stay in oneDNN's layout
        raise UsageError(f"{model.name}: is not written again; copy the folder that it was loaded from")
    temporary = target.parent / f".sightloop-{target.name}-{os.getpid()}.tmp"
    unpack(model.module)
    try:
        if layout == "sightloop":
            _write_own(model, temporary)
        else:
            _write_transformers(model, temporary)
        if model.masks is not None:
            save_mask_decoder(model.masks, temporary / MASK_DECODER_FILE)
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if model.device.type == "cpu":
            pack(model.module)


def _write_own(model: Saveable, folder: Path) -> None:
    folder.mkdir()
    write_json(
        {
            "format": FORMAT,
            "family": model.family,
            "source": model.name,
            "config": dataclasses.asdict(model.network.config),
            "image": dataclasses.asdict(model.image_spec),
            "decoding": dict(model.decoding),
        },
        folder / "config.json",
    )
    model.tokenizer.save(folder)
    write_safetensors(native_state_dict(model.module), folder / "model.safetensors")


def _write_transformers(model: Saveable, folder: Path) -> None:
    family = FAMILIES[model.family]
    parts = family.to_transformers(model.network.config)  # UsageError for what it does not know
    tensors = export_state_dict(
        model.module, key_map_of(family.layouts["transformers"], model.network.config)
    )
    for name, (config, prefixes) in parts.items():
        part = folder / name if name else folder
        part.mkdir(parents=True)
        write_json({**config, "dtype": str(model.dtype).removeprefix("torch.")}, part / "config.json")
        if model.decoding and family.generation:
            end_id = require(model.network, PromptedNetwork).config.end_id
            write_json(generation_config(model.decoding, config, end_id), part / "generation_config.json")
        images = spec_to_transformers(model.image_spec, family.image_processor)
        size = model.image_spec.crop or model.image_spec.resize
        if family.processor is not None and size is not None:
            about, more = family.processor(model.network.config, size, sorted(IGNORED_PHRASES))
            images |= more
            write_json({**about, "image_processor": images}, part / "processor_config.json")
        write_json(images, part / "preprocessor_config.json")
        model.tokenizer.save(part)
        kept = {key: value for key, value in tensors.items() if key.startswith(prefixes)}
        write_safetensors(kept, part / "model.safetensors")
