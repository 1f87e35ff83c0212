"""Detection and segmentation metrics: COCO's mAP, accuracy of grounding, intersection over union (IoU)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sightloop.errors import UsageError, install_command
from sightloop.types import Floats, JsonDict, JsonMapping, Region, Size

# COCO's twelve numbers, in the order of the evaluator.
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
_MAX_SIDE = 1 << 15  # pixels


def detection_scores(
    predictions: Sequence[Sequence[Region]],
    references: Sequence[Sequence[Region]],
    by: Literal["box", "mask"] = "box",
    sizes: Sequence[tuple[int, int]] | None = None,
    crowds: Sequence[Sequence[Region]] | None = None,
) -> dict[str, float]:
    """COCO's mAP and mAR, 0..1, computed by `faster-coco-eval` (the extra `evaluate`).

    `mAP` is the mean over labels and IoU thresholds 0.5, 0.55 ... 0.95 of the 101-point average precision; small,
    medium and large are areas below 32 x 32, below 96 x 96 and above: of outlines (or masks), else of the box.

    Args:
        predictions: for each of N images the detected regions; one without a score counts as 1.
        references: for each image its regions. Labels are compared as strings.
        by: compare boxes or masks; for masks every region needs polygons.
        sizes: (width, height) of each image in pixels; only for masks.
        crowds: for each image the regions that count neither as found nor as missed (COCO's `iscrowd`).

    Returns:
        COCO's twelve numbers by name; those without any reference region (no small one, say) are left out.

    Raises:
        UsageError: lengths that differ, no reference, no sizes for masks, no evaluator (`detection_not_computed`).
    """
    if reason := detection_not_computed():
        raise UsageError(f"detection scores: {reason}")
    if len(predictions) != len(references):
        raise UsageError(f"predictions of {len(predictions)} images, references of {len(references)}")
    labels = sorted({region.label for regions in references for region in regions})
    if not labels:
        raise UsageError("references: there is no region in any image")
    category_of = {label: index + 1 for index, label in enumerate(labels)}
    if by == "mask" and (sizes is None or len(sizes) != len(references)):
        raise UsageError('by="mask": give the (width, height) of every image as `sizes`')
    mask_sizes = sizes if by == "mask" else None
    detections = [
        _coco_entry(image, region, category_of[region.label], mask_sizes)
        | {"score": 1.0 if region.score is None else float(region.score)}
        for image, regions in enumerate(predictions)
        for region in regions
        if region.label in category_of  # a label without references belongs to no class
    ]
    annotations = [
        _coco_entry(image, region, category_of[region.label], mask_sizes)
        | _outline_area(region, mask_sizes)
        | {"iscrowd": int(crowd)}
        for crowd, regions_of_images in ((False, references), (True, crowds or ()))
        for image, regions in enumerate(regions_of_images)
        for region in regions
        if region.label in category_of
    ]
    stats = _coco_stats(
        annotations,
        detections,
        mask_sizes or [(0, 0)] * len(references),  # boxes are compared without the sizes of images
        list(category_of.values()),
        "bbox" if by == "box" else "segm",
    )
    return {name: float(value) for name, value in zip(_NAMES, stats, strict=False) if value > -1}


def detection_not_computed() -> str | None:
    """The reason why mAP cannot be computed here; None if it can."""
    if find_spec("faster_coco_eval") is None:
        return f"faster-coco-eval is not installed: {install_command('evaluate')}"
    return None


def grounding_scores(predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
    """`accuracy@0.5` and `mean IoU`, 0..1, of one box per referring expression.

    Args:
        predictions: `[N, 4]`, left, top, right, bottom in pixels.
        references: `[N, 4]`.
    """
    overlap = paired_iou(predictions, references)
    if not len(overlap):
        raise UsageError("predictions: there is none; give at least one box")
    return {"accuracy@0.5": float((overlap >= 0.5).mean()), "mean IoU": float(overlap.mean())}


def paired_iou(first: ArrayLike, second: ArrayLike) -> Floats:
    """IoU `[N]` of the boxes `first` `[N, 4]` with the boxes `second` `[N, 4]`, one to one; 0 if both are empty."""
    first_boxes, second_boxes = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first_boxes.shape != second_boxes.shape or first_boxes.ndim != 2 or first_boxes.shape[1] != 4:
        raise UsageError(f"boxes {first_boxes.shape} and {second_boxes.shape}: expected twice [N, 4]")
    sides = np.minimum(first_boxes[:, 2:], second_boxes[:, 2:]) - np.maximum(
        first_boxes[:, :2], second_boxes[:, :2]
    )
    intersection = np.prod(np.maximum(sides, 0), 1)  # [N]
    areas = [np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), 1) for boxes in (first_boxes, second_boxes)]
    union = areas[0] + areas[1] - intersection
    return np.divide(intersection, union, out=np.zeros(len(first_boxes)), where=union > 0)


def mask_scores(predictions: Sequence[ArrayLike], references: Sequence[ArrayLike]) -> dict[str, float]:
    """`mean IoU` over pairs of masks, and `overall IoU` of the pixels of all pairs together; both 0..1.

    The IoU of two empty masks is 1.

    Args:
        predictions: N masks, bool `[H, W]`, of any sizes.
        references: N masks of the same sizes.
    """
    if len(predictions) != len(references) or not len(references):
        raise UsageError(
            f"{len(predictions)} predicted masks, {len(references)} references: expected as many"
        )
    intersections: list[int] = []
    unions: list[int] = []
    for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        mask, reference_mask = np.asarray(prediction, bool), np.asarray(reference, bool)
        if mask.shape != reference_mask.shape:
            raise UsageError(f"mask {index}: predicted {mask.shape}, reference {reference_mask.shape}")
        intersections.append(int((mask & reference_mask).sum()))
        unions.append(int((mask | reference_mask).sum()))
    ious = [i / u if u else 1.0 for i, u in zip(intersections, unions, strict=True)]
    overall = sum(intersections) / sum(unions) if sum(unions) else 1.0
    return {"mean IoU": sum(ious) / len(ious), "overall IoU": overall}


def mask_intersection_union(first: Sequence[Region], second: Sequence[Region]) -> tuple[int, int]:
    """Pixels in the masks of both sides, and pixels in the masks of either side.

    The regions of a side are one mask together; outlines are rasterized as in COCO.

    Raises:
        UsageError: no mask and no outline, masks of different sizes, or outlines that cannot be rasterized (see
            `detection_not_computed`).
    """
    regions = [*first, *second]
    sizes = {(region.mask.shape[0], region.mask.shape[1]) for region in regions if region.mask is not None}
    points = [np.reshape(outline, (-1, 2)) for region in regions for outline in region.polygons]
    if len(sizes) > 1 or not (sizes or points):
        raise UsageError(
            f"masks: {'sizes differ: ' + str(sorted(sizes)) if sizes else 'there are none, nor polygons'}"
        )
    # Without a mask, the canvas is as large as the outlines need.
    width, height = (
        np.ceil(np.concatenate(points).max(0)).clip(1, _MAX_SIDE).astype(int).tolist() if points else (0, 0)
    )
    size = next(iter(sizes), (height, width))
    first_mask, second_mask = _rasterize(first, size), _rasterize(second, size)
    return int((first_mask & second_mask).sum()), int((first_mask | second_mask).sum())


def _rasterize(regions: Sequence[Region], size: Size) -> NDArray[np.bool_]:
    """All regions as one mask `[H, W]`; the outlines of a region that has a mask too are ignored."""
    canvas = np.zeros(size, bool)
    for region in regions:
        if region.mask is not None:
            canvas |= np.asarray(region.mask, bool)
        elif region.polygons:
            if reason := detection_not_computed():
                raise UsageError(f"masks: {reason}")
            from faster_coco_eval import mask

            canvas |= np.asarray(mask.decode(_encode_outlines(region, *size)), bool)
    return canvas


def _encode_outlines(region: Region, height: int, width: int) -> JsonDict:
    """The outlines of a region as one run-length encoded mask of COCO."""
    from faster_coco_eval import mask

    runs = mask.frPyObjects([list(outline) for outline in region.polygons], height, width)
    return mask.merge(runs if isinstance(runs, list) else [runs])


def label_map_scores(
    predictions: ArrayLike, references: ArrayLike, ignored: int | None = None
) -> dict[str, float]:
    """`mIoU` over classes and `pixel accuracy` of semantic segmentation, 0..1.

    Classes that occur on neither side are left out of the mean.

    Args:
        predictions: class indices, integers `[..., H, W]`.
        references: the same shape.
        ignored: class index of reference pixels that do not count.
    """
    classes, true_classes = np.asarray(predictions), np.asarray(references)
    if classes.shape != true_classes.shape or not classes.size:
        raise UsageError(
            f"label maps {classes.shape} and {true_classes.shape}: expected twice the same shape"
        )
    valid = np.ones(true_classes.shape, bool) if ignored is None else true_classes != ignored
    classes, true_classes = classes[valid], true_classes[valid]  # [pixels]
    if not len(classes):
        raise UsageError("references: every pixel is ignored")
    ious: list[float] = []
    for index in np.union1d(classes, true_classes):
        predicted, true = classes == index, true_classes == index
        ious.append(float((predicted & true).sum() / (predicted | true).sum()))
    return {"mIoU": sum(ious) / len(ious), "pixel accuracy": float((classes == true_classes).mean())}


def _coco_entry(
    image: int, region: Region, category: int, mask_sizes: Sequence[tuple[int, int]] | None
) -> JsonDict:
    """A region in COCO's format; with mask_sizes its polygons as a mask too."""
    left, top, right, bottom = region.box
    width, height = right - left, bottom - top
    entry: JsonDict = {
        "image_id": image + 1,
        "category_id": category,
        "bbox": [left, top, width, height],
        "area": width * height,
    }
    if mask_sizes is not None:
        from faster_coco_eval import mask

        if not region.polygons:
            raise UsageError(f'image {image}: a region "{region.label}" has no polygons')
        image_width, image_height = mask_sizes[image]
        entry["segmentation"] = _encode_outlines(region, image_height, image_width)
        entry["area"] = float(mask.area(entry["segmentation"]))
    return entry


def _outline_area(region: Region, mask_sizes: Sequence[tuple[int, int]] | None) -> dict[str, float]:
    """{"area": area of a reference's outlines} where boxes are compared; {} where it has none."""
    if mask_sizes is not None or not region.polygons:
        return {}
    corners = [np.reshape(outline, (-1, 2)) for outline in region.polygons]
    # Shoelace formula: twice the signed area of each outline.
    twice = [np.sum(xy[:, 0] * np.roll(xy[:, 1], -1) - xy[:, 1] * np.roll(xy[:, 0], -1)) for xy in corners]
    return {"area": float(np.abs(twice).sum() / 2)}


def _coco_stats(
    annotations: list[JsonDict],
    detections: list[JsonDict],
    sizes: Sequence[tuple[int, int]],
    categories: list[int],
    iou_type: Literal["bbox", "segm"],
) -> Sequence[float]:
    """The evaluator's numbers, in the order of `_NAMES`; -1 for one without references."""
    from faster_coco_eval import COCO, COCOeval_faster

    def dataset(entries: list[JsonDict]) -> COCO:
        content: JsonMapping = {
            "images": [{"id": index + 1, "width": w, "height": h} for index, (w, h) in enumerate(sizes)],
            "categories": [{"id": category, "name": str(category)} for category in categories],
            "annotations": [entry | {"id": index + 1} for index, entry in enumerate(entries)],
        }
        return COCO(content)

    def print_nothing(*_: object) -> None:
        pass

    evaluator = COCOeval_faster(
        dataset(annotations), dataset(detections), iou_type, print_function=print_nothing
    )
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator.stats
