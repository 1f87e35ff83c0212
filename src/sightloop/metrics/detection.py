"""Scores of boxes and masks: COCO's mAP, accuracy of referring expressions, intersection over union."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sightloop.errors import UsageError
from sightloop.types import Floats, JsonDict, JsonMapping, Region

Regions: TypeAlias = Sequence[Sequence[Region]]

# COCO's twelve numbers, in the evaluator's order.
_NAMES = (
    "mAP",
    "mAP@0.5",
    "mAP@0.75",
    "mAP small",
    "mAP medium",
    "mAP large",
    "mAR@1",
    "mAR@10",
    "mAR@100",
    "mAR small",
    "mAR medium",
    "mAR large",
)
_MOST = 1 << 15  # pixels on a side


def detection_scores(
    predictions: Regions,
    references: Regions,
    by: Literal["box", "mask"] = "box",
    sizes: Sequence[tuple[int, int]] | None = None,
    crowds: Regions | None = None,
) -> dict[str, float]:
    """COCO's mAP and mAR, 0..1, by the evaluator `faster-coco-eval` (the extra `evaluate`).

    predictions: for every image the regions found; one without a score counts as 1. references: for every image its
    regions. crowds: for every image those that nobody counts, whether found or not (COCO's `iscrowd`). Labels are
    compared as they are. `mAP` is the mean over labels and over IoU 0.5, 0.55 ... 0.95 of the 101-point average
    precision; small, medium and large are areas below 32 x 32, below 96 x 96 and above: of a reference's outlines where
    it has some, as COCO's annotations have it, else of the box. With by="mask", of the mask; then every region needs
    polygons, and `sizes` the (width, height) of every image.

    A number that no region can tell (no small thing in the references, say) is left out. Raises UsageError where the
    lengths differ, nothing is to be found, or the evaluator is not installed (see `detection_not_computed`).
    """
    if reason := detection_not_computed():
        raise UsageError(f"detection scores: {reason}")
    if len(predictions) != len(references):
        raise UsageError(f"predictions of {len(predictions)} images, references of {len(references)}")
    labels = sorted({region.label for regions in references for region in regions})
    if not labels:
        raise UsageError("references: there is no region in any image")
    number = {label: index + 1 for index, label in enumerate(labels)}
    if by == "mask" and (sizes is None or len(sizes) != len(references)):
        raise UsageError('by="mask": give the (width, height) of every image as `sizes`')
    outlines = sizes if by == "mask" else None
    found = [
        _entry(picture, region, number[region.label], outlines)
        | {"score": 1.0 if region.score is None else float(region.score)}
        for picture, regions in enumerate(predictions)
        for region in regions
        if region.label in number  # a label that no reference has counts for no class
    ]
    known = [
        _entry(picture, region, number[region.label], outlines)
        | _outlined(region, outlines)
        | {"iscrowd": int(crowd)}
        for crowd, many in ((False, references), (True, crowds or ()))
        for picture, regions in enumerate(many)
        for region in regions
        if region.label in number
    ]
    stats = _evaluated(
        known,
        found,
        outlines or [(0, 0)] * len(references),  # by boxes, the sizes of images do not matter
        list(number.values()),
        "bbox" if by == "box" else "segm",
    )
    return {name: float(value) for name, value in zip(_NAMES, stats, strict=False) if value > -1}


def detection_not_computed() -> str | None:
    """Why mAP cannot be computed here, None where it can."""
    if find_spec("faster_coco_eval") is None:
        return 'faster-coco-eval is not installed: pip install "sightloop[evaluate]"'
    return None


def grounding_scores(predictions: Any, references: Any) -> dict[str, float]:
    """`accuracy@0.5` and `mean IoU` of one box a referring expression; both [N, 4] as left, top, right, bottom."""
    overlap = paired_iou(predictions, references)
    if not len(overlap):
        raise UsageError("predictions: there is none; give at least one box")
    return {"accuracy@0.5": float((overlap >= 0.5).mean()), "mean IoU": float(overlap.mean())}


def paired_iou(first: Any, second: Any) -> Floats:
    """Intersection over union [N] of boxes with boxes, both [N, 4] as left, top, right, bottom; 0 for empty ones."""
    one, other = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if one.shape != other.shape or one.ndim != 2 or one.shape[1] != 4:
        raise UsageError(f"boxes {one.shape} and {other.shape}: expected twice [N, 4]")
    inner = np.minimum(one[:, 2:], other[:, 2:]) - np.maximum(one[:, :2], other[:, :2])
    common = np.prod(np.maximum(inner, 0), 1)
    areas = [np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), 1) for boxes in (one, other)]
    union = areas[0] + areas[1] - common
    return np.divide(common, union, out=np.zeros(len(one)), where=union > 0)


def mask_scores(predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """`mean IoU` over pairs of masks and `overall IoU` of all their pixels together; masks are bool [H, W].

    Two empty masks agree wholly.
    """
    if len(predictions) != len(references) or not len(references):
        raise UsageError(
            f"{len(predictions)} predicted masks, {len(references)} references: expected as many"
        )
    common: list[int] = []
    union: list[int] = []
    for place, (mask, reference) in enumerate(zip(predictions, references, strict=True)):
        one, other = np.asarray(mask, bool), np.asarray(reference, bool)
        if one.shape != other.shape:
            raise UsageError(f"mask {place}: predicted {one.shape}, reference {other.shape}")
        common.append(int((one & other).sum()))
        union.append(int((one | other).sum()))
    each = [c / u if u else 1.0 for c, u in zip(common, union, strict=True)]
    return {"mean IoU": sum(each) / len(each), "overall IoU": sum(common) / sum(union) if sum(union) else 1.0}


def mask_overlap(first: Sequence[Region], second: Sequence[Region]) -> tuple[int, int]:
    """Pixels that the masks of both sides cover, and those that any covers; outlines are rasterised as COCO does.

    Raises UsageError where there is no mask and no outline, masks differ in size, or outlines cannot be rasterised (see
    `detection_not_computed`).
    """
    regions = [*first, *second]
    sizes = {region.mask.shape for region in regions if region.mask is not None}
    points = [np.reshape(outline, (-1, 2)) for region in regions for outline in region.polygons]
    if len(sizes) > 1 or not (sizes or points):
        raise UsageError(
            f"masks: {'sizes differ: ' + str(sorted(sizes)) if sizes else 'there are none, nor polygons'}"
        )
    wide, high = (
        np.ceil(np.concatenate(points).max(0)).clip(1, _MOST).astype(int).tolist() if points else (0, 0)
    )
    one, other = (_painted(side, next(iter(sizes), (high, wide))) for side in (first, second))
    return int((one & other).sum()), int((one | other).sum())


def _painted(regions: Sequence[Region], size: tuple[int, ...]) -> NDArray[np.bool_]:
    """All regions as one mask; the outlines of one that has a mask too do not count."""
    out = np.zeros(size, bool)
    for region in regions:
        if region.mask is not None:
            out |= region.mask
        elif region.polygons:
            if reason := detection_not_computed():
                raise UsageError(f"masks: {reason}")
            from faster_coco_eval import mask

            runs: Any = mask.frPyObjects([list(outline) for outline in region.polygons], *size)
            out |= np.asarray(mask.decode(mask.merge(runs)), bool)
    return out


def label_map_scores(predictions: Any, references: Any, ignored: int | None = None) -> dict[str, float]:
    """`mIoU` over classes and `pixel accuracy` of label maps, integers [..., H, W]; `ignored` is a reference's label
    that does not count. Classes that occur on neither side are left out of the mean."""
    one, other = np.asarray(predictions), np.asarray(references)
    if one.shape != other.shape or not one.size:
        raise UsageError(f"label maps {one.shape} and {other.shape}: expected twice the same shape")
    counts = np.ones(other.shape, bool) if ignored is None else other != ignored
    one, other = one[counts], other[counts]
    if not len(one):
        raise UsageError("references: every pixel is ignored")
    overlaps: list[float] = []
    for label in np.union1d(one, other):
        ours, theirs = one == label, other == label
        overlaps.append(float((ours & theirs).sum() / (ours | theirs).sum()))
    return {"mIoU": sum(overlaps) / len(overlaps), "pixel accuracy": float((one == other).mean())}


def _entry(picture: int, region: Region, label: int, sizes: Sequence[tuple[int, int]] | None) -> JsonDict:
    """A region as COCO writes it."""
    left, top, right, bottom = region.box
    width, height = right - left, bottom - top
    entry: JsonDict = {
        "image_id": picture + 1,
        "category_id": label,
        "bbox": [left, top, width, height],
        "area": width * height,
    }
    if sizes is not None:
        from faster_coco_eval import mask

        if not region.polygons:
            raise UsageError(f'image {picture}: a region "{region.label}" has no polygons')
        wide, high = sizes[picture]
        outlines: Any = mask.frPyObjects([list(outline) for outline in region.polygons], high, wide)
        entry["segmentation"] = mask.merge(outlines)
        entry["area"] = float(mask.area(entry["segmentation"]))
    return entry


def _outlined(region: Region, sizes: Sequence[tuple[int, int]] | None) -> dict[str, float]:
    """A reference's area by its outlines, where boxes are compared."""
    if sizes is not None or not region.polygons:
        return {}
    corners = [np.reshape(outline, (-1, 2)) for outline in region.polygons]
    twice = [np.sum(xy[:, 0] * np.roll(xy[:, 1], -1) - xy[:, 1] * np.roll(xy[:, 0], -1)) for xy in corners]
    return {"area": float(np.abs(twice).sum() / 2)}


def _evaluated(
    known: list[JsonDict],
    found: list[JsonDict],
    sizes: Sequence[tuple[int, int]],
    labels: list[int],
    kind: Literal["bbox", "segm"],
) -> Sequence[float]:
    """The evaluator's numbers."""
    from faster_coco_eval import COCO, COCOeval_faster

    def dataset(entries: list[JsonDict]) -> Any:
        content: JsonMapping = {
            "images": [{"id": index + 1, "width": w, "height": h} for index, (w, h) in enumerate(sizes)],
            "categories": [{"id": label, "name": str(label)} for label in labels],
            "annotations": [entry | {"id": index + 1} for index, entry in enumerate(entries)],
        }
        return COCO(content)

    def silent(*_: object) -> None:
        pass

    evaluator = COCOeval_faster(dataset(known), dataset(found), kind, print_function=silent)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator.stats
