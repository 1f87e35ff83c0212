"""Tiles of a large image (LLaVA 1.6, "anyres"): where they lie, and cutting. Sizes are (height, width)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sightloop.types import Size

# The resolutions of the published models.
GRIDS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def best_grid(size: Size, grids: Sequence[Size]) -> Size:
    """The resolution at which an image keeps most of its pixels; among equals the one that wastes least."""

    def worth(grid: Size) -> tuple[int, int]:
        scale = min(grid[1] / size[1], grid[0] / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return kept, kept - grid[0] * grid[1]

    return max(grids, key=worth)


def fitted(size: Size, grid: Size) -> Size:
    """The size of an image made as large as fits into `grid`, its sides rounded up."""
    wide, high = grid[1] / size[1], grid[0] / size[0]
    if wide < high:
        return min(math.ceil(size[0] * wide), grid[0]), grid[1]
    return grid[0], min(math.ceil(size[1] * high), grid[1])


def unpadded(size: Size, grid: Size) -> Size:
    """How many rows (above and below alike) and columns (left and right alike) of a grid of patches only cover the
    margins that fill an image up to the grid's shape; one of the two is 0."""
    if size[1] / size[0] > grid[1] / grid[0]:
        return (grid[0] - int(round(size[0] * (grid[1] / size[1]), 7))) // 2, 0
    return 0, (grid[1] - int(round(size[1] * (grid[0] / size[0]), 7))) // 2


def layout(size: Size, grids: Sequence[Size], side: int, patch: int) -> tuple[int, int, int, int]:
    """How an image of this size is put together again from tiles of `side` pixels: rows and columns of tiles, and the
    patches in the margins at the top and at the left."""
    grid = best_grid(size, grids)
    rows, columns, patches = grid[0] // side, grid[1] // side, side // patch
    return rows, columns, *unpadded(size, (rows * patches, columns * patches))


def cut(values: NDArray[np.uint8], grid: Size, side: int) -> NDArray[np.uint8]:
    """An image `[3, H, W]` in the middle of black of the size `grid`, as squares below one another, row by row:
    `[3, T * side, side]`."""
    _, height, width = values.shape
    whole = np.zeros((3, *grid), np.uint8)
    top, left = (grid[0] - height) // 2, (grid[1] - width) // 2
    whole[:, top : top + height, left : left + width] = values
    squares = whole.reshape(3, grid[0] // side, side, grid[1] // side, side)
    return squares.transpose(0, 1, 3, 2, 4).reshape(3, -1, side)
