"""Checkpoints of BLIP with another fusion: our own layout alone, as no other program has these networks."""

from __future__ import annotations

from typing import Any

from sightloop.checkpoints import blip
from sightloop.checkpoints.layout import Family
from sightloop.errors import UnsupportedError
from sightloop.models.fusion import FusionBlip, FusionConfig
from sightloop.types import JsonDict


def to_transformers(config: Any) -> dict[str, tuple[JsonDict, tuple[str, ...]]]:
    """Raises UnsupportedError: `transformers` has no such network."""
    raise UnsupportedError(
        f"transformers has no BLIP with fusion {config.fusion}; save it in our own layout instead, or train it with "
        "--set model.fusion=cross"
    )


FAMILY = Family(
    name="fusion",
    network=FusionBlip,
    config=FusionConfig,
    layouts={},
    tokenizer="bert",
    image_processor=blip.FAMILY.image_processor,
    to_transformers=to_transformers,
    default_image=blip.default_image,
)
