"""Checkpoints of the painter: our own layout alone."""

from __future__ import annotations

from typing import Any

from sightloop.checkpoints.layout import Family
from sightloop.errors import UsageError
from sightloop.models.painter import Painter, PainterConfig
from sightloop.types import JsonDict


def to_transformers(config: Any) -> dict[str, tuple[JsonDict, tuple[str, ...]]]:
    """Raises UsageError: `transformers` has no such model."""
    raise UsageError('layout="transformers": it has no such model as the painter; leave layout out')


def default_image(config: Any) -> JsonDict:
    """Squares, pixels from -1 to 1."""
    side, half = config.vision.image_size, [0.5] * 3
    return {"size": {"height": side, "width": side}, "resample": 3, "image_mean": half, "image_std": half}


FAMILY = Family(
    name="painter",
    network=Painter,
    config=PainterConfig,
    layouts={},
    tokenizer="bert",
    image_processor="BlipImageProcessor",
    to_transformers=to_transformers,
    default_image=default_image,
)
