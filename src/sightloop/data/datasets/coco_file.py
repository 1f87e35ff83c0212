"""Content of one COCO JSON file, with the types of its members checked: what `CocoSource` puts together.

An entry that has no usable id is left out and counted by reason, so that one of them stops nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias, TypeGuard

from sightloop.data.datasets.rle import decode_rle, mask_box
from sightloop.data.datasets.values import check_corners, check_text, finite_numbers
from sightloop.data.json_members import RepeatedNames, parse_tolerant, repeated_name
from sightloop.errors import UsageError
from sightloop.types import JsonDict, JsonMapping, MaskRuns, Region

CocoId: TypeAlias = int | str
_MEMBERS = ("images", "annotations", "questions", "categories")
_REGION_MEMBERS = ("bbox", "segmentation")


def read_coco_file(path: Path, data: bytes) -> JsonDict:
    """The object of a file; each of its members `_MEMBERS` is a list. Raises UsageError."""
    try:
        content, has_repeats = parse_tolerant(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as COCO JSON: {error}") from error
    if not isinstance(content, dict) or not any(member in content for member in _MEMBERS[:3]):
        raise UsageError(f"{path} cannot be read as COCO JSON: it has no images, annotations or questions.")
    if isinstance(content, RepeatedNames):
        raise UsageError(f"{path}: the name {content.repeated!r} occurs twice; keep one of the two lists.")
    for member in _MEMBERS:
        value = content.setdefault(member, [])
        if value is None:
            content[member] = []
        elif not isinstance(value, list):
            raise UsageError(f"{path} cannot be read as COCO JSON: its {member} are not a list.")
        elif has_repeats:
            content[member] = [_as_repeated(item) for item in value]
    return content


def is_id(value: object) -> TypeGuard[CocoId]:
    """Whether a value can be an id: a whole number or a text."""
    return isinstance(value, int | str) and not isinstance(value, bool)


def objects(content: JsonMapping, member: str, left_out: Counter[str]) -> Iterator[JsonDict]:
    """The entries of a member that are objects in which no name occurs twice; others are counted."""
    for item in content[member]:
        if isinstance(item, RepeatedNames):
            left_out[f"entries of {member} have the name {item.repeated!r} twice and are left out"] += 1
        elif isinstance(item, dict):
            yield item
        else:
            left_out[f"entries of {member} are no objects and are left out"] += 1


def _as_repeated(item: object) -> object:
    """An entry with a repeated name anywhere in it as a `RepeatedNames`."""
    name = repeated_name(item)
    if name is None or isinstance(item, RepeatedNames):
        return item
    repeated = RepeatedNames()
    repeated.repeated = name
    return repeated


def file_name(image: JsonMapping) -> str | None:
    """The path of an image; in LVIS it is the end of its address: ".../val2017/1.jpg" -> "val2017/1.jpg"."""
    name, address = image.get("file_name"), image.get("coco_url")
    if isinstance(name, str) and name:
        return name
    if name is None and isinstance(address, str) and address:
        return "/".join(address.split("/")[-2:])
    return None


def annotation_kind(annotation: JsonMapping) -> str:
    """ "question", "caption", "region" or "label"; or, for what is left out, the reason, in plural."""
    if "question_id" in annotation:
        return "question"
    if "caption" in annotation:
        return "caption"
    if "segments_info" in annotation:
        return "panoptic annotations are left out"
    if any(annotation.get(member) for member in _REGION_MEMBERS):
        return "region"
    if "category_id" in annotation and not any(member in annotation for member in _REGION_MEMBERS):
        return "label"
    if any(member in annotation for member in _REGION_MEMBERS):
        return "annotations without a box and without an outline are left out"
    return "annotations are neither captions, regions nor answers and are left out"


def region_from_annotation(annotation: JsonMapping, label: str) -> Region:
    """A region. Raises ValueError with the reason."""
    outlines, mask = _read_segmentation(annotation.get("segmentation"))
    bbox = annotation.get("bbox")
    score = annotation.get("score")
    if bbox:
        numbers = finite_numbers(bbox, "its bbox")
        if len(numbers) != 4:
            raise ValueError(f"its bbox has {len(numbers)} numbers, not four")
        left, top, width, height = numbers
        box = (left, top, left + width, top + height)
        check_corners(box, "its bbox")
    elif mask is not None:
        box = mask_box(mask)
    else:
        xs, ys = [x for o in outlines for x in o[0::2]], [y for o in outlines for y in o[1::2]]
        box = (min(xs), min(ys), max(xs), max(ys))
    confidence = None if score is None else finite_numbers([score], "its score")[0]
    return Region(label, box, outlines, confidence, mask)


def answers(annotation: JsonMapping) -> tuple[str, ...]:
    """Answers to a question: VQA's `answers` or `multiple_choice_answer`. Raises ValueError for one that is no text."""
    value = annotation.get("answers") or annotation.get("multiple_choice_answer")
    items = value if isinstance(value, list) else [value]
    texts = [item.get("answer") if isinstance(item, Mapping) else item for item in items]
    texts = [str(text) if isinstance(text, int | float) else text for text in texts if text is not None]
    return tuple(check_text(text, "answer") for text in texts)


def _read_segmentation(value: object) -> tuple[tuple[tuple[float, ...], ...], MaskRuns | None]:
    """Outlines, or a mask. A bare list of numbers is one outline."""
    if not value:
        return (), None
    if isinstance(value, Mapping):
        try:
            return (), decode_rle(value)
        except ValueError as error:
            raise ValueError(f"its segmentation: {error}") from None
    if not isinstance(value, list):
        raise ValueError("its segmentation is neither a list of outlines nor a run-length encoding")
    outlines = value if isinstance(value[0], list) else [value]
    polygons = tuple(finite_numbers(outline, "an outline of its segmentation") for outline in outlines)
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(
                f"an outline of its segmentation has {len(polygon)} numbers, not an even number from 6"
            )
    return polygons, None
