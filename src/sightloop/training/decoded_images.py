"""Images of a training run: decoded, and kept in memory where the recipe says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sightloop.data.images.decode import decode
from sightloop.data.images.preprocess import preprocess
from sightloop.errors import ImageError
from sightloop.training.features import FeatureStore
from sightloop.types import ImageSpec, Limits, Sample, Size


class DecodedImages:
    """Cache of decoded images and their sizes by index, shared by threads; with side 0 it stays empty.

    features: what is read instead of images, or None.
    """

    def __init__(self, side: int, features: Sequence[str]) -> None:
        self.side = side
        self.features = FeatureStore(features) if features else None
        self._images: dict[int, tuple[NDArray[np.uint8], Size]] = {}
        self._lock = threading.Lock()

    def get(
        self, index: int, make: Callable[[], tuple[NDArray[np.uint8], Size]]
    ) -> tuple[NDArray[np.uint8], Size]:
        """The image with an index, `[H, W, 3]` or `[3, H, W]`, and its (height, width): kept, or made now."""
        if (cached := self._images.get(index)) is not None:
            return cached
        decoded = make()
        if self.side:
            with self._lock:
                self._images[index] = decoded
        return decoded


def plain_image(sample: Sample, spec: ImageSpec) -> tuple[NDArray[np.uint8], Size]:
    """The preprocessed image, uint8 `[3, H, W]`, and its (height, width) before."""
    try:
        pixels = preprocess(_source(sample), spec, limits=Limits())
    except ImageError as error:
        raise ImageError(sample.key, error.reason) from None
    return pixels.values, pixels.size


def decoded_image(sample: Sample, side: int) -> tuple[NDArray[np.uint8], Size]:
    """uint8 `[H, W, 3]`, shorter edge at most `side` (0 for any); and its (height, width) before the resize."""
    try:
        image = decode(_source(sample), Limits())
    except ImageError as error:
        raise ImageError(sample.key, error.reason) from None
    size = image.height, image.width
    if side and min(size) > side:
        scale = side / min(size)
        shape = round(image.width * scale), round(image.height * scale)
        image = image.resize(shape, Image.Resampling.BICUBIC)
    return np.asarray(image), size


def _source(sample: Sample) -> bytes | str:
    return sample.image if isinstance(sample.image, bytes) else str(sample.image)
