"""Fields that LabelMe and CreateML write, as those of `schema`.

    LabelMe    {"shapes": [{"label": "cat", "shape_type": "polygon", "points": [[4, 2], [9, 2], [9, 8]]}],
               "imagePath": "a.jpg", "imageData": null, "imageHeight": 30, "imageWidth": 40}
    CreateML   [{"image": "a.jpg", "annotations": [{"label": "cat",
               "coordinates": {"x": 20, "y": 15, "width": 10, "height": 6}}]}]      x, y: center of the box

Coordinates are pixels of the upright image (https://github.com/wkentaro/labelme,
https://developer.apple.com/documentation/createml/building-an-object-detector-data-source).
"""

from __future__ import annotations

import base64
import binascii
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from sightloop.data.datasets.rle import encode_rle
from sightloop.data.datasets.values import finite_numbers
from sightloop.errors import ImageError
from sightloop.types import JsonDict, JsonMapping, Limits

_LABELME_MEMBERS = frozenset(("version", "imagePath", "imageData", "imageHeight", "imageWidth"))
_CREATEML_MEMBERS = ("annotations", "annotation")
FOREIGN_NAMES = frozenset(("shapes", *_CREATEML_MEMBERS))
_OUTLINES = ("polygon", "oriented_rectangle", "rotation")
_NO_REGIONS = frozenset(("point", "points", "line", "linestrip"))
_CIRCLE_POINTS = 64
_NOTE_SHAPES = "shapes of LabelMe are points or lines, no regions, and are kept aside"
_NOTE_COORDINATES = "annotations of CreateML have no coordinates and are kept aside"


def own_fields(fields: JsonMapping, aside: Counter[str] | None = None) -> JsonDict:
    """A copy of the fields with the `regions` that other programs wrote; what is no region keeps its name.

    Args:
        fields: of an image.
        aside: counts what is no region, by reason.

    Raises:
        ValueError: a region is wrong.
    """
    own = dict(fields)
    if is_labelme(own):
        _take_shapes(own, Counter[str]() if aside is None else aside)
    for name in _CREATEML_MEMBERS:
        items = own.get(name)
        if isinstance(items, list) and any(isinstance(i, Mapping) and "coordinates" in i for i in items):
            _take_coordinates(own, name, items, Counter[str]() if aside is None else aside)
    return own


def is_labelme(fields: JsonMapping) -> bool:
    """Whether an object is a file of LabelMe, or was read from one."""
    shapes = fields.get("shapes")
    if shapes is None:
        return False
    if "imagePath" in fields or "imageData" in fields:
        return True
    return isinstance(shapes, list) and any(isinstance(s, Mapping) and "points" in s for s in shapes)


def _take_shapes(fields: JsonDict, aside: Counter[str]) -> None:
    """Replaces `shapes` by `regions`; shapes of one label and `group_id` are the parts of one object."""
    shapes = fields.pop("shapes")
    if not isinstance(shapes, list):
        raise ValueError("its shapes are not a list")
    others: list[JsonMapping] = []
    regions: list[JsonDict] = []
    groups: defaultdict[str, list[JsonDict]] = defaultdict(list)
    for number, shape in enumerate(shapes, 1):
        if not isinstance(shape, Mapping):
            raise ValueError(f"shape {number} is no object")
        if shape.get("shape_type") in _NO_REGIONS:
            others.append(shape)
            continue
        try:
            region = _region_of_shape(shape, fields)
        except ValueError as error:
            raise ValueError(f"shape {number}: {error}") from None
        group = shape.get("group_id")
        if group is not None and "mask" not in region:
            groups[repr((group, region["label"]))].append(region)
            if len(groups[repr((group, region["label"]))]) > 1:
                continue
        regions.append(region)
    for parts in groups.values():
        _join_parts(parts)
    aside[_NOTE_SHAPES] += len(others)
    for name in _LABELME_MEMBERS | {name for name in ("flags",) if not fields.get(name)}:
        fields.pop(name, None)
    fields |= {"regions": [*list_of(fields, "regions"), *regions]} | ({"shapes": others} if others else {})


def _join_parts(parts: Sequence[JsonDict]) -> None:
    """Gives the first region of a group the outlines of all, and the box around them."""
    if len(parts) > 1:
        boxes = np.array([part["box"] for part in parts])  # [parts, 4]
        outlines = [outline for part in parts for outline in part.get("polygons") or [_corners(part["box"])]]
        parts[0]["box"] = [*boxes[:, :2].min(0).tolist(), *boxes[:, 2:].max(0).tolist()]
        parts[0]["polygons"] = outlines


def _corners(box: Sequence[float]) -> list[float]:
    left, top, right, bottom = box
    return [left, top, right, top, right, bottom, left, bottom]


