"""Tiling of large images (LLaVA 1.6, "anyres"): choice of the resolution, padding and cutting.

Sizes are (height, width). Example with tiles of 336 pixels: an image of 300 x 500 keeps most pixels in a grid of
336 x 672. It is resized to 336 x 560, centered on black and cut into two tiles. The network sees these tiles and the
whole image resized to 336 x 336.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sightloop.types import Size

# The resolutions of the published models.
GRIDS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


class TileLayout(NamedTuple):
    """Arrangement of the tiles of one image.

    Attributes:
        rows: Rows of tiles.
        columns: Columns of tiles.
        top: Rows of patches that are padding above the image, and as many below.
        left: Columns of patches that are padding left of the image, and as many to the right.
    """

    rows: int
    columns: int
    top: int
    left: int


def best_grid(size: Size, grids: Sequence[Size]) -> Size:
    """Resolution that keeps most pixels of an image of `size`; among equals the one with the least padding."""

    def score(grid: Size) -> tuple[int, int]:
        scale = min(grid[1] / size[1], grid[0] / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return kept, kept - grid[0] * grid[1]

    return max(grids, key=score)


def fit_within(size: Size, grid: Size) -> Size:
    """Largest size of an image of `size` that fits into `grid` in the image's aspect ratio, sides rounded up."""
    width_scale, height_scale = grid[1] / size[1], grid[0] / size[0]
    if width_scale < height_scale:
        return min(math.ceil(size[0] * width_scale), grid[0]), grid[1]
    return grid[0], min(math.ceil(size[1] * height_scale), grid[1])


def padding_margins(size: Size, grid: Size) -> Size:
    """Padding of an image of `size` in a grid of patches: (rows above and below, columns left and right).

    At most one of the two is above 0. `grid` is in patches, `size` in pixels; only the aspect ratio of `size` counts.
    """
    if size[1] / size[0] > grid[1] / grid[0]:
        return (grid[0] - int(round(size[0] * (grid[1] / size[1]), 7))) // 2, 0
    return 0, (grid[1] - int(round(size[1] * (grid[0] / size[0]), 7))) // 2


def tile_layout(size: Size, grids: Sequence[Size], side: int, patch: int) -> TileLayout:
    """Arrangement of the tiles of an image, from which its patches are put together again.

    Args:
        size: Size of the image in pixels.
        grids: Resolutions to choose from, multiples of `side`.
        side: Side of a tile in pixels.
        patch: Side of a patch in pixels.
    """
    grid = best_grid(size, grids)
    rows, columns, patches = grid[0] // side, grid[1] // side, side // patch
    return TileLayout(rows, columns, *padding_margins(size, (rows * patches, columns * patches)))


def cut_tiles(values: NDArray[np.uint8], grid: Size, side: int) -> NDArray[np.uint8]:
    """Center an image on black of size `grid` and cut it into tiles.

    Args:
        values: uint8 `[3, H, W]`, at most as large as `grid`.
        grid: Multiples of `side`.
        side: Side of a tile in pixels.

    Returns:
        uint8 `[3, T * side, side]`, the T tiles below one another, row by row.
    """
    _, height, width = values.shape
    canvas = np.zeros((3, *grid), np.uint8)
    top, left = (grid[0] - height) // 2, (grid[1] - width) // 2
    canvas[:, top : top + height, left : left + width] = values
    tiles = canvas.reshape(3, grid[0] // side, side, grid[1] // side, side)  # [3, rows, side, columns, side]
    return tiles.transpose(0, 1, 3, 2, 4).reshape(3, -1, side)
