"""Drawing of regions on an image: boxes, outlines, masks, and tags with labels and scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sightloop.types import Box, Floats32, Region

if TYPE_CHECKING:
    from numpy.typing import NDArray

_Color: TypeAlias = tuple[int, int, int]
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
_OPACITY = 0.4  # of a mask's fill
_HEAT_OPACITY = 0.6  # of the red of a heat map
_DIMMED, _GRAYED = 0.65, 0.6  # brightness and lost saturation of the image where a heat map is 0


def draw_regions(image: Image.Image, regions: Sequence[Region]) -> Image.Image:
    """Draws regions on a copy of an image.

    Each label has one color. Masks and outlines are filled, half transparent; an outline with four corners is a
    rotated box and is only stroked. Tags show the label and the score, and avoid each other while there is room.
    Parts outside the image are cut off.

    Args:
        image: Upright, as `sightloop.data.images.decode.decode` returns it.
        regions: Boxes, polygons and masks in pixels of the image.

    Returns:
        A new RGB image.
    """
    colors = {
        label: _COLORS[i % len(_COLORS)] for i, label in enumerate(dict.fromkeys(r.label for r in regions))
    }
    stroke = max(2, round(max(image.size) / 400))
    pixels = np.array(image.convert("RGB"))  # [H, W, 3]
    by_area = sorted(regions, key=_area, reverse=True)  # large first, so that small regions stay visible
    for region in by_area:
        shape = _filled_shape(region, image.size)
        if shape is not None:
            _fill_shape(pixels, shape, colors[region.label], stroke)
    out = Image.fromarray(pixels)
    draw = ImageDraw.Draw(out)
    for region in by_area:
        _draw_outline(draw, region, colors[region.label], stroke)
    font = ImageFont.load_default(max(12, round(max(image.size) / 45)))
    tags: list[Box] = []
    for region in reversed(by_area):
        text = _tag_text(draw, region, font, image.size[0])
        if text:
            tag = _tag_box(draw, text, font, region.box, image.size, tags)
            tags.append(tag)
            color = colors[region.label]
            draw.rectangle(tag, color)
            draw.text((tag[0] + 3, tag[1] + 1), text, _text_color(color), font, anchor="la")
    return out


def draw_heat_map(image: Image.Image, heat: Floats32) -> Image.Image:
    """Draws a heat map over an image: dim and gray where there is nothing, then green, yellow and red for the most.

    Args:
        image: The upright image.
        heat: float32 `[H, W]` of the image's size, at least 0; what only one pixel of 200 exceeds is red.
    """
    pixels = np.asarray(image.convert("RGB"), np.float32)  # [H, W, 3]
    heat = np.asarray(heat, np.float32)
    # A single patch may have many times the heat of the rest, which would stay invisible beside it.
    top = max(float(np.quantile(heat, 0.995)), 1e-3 * float(heat.max()), 1e-30)
    share = (heat / top).clip(max=1)[..., None]  # [H, W, 1], 0..1
    # Each channel is a triangle of width 1.5 around its peak: blue 0.25, green 0.5, red 0.75 ("jet").
    color = 255 * (1.5 - np.abs(4 * share - np.array([3.0, 2.0, 1.0], np.float32))).clip(0, 1)  # [H, W, 3]
    gray = pixels.mean(axis=2, keepdims=True)
    ground = _DIMMED * (_GRAYED * gray + (1 - _GRAYED) * pixels)
    ground += (pixels - ground) * share  # the image itself where the heat is
    opacity = _HEAT_OPACITY * share**0.7
    return Image.fromarray(((1 - opacity) * ground + opacity * color).round().astype(np.uint8))


def _area(region: Region) -> float:
    left, top, right, bottom = region.box
    return max(0.0, right - left) * max(0.0, bottom - top)


def _is_rotated_box(region: Region) -> bool:
    return region.mask is None and len(region.polygons) == 1 and len(region.polygons[0]) == 8


def _draw_outline(draw: ImageDraw.ImageDraw, region: Region, color: _Color, stroke: int) -> None:
    if _is_rotated_box(region):
        corners = [*region.polygons[0], *region.polygons[0][:2]]
        draw.line(corners, color, stroke, joint="curve")
        return
    left, top, right, bottom = region.box
    # Pillow's right and bottom edges are inclusive, ours are exclusive.
    draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=color, width=stroke)


def _filled_shape(region: Region, size: tuple[int, int]) -> NDArray[np.bool_] | None:
    """The filled part of a region, bool `[H, W]`; None if it has no mask and no outline. size: (width, height)."""
    if region.mask is not None:
        return np.asarray(region.mask, bool)
    if not region.polygons or _is_rotated_box(region):
        return None
    canvas = Image.new("1", size)
    for polygon in region.polygons:
        if len(polygon) >= 6:
            ImageDraw.Draw(canvas).polygon(polygon, fill=1)
    return np.array(canvas)


def _fill_shape(pixels: NDArray[np.uint8], shape: NDArray[np.bool_], color: _Color, stroke: int) -> None:
    """Tints the pixels `[H, W, 3]` inside a shape `[H, W]` and paints its rim of `stroke` pixels, in place.

    Raises ValueError for a shape of another size than the image.
    """
    if shape.shape != pixels.shape[:2]:
        raise ValueError(f"a mask of {shape.shape} for an image of {pixels.shape[:2]} (height, width)")
    # Erosion: in each round, a pixel stays if its four neighbors are inside. A row of a tall shape, with stroke 1:
    #   shape  . X X X X .
    #   core   . . X X . .
    inside = np.pad(shape, 1)  # [H + 2, W + 2]
    for _ in range(stroke):
        core = inside[1:-1, 1:-1].copy()  # [H, W]
        for axis in (0, 1):
            core &= np.roll(inside, 1, axis)[1:-1, 1:-1] & np.roll(inside, -1, axis)[1:-1, 1:-1]
        inside[1:-1, 1:-1] = core
    core = inside[1:-1, 1:-1]
    pixels[shape] = np.round(pixels[shape] * (1 - _OPACITY) + np.array(color) * _OPACITY)
    pixels[shape & ~core] = color


def _tag_text(
    draw: ImageDraw.ImageDraw, region: Region, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int
) -> str:
    """Label and score on one line; a label that is wider than the image is cut."""
    label = " ".join(region.label.split())
    score = "" if region.score is None else f"{region.score:.2f}"
    text = f"{label} {score}".strip()
    while label and draw.textlength(text, font) > width - 6:
        label = label[:-1]
        text = f"{label.rstrip()}\u2026 {score}".strip()
    return text


def _tag_box(
    draw: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    box: Box,
    size: tuple[int, int],
    tags: Sequence[Box],
) -> Box:
    """Position of a tag that overlaps none of `tags`, if there is one inside the image of (width, height) `size`.

    Tried in this order: above the region's box, inside at its top, below it, then further down and further up.
    """
    _, top, _, bottom = draw.textbbox((0, 0), "Ag|", font, anchor="la")
    width, height = draw.textlength(text, font) + 6, bottom - top + 6
    width = min(width, size[0])
    lowest = max(0.0, size[1] - height)
    left = min(max(0.0, box[0]), size[0] - width)
    steps = [i * height for i in range(1, 1 + int(size[1] // height))]
    tops = [box[1] - height, box[1], box[3], *(box[1] + s for s in steps), *(box[1] - s for s in steps)]
    boxes = [(left, y, left + width, y + height) for y in (min(max(0.0, y), lowest) for y in tops)]
    free = (candidate for candidate in boxes if not any(_overlap(candidate, tag) for tag in tags))
    return next(free, boxes[0])


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _text_color(background: _Color) -> _Color:
    """Black or white, whichever has more contrast (luma weights of ITU-R BT.601)."""
    luma = 0.299 * background[0] + 0.587 * background[1] + 0.114 * background[2]
    return (0, 0, 0) if luma > 140 else (255, 255, 255)
