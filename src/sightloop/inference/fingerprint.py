"""Identity of a model: digests of its weights and of its small files. Imports torch for loaded models only."""

from __future__ import annotations

import hashlib
import itertools
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from sightloop.checkpoints.catalog import BUNDLED
from sightloop.checkpoints.hub import locate

if TYPE_CHECKING:
    from torch import nn

    from sightloop.inference.model import Model

ModelSource: TypeAlias = "str | PathLike[str] | Model"


# What decides how a checkpoint prepares its inputs.
_SMALL_FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "open_clip_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


def fingerprint(source: ModelSource) -> str:
    """Identity of a model's weights: 32 hex digits.

    The start of the SHA-256 of a checkpoint's weights file (of the digests of several files), or of the weights of a
    loaded model.
    """
    if not isinstance(source, str | PathLike):
        return _weights_digest(source.module)
    digests = [_digest(file) for file in locate(source).weights]
    whole = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return whole[:32]


def model_folder(source: ModelSource) -> Path | None:
    """The folder of a checkpoint on this machine, also of a loaded one; None if it is not known."""
    if isinstance(source, str | PathLike):
        return locate(source).folder
    is_here = source.name == BUNDLED or Path(source.name).is_dir()
    return locate(source.name).folder if is_here else None


def _weights_digest(network: nn.Module) -> str:
    import torch

    from sightloop.nn.attention import Linear

    digest = hashlib.sha256()
    for name, module in network.named_modules():
        tensors = itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for own_name, tensor in tensors:
            if tensor.is_meta:  # its values are in a layout that the CPU multiplies fastest, or in few bits
                if not isinstance(module, Linear) or module.packed is None:
                    continue
                tensor = module.packed.to_dense().reshape(tensor.shape)
            digest.update(f"{name}.{own_name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def preprocessing_digest(source: ModelSource) -> str:
    """Identity of how images and texts are prepared for a model: 16 hex digits."""
    if not isinstance(source, str | PathLike):
        return hashlib.sha256(repr((source.image_spec, source.network.config)).encode()).hexdigest()[:16]
    folder = locate(source).folder
    digests = [f"{name} {_digest(folder / name)}" for name in _SMALL_FILES if (folder / name).is_file()]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
