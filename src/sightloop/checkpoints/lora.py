"""LoRA adapters as files: the folder that PEFT writes, with our layers' names."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from sightloop.checkpoints.tensors import read_tensors, write_safetensors
from sightloop.data.atomic import write_json
from sightloop.errors import CheckpointError
from sightloop.nn.lora import adapter_config, adapter_tensors, load_adapter

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"


def save_lora(network: nn.Module, folder: str | PathLike[str]) -> None:
    """Write the adapters of a network, merged or not, into a folder, which is made where it is absent.

    UsageError if there are none, or of several kinds.
    """
    config, target = adapter_config(network), Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    write_safetensors(adapter_tensors(network), target / _TENSORS)
    write_json(config, target / _CONFIG)


def load_lora(network: nn.Module, folder: str | PathLike[str]) -> list[str]:
    """Give a network the adapters of a folder; the layers' names. All else is frozen; `nn.lora.merge` makes it plain.

    CheckpointError: files are absent or damaged, or do not fit the network.
    """
    source = Path(folder)
    try:
        config: Any = json.loads((source / _CONFIG).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source / _CONFIG}: cannot be read ({error}); a LoRA folder has one"
        ) from error
    if not isinstance(config, dict) or not (source / _TENSORS).is_file():
        raise CheckpointError(f"{source}: needs {_CONFIG} with an object, and {_TENSORS}")
    try:
        return load_adapter(network, read_tensors([source / _TENSORS]), config)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
