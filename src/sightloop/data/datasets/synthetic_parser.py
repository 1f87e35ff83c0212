"""Parser of plain scenes of the synthetic world: what an image shows, and whether it shows what its text says.

A network may have drawn the image, so edges may be soft and shapes wrong. Pixels that are far from the background are
objects, connected ones are one; the color of an object is that of most of its pixels, its shape the template that
covers it best. Positions are compared by GenEval's rule (Ghosh et al. 2023, arXiv 2310.11513).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sightloop.data.datasets.synthetic_grammar import COLORS, SHAPES, Combination, Part, plain_combinations
from sightloop.data.datasets.synthetic_scene import shape_outline
from sightloop.types import Box

_FAR = 46.0  # of 0..441: least distance of an object's pixel from the background
_LEAST_AREA = 0.004  # of the image; smaller specks are no objects
_TEMPLATE = 24  # pixels a side
_ANGLES = np.linspace(-0.1, 0.1, 5)
_LEAST_OVERLAP = 0.62  # intersection over union with the best template; below, a shape has no name
_MARGIN = 0.1  # of GenEval's rule: share of both sizes that an offset must exceed
_ASPECTS = (0.65, 1.55)


@dataclass(frozen=True, slots=True)
class SceneObject:
    """An object of an image.

    Args:
        color: one of `COLORS`.
        shape: one of `SHAPES`, "" for none of them.
        box: in pixels.
    """

    color: str
    shape: str
    box: Box


@dataclass(frozen=True, slots=True)
class SceneCheck:
    """Whether an image shows what a text says.

    Args:
        object: each shape that the text names is there.
        color: each is there in its color.
        count: as many of each as the text says, and nothing else.
        position: they are placed as the text says; None if it says nothing.
    """

    object: bool
    color: bool
    count: bool
    position: bool | None

    @property
    def correct(self) -> bool:
        """Whether all of it is right."""
        return self.object and self.color and self.count and self.position is not False


def parse_scene(pixels: NDArray[np.uint8]) -> list[SceneObject]:
    """Objects of an image, from the largest: pixels `[H, W, 3]`."""
    values = pixels.astype(np.float32)
    border = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
    background = np.median(border, axis=0)
    is_object = np.sqrt(((values - background) ** 2).sum(-1)) > _FAR  # [H, W]
    palette = np.array(list(COLORS.values()), np.float32)
    nearest = ((values[:, :, None] - palette) ** 2).sum(-1).argmin(-1)  # [H, W]
    objects: list[tuple[int, SceneObject]] = []
    for mask in _components(is_object):
        if (area := int(mask.sum())) >= _LEAST_AREA * mask.size:
            inner = _eroded(mask)
            votes = np.bincount(nearest[inner if inner.any() else mask], minlength=len(palette))
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            color, shape = list(COLORS)[int(votes.argmax())], _shape(mask[top:bottom, left:right])
            objects.append(
                (area, SceneObject(color, shape, (float(left), float(top), float(right), float(bottom))))
            )
    return [one for _, one in sorted(objects, key=lambda pair: -pair[0])]


def check_scene(objects: Sequence[SceneObject], combination: Combination) -> SceneCheck:
    """Whether objects are those of a combination."""
    wanted = Counter({(one.color, one.shape): one.count for one in combination.groups})
    shapes = Counter(one.shape for one in objects)
    drawn = Counter((one.color, one.shape) for one in objects)
    named = Counter(shape for _, shape in wanted)  # one of each group
    by_shape = Counter[str]()
    for (_, shape), count in wanted.items():
        by_shape[shape] += count
    position = None
    if combination.second is not None:
        first, second = combination.groups
        position = any(
            combination.relation in relations(a.box, b.box)
            for a in objects
            for b in objects
            if (a.color, a.shape) == (first.color, first.shape)
            and (b.color, b.shape) == (second.color, second.shape)
        )
    return SceneCheck(
        object=named <= shapes,
        color=Counter(wanted.keys()) <= drawn,
        count=shapes == by_shape,
        position=position,
    )


def relations(a: Box, b: Box) -> frozenset[str]:
    """How box a lies to box b: "above", "below", "left of", "right of", by GenEval's rule.

    The offset of the centers, less a tenth of both sizes, in units of the offset's length: more than a half of it.
    """
    center_a, center_b = (np.array([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]) for box in (a, b))
    sizes = np.array([a[2] - a[0] + b[2] - b[0], a[3] - a[1] + b[3] - b[1]])
    offset = center_a - center_b
    revised = np.maximum(np.abs(offset) - _MARGIN * sizes, 0) * np.sign(offset)
    if (np.abs(revised) < 1e-3).all():
        return frozenset()
    x, y = (revised / np.linalg.norm(offset)).tolist()
    names = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return frozenset(name for name, holds in names.items() if holds)


@cache
def _captions() -> dict[str, Combination]:
    parts: tuple[Part, ...] = ("train", "unseen")
    return {
        str(one): one for part in parts for members in plain_combinations(part).values() for one in members
    }


def plain_combination(text: str) -> Combination | None:
    """The combination of a caption of plain scenes, None for any other text."""
    return _captions().get(text)


def _components(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Connected regions of a mask `[H, W]`, corners not counted as connected, each `[H, W]`."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # each region takes the greatest number in it
        grown = labels.copy()
        grown[1:] = np.maximum(grown[1:], labels[:-1])
        grown[:-1] = np.maximum(grown[:-1], labels[1:])
        grown[:, 1:] = np.maximum(grown[:, 1:], labels[:, :-1])
        grown[:, :-1] = np.maximum(grown[:, :-1], labels[:, 1:])
        grown[~mask] = 0
        if (grown == labels).all():
            return [labels == label for label in np.unique(labels[mask])]
        labels = grown


def _eroded(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels whose four neighbors are in the mask `[H, W]`, too."""
    padded = np.pad(mask, 1)
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def _shape(mask: NDArray[np.bool_]) -> str:
    """The shape of a mask `[h, w]` that fills its box; "" if it is none of the known ones."""
    height, width = mask.shape
    if not _ASPECTS[0] < width / height < _ASPECTS[1]:
        return ""
    side = (_TEMPLATE, _TEMPLATE)
    scaled = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(side, Image.Resampling.BOX))
    cover = scaled.astype(np.float32) / 255  # [T, T]
    templates, names = _templates()
    both = np.minimum(templates, cover).sum((1, 2)) / np.maximum(templates, cover).sum((1, 2))
    best = int(both.argmax())
    return names[best] if both[best] >= _LEAST_OVERLAP else ""


@cache
def _templates() -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """How much of each pixel the shapes cover, slightly rotated, stretched to their boxes: `[n, T, T]`; their names."""
    covers: list[NDArray[np.float32]] = []
    names: list[str] = []
    for shape in SHAPES:
        for angle in _ANGLES:
            turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
            points = shape_outline(shape) @ turn
            points = (points - points.min(0)) / (points.max(0) - points.min(0))
            canvas = Image.new("L", (8 * _TEMPLATE, 8 * _TEMPLATE))
            corners = [(float(x), float(y)) for x, y in points * (8 * _TEMPLATE - 1)]
            ImageDraw.Draw(canvas).polygon(corners, fill=255)
            covers.append((np.asarray(canvas.reduce(8)) / 255).astype(np.float32))
            names.append(shape)
    return np.stack(covers), tuple(names)