def _region_of_shape(shape: JsonMapping, image: JsonMapping) -> JsonDict:
    """A region of a LabelMe shape, as fields. image: with `imageHeight` and `imageWidth`."""
    points = shape.get("points")
    if not isinstance(points, list):
        raise ValueError("its points are missing or no list")
    flat: list[float] = []
    for point in points:
        pair = finite_numbers(point, "one of its points")
        if len(pair) != 2:
            raise ValueError(f"one of its points has {len(pair)} numbers, not two")
        flat += pair
    kind = shape.get("shape_type") or "polygon"
    outline: list[float] = []
    if kind == "circle":
        outline = _circle(flat)
    elif kind in _OUTLINES or (kind == "rectangle" and len(points) == 4 and not _is_upright(flat)):
        if len(points) < 3:
            raise ValueError(f"its outline has {len(points)} points, not three or more")
        outline = flat
    elif kind not in ("rectangle", "mask"):
        raise ValueError(f"its shape_type {kind!r} is not known")
    elif len(points) < 2:
        raise ValueError(f"its {kind} has {len(points)} points, not two")
    xs, ys = (outline or flat)[0::2], (outline or flat)[1::2]
    region: JsonDict = {"label": shape.get("label"), "box": [min(xs), min(ys), max(xs), max(ys)]}
    if kind == "mask":  # its points are the first and the last pixel
        region["box"] = [min(xs), min(ys), max(xs) + 1, max(ys) + 1]
        if shape.get("mask") is not None:
            region["mask"] = _mask(shape["mask"], image, math.floor(min(xs)), math.floor(min(ys)))
    return region | ({"polygons": [outline]} if outline else {})


def _is_upright(flat: Sequence[float]) -> bool:
    """Whether four points are the corners of an upright rectangle."""
    return len(set(flat[0::2])) == 2 and len(set(flat[1::2])) == 2


def _circle(flat: Sequence[float]) -> list[float]:
    """The outline of a circle given by its center and a point on it."""
    if len(flat) != 4:
        raise ValueError(f"its circle has {len(flat) // 2} points, not a center and one more")
    x, y, radius = flat[0], flat[1], math.dist(flat[:2], flat[2:])
    angles = [2 * math.pi * i / _CIRCLE_POINTS for i in range(_CIRCLE_POINTS)]
    return [
        value for angle in angles for value in (x + radius * math.cos(angle), y + radius * math.sin(angle))
    ]


def _mask(encoded: object, image: JsonMapping, left: int, top: int) -> JsonDict:
    """A mask of the whole image from a base64 PNG of a part of it that begins at `left`, `top`."""
    from sightloop.data.images.decode import decode_packed

    height, width = image.get("imageHeight"), image.get("imageWidth")
    if not (isinstance(height, int) and isinstance(width, int)) or min(height, width) < 1:
        raise ValueError("a mask needs imageHeight and imageWidth")
    if height * width > Limits().max_pixels:
        raise ValueError("its image has more pixels than can be read")
    try:
        part = decode_packed(base64.b64decode(encoded if isinstance(encoded, str) else ""))[..., 0] > 0
    except (ImageError, binascii.Error) as error:
        reason = error.reason if isinstance(error, ImageError) else str(error)
        raise ValueError(f"its mask cannot be read: {reason}") from None
    bottom, right = top + part.shape[0], left + part.shape[1]
    if min(left, top) < 0 or bottom > height or right > width:
        raise ValueError("its mask reaches beyond the image")
    mask = np.zeros((height, width), np.bool_)
    mask[top:bottom, left:right] = part
    return encode_rle(mask)


def _take_coordinates(fields: JsonDict, name: str, items: Sequence[object], aside: Counter[str]) -> None:
    """Moves the annotations that have coordinates to `regions`."""
    others: list[object] = []
    regions: list[JsonDict] = []
    for number, item in enumerate(items, 1):
        if not isinstance(item, Mapping) or "coordinates" not in item:
            others.append(item)
            continue
        values = item["coordinates"]
        members = (
            [values.get(side) for side in ("x", "y", "width", "height")] if isinstance(values, Mapping) else 0
        )
        x, y, width, height = finite_numbers(members, f"annotation {number}: its coordinates")
        box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        confidence = item.get("confidence")
        score = {} if confidence is None else {"score": confidence}
        regions.append({"label": item.get("label"), "box": box} | score)
    aside[_NOTE_COORDINATES] += len(others)
    fields[name] = others or None
    if not others:
        del fields[name]
    fields["regions"] = [*list_of(fields, "regions"), *regions]


def list_of(fields: JsonMapping, name: str) -> list[object]:
    """The field if it is a list, else []."""
    value = fields.get(name)
    return value if isinstance(value, list) else []
