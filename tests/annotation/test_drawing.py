"""Drawing of regions: what is painted, where, and that nothing else changes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sightloop.annotation.drawing import _COLORS, draw_regions
from sightloop.data.images.decode import decode
from sightloop.types import Region

GRAY = (90, 90, 90)


def gray(width: int = 200, height: int = 160) -> Image.Image:
    return Image.new("RGB", (width, height), GRAY)


def changed(regions: list[Region], image: Image.Image | None = None) -> np.ndarray:
    image = image or gray()
    return (np.array(draw_regions(image, regions)) != np.array(image)).any(axis=2)


def test_a_box_is_its_edge_and_no_more() -> None:
    diff = changed([Region("", (20, 30, 120, 90))])
    assert diff[30, 20:120].all()
    assert diff[89, 20:120].all()
    assert diff[30:90, 20].all()
    assert diff[30:90, 119].all()
    inner = diff.copy()
    inner[30:90, 20:120] = False
    assert not inner.any()  # right and bottom are exclusive
    assert not diff[34:86, 24:116].any()


def test_a_mask_is_tinted_and_rimmed() -> None:
    mask = np.zeros((160, 200), bool)
    mask[40:100, 50:130] = True
    region = Region("", (50, 40, 130, 100), mask=mask)
    image = np.array(draw_regions(gray(), [region]))
    assert ((image != GRAY).any(axis=2) == mask).all()
    inside, rim = image[70, 90], image[70, 50]
    assert np.allclose(inside, np.array(GRAY) * 0.6 + rim * 0.4, atol=1)


def test_outlines_are_filled_and_rotated_boxes_are_not() -> None:
    triangle = Region("a", (40, 40, 120, 120), ((40.0, 40.0, 120.0, 40.0, 40.0, 120.0),))
    assert changed([triangle])[60, 60]
    rotated = Region("", (20, 20, 100, 100), ((60.0, 20.0, 100.0, 60.0, 60.0, 100.0, 20.0, 60.0),))
    diff = changed([rotated])
    assert not diff[60, 60]
    assert diff[40, 40]
    assert not diff[24, 24]


def test_each_label_has_one_color() -> None:
    boxes = [Region(label, (10 + 60 * i, 60, 60 + 60 * i, 110)) for i, label in enumerate("aba")]
    image = draw_regions(gray(), boxes)
    one, two, three = (image.getpixel((12 + 60 * i, 109)) for i in range(3))
    assert one == three != two


def test_tags_do_not_cover_each_other_and_stay_inside() -> None:
    regions = [Region(f"thing {i}", (150, 2, 190, 40), score=0.5) for i in range(5)]
    image = np.array(draw_regions(gray(), regions))
    shown = [(image == color).all(axis=2).sum() for color in _COLORS[:5]]
    alone = (np.array(draw_regions(gray(), regions[:1])) == _COLORS[0]).all(axis=2).sum()
    assert min(shown) > 0.6 * alone


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(max_size=40), *[st.floats(-500, 900)] * 4, st.none() | st.floats(0, 1)), max_size=5
    ),
    st.integers(1, 60),
    st.integers(1, 60),
)
def test_no_region_makes_it_fail(
    rows: list[tuple[str, float, float, float, float, float | None]], w: int, h: int
) -> None:
    regions = [Region(label, (a, b, c, d), ((a, b, c, d, b, a),), score) for label, a, b, c, d, score in rows]
    assert draw_regions(gray(w, h), regions).size == (w, h)


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="a mask of"):
        draw_regions(gray(), [Region("a", (0, 0, 1, 1), mask=np.ones((3, 3), bool))])


def test_an_image_with_an_exif_rotation() -> None:
    image = Image.new("RGB", (200, 100), GRAY)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated a quarter clockwise
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    upright = decode(file.getvalue())
    diff = changed([Region("", (10, 150, 60, 190))], upright)
    assert upright.size == (100, 200)
    assert diff[150, 10]
    assert diff[189, 59]
