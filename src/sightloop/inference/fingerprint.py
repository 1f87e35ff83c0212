"""The identity of a model: a digest of its weights and of the files beside them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import torch

from sightloop.checkpoints.hub import locate
from sightloop.inference.model import Model

ModelSource: TypeAlias = "str | PathLike[str] | Model"


_BESIDE = (
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
    """32 hex digits: the start of the SHA-256 of a checkpoint's weights file (of those of several, where it is in
    parts), or of the weights of a loaded model."""
    digest = hashlib.sha256()
    if isinstance(source, Model):
        for name, module in source.network.named_modules():
            parts: Mapping[str, torch.Tensor] = dict(
                itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
            )
            for own, tensor in parts.items():
                if tensor.is_meta:  # its bytes are in the layout that the CPU multiplies fastest, or fewer
                    if module.packed is None:
                        continue  # and buffers of the layer's kernel
                    tensor = module.packed.to_dense().reshape(tensor.shape)
                digest.update(f"{name}.{own} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:32]
    found = [_digest(file) for file in locate(source).weights]
    return (found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest())[:32]


def preprocessing_digest(source: ModelSource) -> str:
    """16 hex digits: of what says how images and texts are prepared for the model."""
    if isinstance(source, Model):
        return hashlib.sha256(repr((source.image_spec, source.network.config)).encode()).hexdigest()[:16]
    folder = locate(source).folder
    found = [f"{name} {_digest(folder / name)}" for name in _BESIDE if (folder / name).is_file()]
    return hashlib.sha256("".join(found).encode()).hexdigest()[:16]


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
