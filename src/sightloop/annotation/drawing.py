"""Regions painted on their image: boxes, outlines, masks, and tags with labels and scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sightloop.types import Region

_Color: TypeAlias = tuple[int, int, int]
_TextBox: TypeAlias = tuple[float, float, float, float]
_COLORS: tuple[_Color, ...] = (
    (230, 57, 70),
    (29, 130, 216),
    (255, 183, 3),
    (46, 160, 67),
    (155, 81, 224),
    (251, 111, 16),
    (0, 178, 169),
    (240, 98, 176),
    (128, 186, 36),
    (97, 82, 63),
)
_FILL = 0.4  # how much of a mask's colour covers the image


def draw_regions(picture: Image.Image, regions: Sequence[Region]) -> Image.Image:
    """The image (upright, as `sightloop.data.images.decode.decode` gives it) with its regions, as a new RGB image.

    A colour for each label, in the order in which labels come. Masks and outlines are filled so that the image shows
    through; an outline of four corners stands for a turned box and is not. A tag says the label and the score, if there
    is one; tags do not cover each other while there is room. What lies outside the image is cut off.
    """
    colors = {
        label: _COLORS[i % len(_COLORS)] for i, label in enumerate(dict.fromkeys(r.label for r in regions))
    }
    stroke = max(2, round(max(picture.size) / 400))
    painted = np.array(picture.convert("RGB"))
    order = sorted(regions, key=_area, reverse=True)  # what is small lies on top
    for region in order:
        shape = _shape(region, picture.size)
        if shape is not None:
            _paint(painted, shape, colors[region.label], stroke)
    out = Image.fromarray(painted)
    pen = ImageDraw.Draw(out)
    for region in order:
        if _is_turned(region):
            corners = [*region.polygons[0], *region.polygons[0][:2]]
            pen.line(corners, colors[region.label], stroke, joint="curve")
        else:
            left, top, right, bottom = region.box
            edges = (
                left,
                top,
                max(left, right - 1),
                max(top, bottom - 1),
            )  # Pillow's far edges are inclusive
            pen.rectangle(edges, outline=colors[region.label], width=stroke)
    font = ImageFont.load_default(max(12, round(max(picture.size) / 45)))
    taken: list[_TextBox] = []
    for region in reversed(order):
        text = _fitted(pen, region, font, picture.size[0])
        if text:
            place = _place(pen, text, font, region.box, picture.size, taken)
            taken.append(place)
            color = colors[region.label]
            pen.rectangle(place, color)
            pen.text((place[0] + 3, place[1] + 1), text, _ink(color), font, anchor="la")
    return out


def _area(region: Region) -> float:
    left, top, right, bottom = region.box
    return max(0.0, right - left) * max(0.0, bottom - top)


def _is_turned(region: Region) -> bool:
    return region.mask is None and len(region.polygons) == 1 and len(region.polygons[0]) == 8


def _shape(region: Region, size: tuple[int, int]) -> NDArray[np.bool_] | None:
    """What is filled: bool `[H, W]`, or None."""
    if region.mask is not None or _is_turned(region):
        return region.mask
    if not region.polygons:
        return None
    canvas = Image.new("1", size)
    for polygon in region.polygons:
        if len(polygon) >= 6:
            ImageDraw.Draw(canvas).polygon(polygon, fill=1)
    return np.array(canvas)


def _paint(picture: NDArray[np.uint8], shape: NDArray[np.bool_], color: _Color, stroke: int) -> None:
    """The shape's inside tinted, its rim of `stroke` pixels full. Raises ValueError for a mask of another size."""
    if shape.shape != picture.shape[:2]:
        raise ValueError(f"a mask of {shape.shape} for an image of {picture.shape[:2]} (height, width)")
    inside = np.pad(shape, 1)
    for _ in range(stroke):  # each round takes a rim of one pixel away
        core = inside[1:-1, 1:-1].copy()
        for axis in (0, 1):
            core &= np.roll(inside, 1, axis)[1:-1, 1:-1] & np.roll(inside, -1, axis)[1:-1, 1:-1]
        inside[1:-1, 1:-1] = core
    core = inside[1:-1, 1:-1]
    picture[shape] = np.round(picture[shape] * (1 - _FILL) + np.array(color) * _FILL)
    picture[shape & ~core] = color


def _fitted(
    pen: ImageDraw.ImageDraw, region: Region, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int
) -> str:
    """The tag's text on one line, cut where it is wider than the image."""
    label = " ".join(region.label.split())
    score = "" if region.score is None else f"{region.score:.2f}"
    text = f"{label} {score}".strip()
    while label and pen.textlength(text, font) > width - 6:
        label = label[:-1]
        text = f"{label.rstrip()}\u2026 {score}".strip()
    return text


def _place(
    pen: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    box: _TextBox,
    size: tuple[int, int],
    taken: Sequence[_TextBox],
) -> _TextBox:
    """The tag's place: above the box, inside at its top, below it, or further down or up: where others leave room."""
    _, top, _, bottom = pen.textbbox((0, 0), "Ag|", font, anchor="la")
    width, height = pen.textlength(text, font) + 6, bottom - top + 6
    width = min(width, size[0])
    lowest = max(0.0, size[1] - height)
    left = min(max(0.0, box[0]), size[0] - width)
    steps = [i * height for i in range(1, 1 + int(size[1] // height))]
    tries = [box[1] - height, box[1], box[3], *(box[1] + s for s in steps), *(box[1] - s for s in steps)]
    places = [(left, y, left + width, y + height) for y in (min(max(0.0, y), lowest) for y in tries)]
    free = (place for place in places if not any(_meet(place, other) for other in taken))
    return next(free, places[0])


def _meet(a: _TextBox, b: _TextBox) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _ink(color: _Color) -> _Color:
    """Black or white, whichever reads better on the colour."""
    return (0, 0, 0) if 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140 else (255, 255, 255)
