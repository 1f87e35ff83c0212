"""The painter's shift of times."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sightloop.models.painter import Painter, PainterConfig
from sightloop.towers.dit import DitConfig
from sightloop.towers.text import TextConfig

VISION = DitConfig(64, 8, 3, dim=16, layers=1, heads=2, mlp_dim=32, memory_dim=16)
TEXT = TextConfig(
    vocab=8, positions=8, dim=16, layers=0, heads=2, mlp_dim=32, activation="gelu", eps=1e-6, post_norm=False
)


@pytest.mark.parametrize(
    ("shift", "side", "expected"), [(0, 32, 1), (0, 64, 2), (0, 16, 1), (5, 64, 5), (5, 128, 10)]
)
def test_times_are_shifted_with_the_side_of_an_image(shift: float, side: int, expected: float) -> None:
    painter = Painter(replace(PainterConfig(VISION, TEXT), shift=shift))
    assert painter.time_shift((side, side)) == pytest.approx(expected)
    assert painter.time_shift((side, 4 * side)) >= painter.time_shift((side, side))
