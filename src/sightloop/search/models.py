"""Models of an index: their identity, checked by what they compute, and their vectors."""

from __future__ import annotations

import numpy as np

from sightloop.errors import SightloopError, UsageError
from sightloop.inference.fingerprint import fingerprint
from sightloop.inference.model import Model
from sightloop.search.store import VectorDtype, VectorSpace

# Rounding in bfloat16 leaves the cosine of two equal models above this; another checkpoint does not come near.
_SAME_PROBE = 0.999
_PROBE_TEXT = "a photo of a red square on a blue ground"


def space_of(model: Model, column: str, dtype: VectorDtype) -> VectorSpace:
    """The vector space of a model, with what it makes of the probe.

    Raises:
        UnsupportedError: the model cannot embed.
    """
    image = model.embed_images([_probe_image()])
    queries = image.shape[1] if image.ndim == 3 else 1
    try:
        identity = fingerprint(model.name)
    except (SightloopError, OSError):  # made in memory, or its files are gone
        identity = fingerprint(model)
    return VectorSpace(column, model.name, identity, image.shape[-1], queries, dtype, _probe(model))


def check_model(model: Model, space: VectorSpace, index: str) -> None:
    """Raises UsageError, with both names, if a model is not the one whose vectors a space holds."""
    if not space.probe:
        raise UsageError(
            f"{index}: its vectors came from outside, so {model.name} cannot be checked against them; search by vector"
        )
    probe, own = np.array(space.probe), np.array(_probe(model))
    if len(probe) != len(own) or _cosine(probe, own) < _SAME_PROBE:
        raise UsageError(
            f"{index}: its vectors are of {space.model} (fingerprint {space.fingerprint[:12]}), which {model.name} is "
            "not; name that model, or add the vectors of this one with --add-model"
        )


def _probe(model: Model) -> tuple[float, ...]:
    image = model.embed_images([_probe_image()]).reshape(-1)
    text = model.embed_texts(_PROBE_TEXT).reshape(-1)
    # Four digits: enough to tell models apart, and short in the file.
    return tuple(round(float(value), 4) for value in (*image[:512], *text[:512]))


def _probe_image() -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    """uint8 `[96, 128, 3]`: a red square on a blue gradient."""
    image = np.zeros((96, 128, 3), np.uint8)
    image[:, :, 2] = np.linspace(60, 255, 128).astype(np.uint8)
    image[:, :, 1] = np.linspace(0, 120, 96).astype(np.uint8)[:, None]
    image[24:72, 40:88] = (220, 30, 20)
    return image


def _cosine(
    a: np.ndarray[tuple[int], np.dtype[np.float64]], b: np.ndarray[tuple[int], np.dtype[np.float64]]
) -> float:
    return float(a @ b / max(1e-12, float(np.linalg.norm(a) * np.linalg.norm(b))))
