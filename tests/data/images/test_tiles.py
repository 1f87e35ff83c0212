"""Where tiles lie, against the reference's arithmetic on sizes of all kinds."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.llava_next.modeling_llava_next import unpad_image

from sightloop.data.images import tiles

GRIDS = [list(grid) for grid in tiles.GRIDS]


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_as_the_reference(height: int, width: int) -> None:
    size = (height, width)
    grid = tiles.best_grid(size, tiles.GRIDS)
    assert grid == tuple(select_best_resolution(size, GRIDS))
    shape = np.broadcast_to(np.uint8(0), (3, height, width))
    assert tiles.fit_within(size, grid) == get_patch_output_size(shape, grid, ChannelDimension.FIRST)
    rows, columns, top, left = tiles.tile_layout(size, tiles.GRIDS, 336, 14)
    whole = np.broadcast_to(np.uint8(0), (1, rows * 24, columns * 24))
    assert unpad_image(whole, size).shape[1:] == (rows * 24 - 2 * top, columns * 24 - 2 * left)


def test_cutting() -> None:
    values = np.arange(3 * 4 * 6, dtype=np.uint8).reshape(3, 4, 6) + 1
    cut = tiles.cut_tiles(values, (4, 8), 4)
    assert cut.shape == (3, 8, 4)
    assert (cut[:, :4, 1:] == values[:, :, :3]).all()
    assert (cut[:, 4:, :3] == values[:, :, 3:]).all()
    assert not cut[:, :4, 0].any()
    assert not cut[:, 4:, 3].any()
