"""Hashes of images: SHA-256 of bytes and of pixels, a spectrum of 256 bytes, and 64-bit perceptual hashes (pHash).

The spectrum holds the 16 x 16 lowest frequencies (discrete cosine transform, DCT) of a gray 64 x 64 thumbnail. All
else is computed from it: the pHash (the signs of the 64 lowest frequencies, as in Zauner 2010), the pHashes of the
image mirrored and turned, those of its crops, and the similarity of two images through a crop window.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sightloop.data.copies.colors import color_cells
from sightloop.data.images import headers
from sightloop.data.images.decode import decode
from sightloop.types import Floats, Floats32

SPECTRUM = 16  # frequencies in each direction
ORIENTATIONS = 8
# A crop window: top, bottom, left, right as shares of the side.
CropWindow = tuple[float, float, float, float]
FULL: CropWindow = (0.0, 1.0, 0.0, 1.0)

_SIDE = 64  # pixels, of a thumbnail
_SAMPLES = 32  # of a window's side
_MAX_DRAFT_PIXELS = 1 << 26
_MIN_CONTRAST = 3.0  # standard deviation of gray (0..255); flatter images have nothing to compare
_COMPARED = (
    12  # frequencies in each direction of the fine comparison: what a window of 0.75 of the side still has
)
# The least weighted frequency (of a unit vector of 64) that sets a bit: 0 would leave the bits of symmetric images,
# whose odd frequencies are 0, to noise.
_LEAST_FREQUENCY = 0.01


def windows(sizes: Sequence[tuple[float, int]]) -> tuple[CropWindow, ...]:
    """The whole image, then n x n windows of each size (share of the side, n), from corner to corner; 1: the center."""
    cuts = [FULL]
    for size, count in sizes:
        places = [(1 - size) * (i / (count - 1) if count > 1 else 0.5) for i in range(count)]
        cuts += [(top, top + size, left, left + size) for top in places for left in places]
    return tuple(cuts)


# So dense that nearly every crop down to 0.8 of the side has a window within a pHash of 8 bits; the centered ones
# stand for frames. 1 + 9 + 16 + 25 + 36 + 3 = 90.
WINDOWS = windows(((0.95, 3), (0.9, 4), (0.84, 5), (0.78, 6), (0.925, 1), (0.87, 1), (0.81, 1)))
# Those that take off as much on every side, as a frame does: bool `[90]`.
IS_FRAME: NDArray[np.bool_] = np.ptp(np.abs(np.array(WINDOWS) - (0, 1, 0, 1)), axis=1) < 1e-9
IS_FRAME[0] = False


def pixels_digest(image: Image.Image) -> bytes:
    """SHA-256 of the size and the pixels of an RGB image: equal for a PNG and a BMP of the same pixels."""
    digest = hashlib.sha256(f"{image.width} {image.height} ".encode())
    digest.update(image.tobytes())
    return digest.digest()


def spectrum(image: Image.Image) -> NDArray[np.int8]:
    """Spectrum of an upright image.

    Returns:
        int8 `[16, 16]`, frequencies down and across, each times its distance from the constant one (amplitudes of
        photographs fall as 1 / frequency), scaled so that the largest is 127. All 0 for an image without contrast.
    """
    gray = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    pixels = np.asarray(gray, np.float32)
    if pixels.std() < _MIN_CONTRAST:
        return np.zeros((SPECTRUM, SPECTRUM), np.int8)
    cosines = _cosines(_SIDE, SPECTRUM)
    values = _weighted((cosines @ pixels @ cosines.T).astype(np.float32))
    return np.rint(values * (127 / np.abs(values).max())).astype(np.int8)


def draft_spectrum(data: bytes) -> NDArray[np.int8]:
    """Spectrum `[16, 16]` of an encoded image. Raises ImageError if it cannot be read."""
    return draft_hashes(data)[0]


def draft_hashes(data: bytes) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Spectrum `[16, 16]` and colors `[4, 4, 2]` (see `colors`) of an encoded image.

    A baseline JPEG is decoded at reduced size, several times as fast.

    Raises:
        ImageError: the image cannot be read.
    """
    try:
        jpeg = headers.check_header(data, _MAX_DRAFT_PIXELS)
        if jpeg is not None and jpeg.is_standard and jpeg.width * jpeg.height <= _MAX_DRAFT_PIXELS:
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
                image.draft("YCbCr" if image.mode == "RGB" else "L", (_SIDE, _SIDE))
                small = ImageOps.exif_transpose(image)
                return spectrum(small), color_cells(small)
    except (OSError, ValueError, SyntaxError):
        pass  # `decode` reads it nevertheless, or raises ImageError
    image = decode(data)
    return spectrum(image), color_cells(image)


def phash(spectra: NDArray[np.int8], window: CropWindow = FULL) -> NDArray[np.uint64]:
    """pHash of images, or of their part in a window.

    Args:
        spectra: `[n, 16, 16]`.
        window: shares of the side.

    Returns:
        uint64 `[n]`; 0 where the image has no contrast.
    """
    return _bits(through_windows(spectra, np.array([window]), _HASHED))


def phash_oriented(spectra: NDArray[np.int8]) -> NDArray[np.uint64]:
    """pHashes `[n, 8]` of images in all orientations, as `oriented` numbers them."""
    return np.stack([_bits(_as_floats(oriented(spectra, number))) for number in range(ORIENTATIONS)], axis=1)


