"""Official checkpoints made small: the publishers' own small files and tensor names, random weights, fewer channels.

The files are no part of this repository. They are looked for in the folder that SIGHTLOOP_OFFICIAL names, else in
`../shared/data/official` from the repository: a folder `OWNER--NAME` for each checkpoint with its config, processor and
tokenizer files, and `tensor_names/*.json` with names and shapes.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(
    os.environ.get("SIGHTLOOP_OFFICIAL")
    or Path(__file__).resolve().parents[3] / "shared" / "data" / "official"
)


def official_folder(name: str) -> Path:
    """The folder of one checkpoint, `OWNER--NAME`; skips where it is absent."""
    folder = FOLDER / name
    if not folder.is_dir():
        pytest.skip(
            f"needs the official files of {name}, and there is no {folder}; name their parent by SIGHTLOOP_OFFICIAL"
        )
    return folder


def tensor_shapes(name: str, architecture: str | None = None) -> dict[str, list[int]]:
    """Official tensor names and shapes of `tensor_names/NAME.json`."""
    path = FOLDER / "tensor_names" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"needs official tensor names, and there is no {path}")
    shapes = json.loads(path.read_text())
    return shapes[architecture] if architecture else shapes


def copy_files(name: str, target: Path, *extra: Path) -> Path:
    """The official small files in a folder that can be written."""
    target.mkdir()
    for path in [*official_folder(name).iterdir(), *extra]:
        if path.is_file():
            shutil.copyfile(path, target / path.name)
    return target


def change_config(folder: Path, changes: Mapping[str, Any]) -> None:
    """Replace settings of config.json; those of a nested dict one by one."""
    path = folder / "config.json"
    path.write_text(json.dumps(_merge(json.loads(path.read_text()), changes)))


def _merge(data: Any, changes: Mapping[str, Any]) -> Any:
    merged = dict(data or {})
    for key, value in changes.items():
        merged[key] = _merge(merged.get(key), value) if isinstance(value, Mapping) else value
    return merged


def write_weights(
    folder: Path,
    shapes: Mapping[str, list[int]],
    sizes: Mapping[int, int],
    *,
    layers: int,
    tied: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Write model.safetensors with small random tensors of the official names.

    Args:
        folder: of the checkpoint.
        shapes: official names and shapes.
        sizes: size of a dimension -> the smaller one, such as {768: 32}.
        layers: blocks that are kept of each tower.
        tied: name -> name of the tensor that it equals.
    """
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        index = re.search(r"\.(?:layers|layer|blocks|block|resblocks)\.(\d+)\.", name)
        if index and int(index[1]) >= layers:
            continue
        small = [sizes.get(size, size) for size in shape]
        if name.endswith("position_ids"):
            tensors[name] = torch.arange(small[-1])[None]
        elif not small:
            tensors[name] = torch.tensor(math.log(20.0))
        elif "orm" in name and name.endswith("weight"):
            tensors[name] = 1 + 0.1 * torch.randn(small, generator=generator)
        else:
            scale = 0.1 if len(small) == 1 else 0.5 if "embed" in name else 2.0 / math.prod(small[1:]) ** 0.5
            tensors[name] = scale * torch.randn(small, generator=generator)
    for name, owner in (tied or {}).items():
        if name in tensors:
            tensors[name] = tensors[owner].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors
