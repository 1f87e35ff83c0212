"""Thumbnails: small JPEGs of the folder's images, decoded in bounded child processes and cached in memory."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict

from sightloop.apps.server.limits import IMAGE_LIMITS
from sightloop.data.images.preprocess import encode_thumbnail
from sightloop.data.images.reader import ImagePool
from sightloop.errors import ImageError
from sightloop.types import ImageSpec, Pixels

SIZES = (96, 256, 640)
"""Sides in pixels: the first two are squares cut from the middle, of the last the shorter side is at most that."""
_SQUARE, _WHOLE = 256, 640
_CACHE_BYTES = 128 << 20


class Thumbnails:
    """Maker of thumbnails.

    Args:
        workers: processes that decode.
    """

    def __init__(self, workers: int) -> None:
        def pool(spec: ImageSpec) -> ImagePool:
            return ImagePool(spec, limits=IMAGE_LIMITS, workers=workers)

        self._square = pool(
            ImageSpec(shortest_edge=_SQUARE, crop=(_SQUARE, _SQUARE), interpolation="bilinear")
        )
        self._whole = pool(ImageSpec(shortest_edge=_WHOLE, interpolation="bilinear"))
        self._cache: OrderedDict[tuple[str, int, int], bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def cached(self, key: tuple[str, int, int]) -> bytes | None:
        """A thumbnail that was made before. key: image id, size, modification time of the file."""
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
            return self._cache.get(key)

    async def make(self, data: bytes, key: tuple[str, int, int]) -> bytes:
        """A thumbnail of an encoded image, as JPEG.

        Raises:
            ImageError: the image cannot be read.
        """
        size = key[1]
        pool = self._whole if size == _WHOLE else self._square
        pixels = await asyncio.wrap_future(pool.submit(data))
        if isinstance(pixels, ImageError):
            raise pixels
        thumbnail = await asyncio.to_thread(encode_thumbnail, pixels, size)
        with self._lock:
            self._bytes += len(thumbnail) - len(
                self._cache.get(key, b"")
            )  # another request may have made it too
            self._cache[key] = thumbnail
            while self._bytes > _CACHE_BYTES:
                self._bytes -= len(self._cache.popitem(last=False)[1])
        return thumbnail

    async def decode(self, data: bytes) -> Pixels:
        """An encoded image with its shorter side at 640 pixels. Raises ImageError."""
        pixels = await asyncio.wrap_future(self._whole.submit(data))
        if isinstance(pixels, ImageError):
            raise pixels
        return pixels

    def close(self) -> None:
        """Ends the processes."""
        self._square.close()
        self._whole.close()
