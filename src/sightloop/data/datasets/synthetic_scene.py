"""Rendering of combinations of the synthetic world as images with boxes and outlines.

Positions and sizes are shares of the side of the image, 0..1, until they are drawn:

    one group       above           left of         inside          word
    +---------+     +---------+     +----+----+     +---------+     +---------+
    |         |     |  first  |     |    |    |     | second  |     |  first  |
    |  first  |     +---------+     | 1. | 2. |     | [first] |     +---------+
    |         |     | second  |     |    |    |     |         |     |  WORD   |
    +---------+     +---------+     +----+----+     +---------+     +---------+
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sightloop.data.datasets.synthetic_grammar import COLORS, Combination, Group
from sightloop.types import Box, Floats, Region

SUPERSAMPLING = 4  # scenes are drawn this many times larger, and averaged down
_FULL: Box = (0.0, 0.0, 1.0, 1.0)
_TOP, _BOTTOM = (0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)
_LEFT, _RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
_MIDDLE = (0.28, 0.28, 0.72, 0.72)
_OVER_WORD, _WORD = (0.0, 0.04, 1.0, 0.58), (0.04, 0.64, 0.96, 0.97)
# Smallest and largest radius of a shape, as shares of the shorter side of its cell.
_PLAIN_MARGIN = 0.08  # of the shorter side of a cell
_SMALL, _USUAL, _LARGE = (0.20, 0.24), (0.41, 0.48), (0.44, 0.48)


@dataclass(frozen=True, slots=True)
class Scene:
    """A rendered combination.

    Attributes:
        pixels: uint8 `[size, size, 3]`.
        regions: one for each object, and for the written word; in pixels.
    """

    pixels: NDArray[np.uint8]
    regions: tuple[Region, ...]


def render_scene(
    combination: Combination, random: np.random.Generator, size: int = 64, *, plain: bool = False
) -> Scene:
    """Renders a combination.

    Args:
        combination: content of the scene.
        random: chooses what the caption does not say: positions, rotations, shades, background, noise.
        size: width and height in pixels.
        plain: a background of one color, and no noise.
    """
    canvas_size = size * SUPERSAMPLING
    canvas = (_plain_background if plain else draw_background)(canvas_size, random)
    draw = ImageDraw.Draw(canvas)
    regions: list[Region] = []
    for group, box, radii in _layout(combination):
        for cell in _split_box(group.count, box, random):
            # In a long cell, objects of a relation stay near the middle: "above" must not look like "left of" too. So
            # do those of plain scenes, of which a painter has few layouts to learn.
            area = _center_square(cell) if plain or combination.relation else cell
            area = _inset(area) if plain else area
            outline = _place_shape(group.shape, area, radii, random)  # [n, 2]
            shade = np.clip(np.array(COLORS[group.color]) + random.integers(-12, 13, 3), 0, 255)
            draw.polygon([(float(x), float(y)) for x, y in outline * canvas_size], fill=_rgb(shade))
            regions.append(_region(f"{group.color} {group.shape}", outline * size, size))
    if combination.word:
        edges = _draw_word(canvas, combination.word, random)
        left, top, right, bottom = (edge / SUPERSAMPLING for edge in edges)
        regions.append(Region(f"word {combination.word}", (left, top, right, bottom)))
    reduced = canvas.reduce(SUPERSAMPLING)
    if plain:
        return Scene(np.asarray(reduced), tuple(regions))
    pixels = np.asarray(reduced).astype(np.float32)  # [size, size, 3]
    pixels += random.normal(0.0, random.uniform(1.0, 5.0), pixels.shape)
    return Scene(pixels.round().clip(0, 255).astype(np.uint8), tuple(regions))


def _layout(combination: Combination) -> list[tuple[Group, Box, tuple[float, float]]]:
    """Groups in the order of drawing, the box of each, and its smallest and largest radius."""
    first, second = combination.first, combination.second
    if second is None:
        box = _OVER_WORD if combination.word else _FULL
        return [(first, box, _SMALL if first.size == "small" else _USUAL)]
    if combination.relation == "inside":
        return [(second, _FULL, _LARGE), (first, _MIDDLE, _USUAL)]
    boxes = (_TOP, _BOTTOM) if combination.relation == "above" else (_LEFT, _RIGHT)
    return [(group, box, _USUAL) for group, box in zip((first, second), boxes, strict=True)]


def _split_box(count: int, box: Box, random: np.random.Generator) -> list[Box]:
    """Cells of a box for 1 to 4 objects: the box, its halves along the longer side, or some of its quarters."""
    left, top, right, bottom = box
    x, y = (left + right) / 2, (top + bottom) / 2
    if count == 1:
        return [box]
    if count == 2:
        width, height = right - left, bottom - top
        if width > height or (width == height and random.random() < 0.5):
            return [(left, top, x, bottom), (x, top, right, bottom)]
        return [(left, top, right, y), (left, y, right, bottom)]
    quarters = [(left, top, x, y), (x, top, right, y), (left, y, x, bottom), (x, y, right, bottom)]
    return [quarters[i] for i in sorted(random.permutation(4)[:count].tolist())]


def _center_square(box: Box) -> Box:
    """The largest square in the middle of a box."""
    left, top, right, bottom = box
    half, x, y = min(right - left, bottom - top) / 2, (left + right) / 2, (top + bottom) / 2
    return (x - half, y - half, x + half, y + half)


def _inset(box: Box) -> Box:
    """A box without its margin, so that objects never touch."""
    left, top, right, bottom = box
    margin = _PLAIN_MARGIN * min(right - left, bottom - top)
    return (left + margin, top + margin, right - margin, bottom - margin)


def _place_shape(shape: str, cell: Box, radii: tuple[float, float], random: np.random.Generator) -> Floats:
    """Outline `[n, 2]` of a shape at a random position in its cell, rotated by up to 0.1 radians."""
    left, top, right, bottom = cell
    radius = min(right - left, bottom - top) * random.uniform(*radii)
    x, y = random.uniform(left + radius, right - radius), random.uniform(top + radius, bottom - radius)
    angle = random.uniform(-0.1, 0.1)
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return np.array([x, y]) + radius * (OUTLINES[shape] @ rotation)


def draw_background(side: int, random: np.random.Generator) -> Image.Image:
    """A tinted background of medium brightness and low contrast: plain, shaded or striped."""
    tone = float(random.uniform(115, 180))
    tint = tone + random.uniform(-12, 12, 3)  # [3]
    ramp = np.linspace(-1, 1, side) * random.choice([-1.0, 1.0])  # [side]
    kind = random.integers(3)  # 0 plain, 1 shaded, 2 striped
    wave = ramp if kind == 1 else np.sign(np.sin(ramp * math.pi * random.uniform(3, 7)))
    lines = tint + (0.0 if kind == 0 else random.uniform(4, 12)) * wave[:, None]  # [side, 3]
    rows = np.broadcast_to(lines[:, None].clip(0, 255).astype(np.uint8), (side, side, 3))
    image = rows if random.random() < 0.5 else rows.transpose(1, 0, 2)  # across or down
    return Image.fromarray(np.ascontiguousarray(image))


def _plain_background(side: int, random: np.random.Generator) -> Image.Image:
    """A background of one gray of medium brightness."""
    tone = int(random.integers(120, 171))
    return Image.new("RGB", (side, side), (tone, tone, tone))


def _draw_word(canvas: Image.Image, word: str, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Writes a word in dark capitals into the lower part of the canvas; returns its box on the canvas."""
    stamp = _render_word(word)
    left, top, right, bottom = (int(edge * canvas.width) for edge in _WORD)
    scale = min((right - left) / stamp.width, (bottom - top) / stamp.height) * random.uniform(0.9, 1.0)
    size = (int(stamp.width * scale), int(stamp.height * scale))
    x = left + int(random.integers(right - left - size[0] + 1))
    y = top + int(random.integers(bottom - top - size[1] + 1))
    canvas.paste((20, 20, 20), (x, y), stamp.resize(size, Image.Resampling.NEAREST))
    return (x, y, x + size[0], y + size[1])


