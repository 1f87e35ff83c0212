"""Colors of images on a grid of 4 x 4 cells, by which images of one shape that differ in color alone are told apart.

Brightness is left to the spectrum. What is compared is chroma: how far a cell is from gray, and in which direction. A
gray copy has none and agrees with every color; a copy of another brightness or saturation has more or less of it in the
same directions; one of another white balance has all of it shifted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sightloop.types import Floats32, Integers

CELLS = 4  # in each direction
CHANNELS = 2  # Cb and Cr of JPEG, less 128
SIZE = CELLS * CELLS * CHANNELS

_GRAY = 2.0  # chroma (0..127) that rounding leaves in a gray image
_NOTICEABLE = 8.0  # difference of chroma (root of the mean square) that JPEG and resizing do not make
_LEAST_COSINE = 0.5


def color_cells(image: Image.Image) -> NDArray[np.int8]:
    """Mean chroma of each cell of an image in RGB, YCbCr or gray: int8 `[4, 4, 2]`."""
    if image.mode == "L":
        return np.zeros((CELLS, CELLS, CHANNELS), np.int8)
    small = image.convert("YCbCr").resize((CELLS, CELLS), Image.Resampling.BOX)
    return (np.asarray(small, np.int16)[:, :, 1:] - 128).astype(np.int8)


def turned(cells: NDArray[np.int8], orientation: int) -> NDArray[np.int8]:
    """Cells `[n, 4, 4, 2]` of images in an orientation, numbered as by `image_hash.oriented`."""
    if orientation & 4:
        cells = cells.transpose(0, 2, 1, 3)
    if orientation & 1:
        cells = cells[:, :, ::-1]
    if orientation & 2:
        cells = cells[:, ::-1]
    return cells


def have_same_colors(
    first: NDArray[np.int8], second: NDArray[np.int8], orientation: Integers
) -> NDArray[np.bool_]:
    """Whether pairs of images may be copies by their colors.

    Args:
        first: cells `[p, 4, 4, 2]`.
        second: cells `[p, 4, 4, 2]`.
        orientation: of the first image that makes it resemble the second, `[p]`.

    Returns:
        bool `[p]`.
    """
    own = np.empty_like(first)
    for number in np.unique(orientation).tolist():
        own[orientation == number] = turned(first[orientation == number], number)
    a, b = (cells.reshape(len(cells), -1, CHANNELS).astype(np.float32) for cells in (own, second))
    is_gray = (np.abs(a).max((1, 2), initial=0) <= _GRAY) | (np.abs(b).max((1, 2), initial=0) <= _GRAY)
    is_close = np.sqrt(((a - b) ** 2).sum(2).mean(1)) <= _NOTICEABLE
    # The same up to a factor; the same but for a shift of all cells, and a factor.
    shifted = _cosine(a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True))
    return is_gray | is_close | (_cosine(a, b) >= _LEAST_COSINE) | (shifted >= _LEAST_COSINE)


def _cosine(a: Floats32, b: Floats32) -> Floats32:
    """Cosines `[p]` of pairs `[p, cells, 2]`; 0 where one has no length."""
    lengths = np.sqrt((a * a).sum((1, 2)) * (b * b).sum((1, 2)))
    return (a * b).sum((1, 2)) / np.maximum(lengths, 1e-6)