def oriented(spectra: NDArray[np.int8], orientation: int) -> NDArray[np.int8]:
    """Spectra `[n, 16, 16]` of images mirrored (1: left to right, 2: top to bottom) and transposed first (4), added.

    0 is the image itself, 3 a half turn, 5 and 6 quarter turns, 4 and 7 the mirrors along the diagonals.
    """
    turned = spectra.transpose(0, 2, 1) if orientation & 4 else spectra
    # A mirror changes the sign of the odd frequencies across it.
    signs = np.where(np.arange(SPECTRUM) % 2, -1, 1).astype(np.int8)
    if orientation & 1:
        turned = turned * signs
    if orientation & 2:
        turned = turned * signs[:, None]
    return turned


def unit_vectors(spectra: NDArray[np.int8]) -> Floats32:
    """Frequencies that are compared, as unit vectors `[n, 143]`; zeros for images without contrast."""
    return _flat(_as_floats(spectra)[:, :_COMPARED, :_COMPARED])


def window_vectors(spectra: NDArray[np.int8], spans: Floats) -> Floats32:
    """`unit_vectors` of images cut to windows.

    Args:
        spectra: `[n, 16, 16]`, or `[1, 16, 16]` for one image through n windows.
        spans: `[n, 4]`, or `[1, 4]` for n images through one window.

    Returns:
        `[n, 143]`
    """
    return _flat(through_windows(spectra, spans, _COMPARED))


def through_windows(spectra: NDArray[np.int8], spans: Floats, count: int) -> Floats32:
    """Weighted frequencies `[n, count, count]` of images cut to windows; arguments as for `window_vectors`."""
    plain = _as_floats(spectra) / _weights(SPECTRUM)  # the weight of frequency 0 is 1
    down, across = _window_transform(spans[:, :2], count), _window_transform(spans[:, 2:], count)
    return _weighted((down @ plain @ across.transpose(0, 2, 1)).astype(np.float32, copy=False))


_HASHED = 10  # frequencies in each direction of which the 64 lowest are hashed


@cache
def _hashed_frequencies() -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """(down, across) of the 64 lowest frequencies `[64]` each, without the constant one; symmetric in the two."""
    pairs = [(i, j) for i in range(_HASHED) for j in range(_HASHED) if i + j]
    ordered = sorted(pairs, key=lambda pair: (pair[0] ** 2 + pair[1] ** 2, abs(pair[0] - pair[1]), pair))
    chosen = ordered[:64]
    down, across = np.array(chosen, np.intp).T
    return down, across


def _bits(frequencies: Floats32) -> NDArray[np.uint64]:
    """One bit for each hashed frequency: whether it is positive. `[n, at least 10, same]` -> `[n]`."""
    down, across = _hashed_frequencies()
    values = frequencies[:, down, across]  # [n, 64]
    least = _LEAST_FREQUENCY * np.linalg.norm(values, axis=1, keepdims=True)
    packed = np.ascontiguousarray(np.packbits(values > least, axis=1))  # uint8 [n, 8]
    return packed.view(">u8")[:, 0].astype(np.uint64)


def _as_floats(spectra: NDArray[np.int8]) -> Floats32:
    return spectra.astype(np.float32)


def _weighted(frequencies: Floats32) -> Floats32:
    return frequencies * _weights(frequencies.shape[-1])


@cache
def _weights(count: int) -> Floats32:
    """Distance of each frequency from the constant one `[count, count]`; 1 for that one itself."""
    order = np.arange(count, dtype=np.float32)
    distance = np.hypot(order[:, None], order)
    distance[0, 0] = 1
    return distance


def _flat(frequencies: Floats32) -> Floats32:
    """Unit vectors of frequencies `[n, c, c]` without the constant one: `[n, c^2 - 1]`."""
    count = frequencies.shape[-1]
    vectors = frequencies.reshape(len(frequencies), count * count)[:, 1:]
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)


@cache
def _cosines(samples: int, count: int) -> Floats32:
    """Orthonormal DCT-II `[count, samples]`."""
    centers = (np.arange(samples) + 0.5) / samples
    cosines = np.cos(np.pi * np.arange(count)[:, None] * centers) * math.sqrt(2 / samples)
    cosines[0] *= math.sqrt(0.5)
    return cosines.astype(np.float32)


def _window_transform(spans: Floats, count: int) -> Floats32:
    """Matrices `[n, count, 16]` from frequencies of the whole side to frequencies of a span of it.

    The side as a function of position is known from its frequencies, so the span is sampled anew, without pixels.

    Args:
        spans: `[n, 2]`, first and last end as shares of the side.
        count: number of frequencies.
    """
    centers = ((np.arange(_SAMPLES) + 0.5) / _SAMPLES).astype(np.float32)
    first, last = spans[:, :1].astype(np.float32), spans[:, 1:].astype(np.float32)
    positions = first + (last - first) * centers  # [n, 32]
    order = np.arange(SPECTRUM, dtype=np.float32)
    waves = np.cos(np.float32(np.pi) * order * positions[:, :, None]) * np.float32(math.sqrt(2 / _SAMPLES))
    waves[:, :, 0] *= math.sqrt(0.5)  # [n, 32, 16]
    return _cosines(_SAMPLES, count) @ waves