@cache
def _render_word(word: str) -> Image.Image:
    """A word in Pillow's built-in bitmap font, which is the same on every machine: mode L, cropped to its ink."""
    page = Image.new("L", (16 * len(word), 32))
    ImageDraw.Draw(page).text((2, 2), word.upper(), fill=255, font=ImageFont.load_default_imagefont())
    return page.crop(page.getbbox())


def _region(label: str, points: Floats, size: int) -> Region:
    """The region of an outline `[n, 2]` in pixels, clipped to the image and rounded to 0.01."""
    clipped = points.clip(0, size).round(2)
    (left, top), (right, bottom) = clipped.min(0).tolist(), clipped.max(0).tolist()
    return Region(label, (left, top, right, bottom), (tuple(clipped.ravel().tolist()),))


def _rgb(color: NDArray[np.int64]) -> tuple[int, int, int]:
    red, green, blue = color.tolist()
    return (red, green, blue)


def shape_outline(shape: str) -> Floats:
    """Outline `[n, 2]` of a shape of radius about 1 around (0, 0), y downwards."""
    return OUTLINES[shape]


def _regular_polygon(corners: int, radius: float) -> Floats:
    """`[corners, 2]` around (0, 0), clockwise from the top."""
    angles = np.arange(corners) * (2 * math.pi / corners)
    return radius * np.stack([np.sin(angles), -np.cos(angles)], axis=1)


def _star() -> Floats:
    """`[10, 2]`: every second corner is moved inwards."""
    points = _regular_polygon(10, 1.08)
    points[1::2] *= 0.42
    return points


def _ring() -> Floats:
    """`[66, 2]`: around the outer circle, then back around the inner one, so that one outline has a hole."""
    loop = np.concatenate([_regular_polygon(32, 1.0), _regular_polygon(32, 1.0)[:1]])
    return np.concatenate([loop, 0.52 * loop[::-1]])


def _cross(arm: float) -> Floats:
    """`[12, 2]`: the upper end and a corner, in four rotations. arm: half its width."""
    corner = np.array([(-arm, -1.0), (arm, -1.0), (arm, -arm)])
    rotations = [np.array([[c, s], [-s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
    return np.concatenate([corner @ rotation for rotation in rotations])


# Outlines `[n, 2]` of radius about 1 around (0, 0), y downwards; a key for each of `SHAPES`.
OUTLINES: dict[str, Floats] = {
    "circle": _regular_polygon(32, 1.0),
    "square": 0.84 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]),
    "triangle": _regular_polygon(3, 1.12) + np.array([0.0, 0.16]),
    "star": _star(),
    "cross": _cross(0.34),
    "ring": _ring(),
}
