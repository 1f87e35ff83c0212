"""Boxes and masks: mAP is the official evaluator's, on random boxes with equal scores; overlaps are counted out."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sightloop import UsageError, open_dataset
from sightloop.evaluation.detection import ImageRegions, crowd_of
from sightloop.metrics import detection as module
from sightloop.metrics.detection import (
    detection_not_computed,
    detection_scores,
    grounding_scores,
    label_map_scores,
    mask_intersection_union,
    mask_scores,
    paired_iou,
)
from sightloop.types import Region

SIDE = 200

needs_evaluator = pytest.mark.skipif(
    detection_not_computed() is not None, reason=str(detection_not_computed())
)


def drawn(seed: int) -> tuple[ImageRegions, ImageRegions]:
    """Regions, and others near them with few different scores; label "3" is in no reference."""
    random = np.random.default_rng(seed)

    def region(
        label: str, left: float, top: float, wide: float, high: float, score: float | None = None
    ) -> Region:
        box = (left, top, left + wide, top + high)
        return Region(label, box, ((box[0], box[1], box[2], box[1], box[2], box[3]),), score)

    references: list[list[Region]] = []
    predictions: list[list[Region]] = []
    for _ in range(20):
        known = [
            region(str(random.integers(3)), *random.integers(0, 60, 2), *random.integers(4, 110, 2))
            for _ in range(random.integers(0, 5))
        ]
        found: list[Region] = []
        for one in [*known, *known, *known]:
            left, top, right, bottom = np.array(one.box) + random.integers(-5, 6, 4)
            label = one.label if random.random() < 0.8 else str(random.integers(4))
            sizes = max(right - left, 1), max(bottom - top, 1)
            score = float(random.integers(1, 5)) / 4
            found.append(region(label, max(left, 0), max(top, 0), *sizes, score))
        references.append(known)
        predictions.append(found)
    return predictions, references


def official(predictions: ImageRegions, references: ImageRegions, kind: str) -> list[float]:
    pytest.importorskip("pycocotools", reason="the official COCO evaluator is not installed")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images = [{"id": i, "width": SIDE, "height": SIDE} for i in range(len(references))]
    categories = [{"id": i + 1} for i in range(3)]

    def entry(image: int, region: Region) -> dict[str, Any]:
        left, top, right, bottom = region.box
        box = [left, top, right - left, bottom - top]
        return {"image_id": image, "category_id": int(region.label) + 1, "iscrowd": 0} | {
            "bbox": box,
            "area": box[2] * box[3],
            "segmentation": [list(outline) for outline in region.polygons],
        }

    def dataset(entries: list[dict[str, Any]]) -> Any:
        coco = COCO()
        numbered = [entry | {"id": i + 1} for i, entry in enumerate(entries)]
        coco.dataset = {"images": images, "categories": categories, "annotations": numbered}
        coco.createIndex()
        if kind == "segm":
            for annotation in coco.dataset["annotations"]:
                from pycocotools import mask

                annotation["area"] = float(mask.area(coco.annToRLE(annotation)))
        return coco

    with contextlib.redirect_stdout(io.StringIO()):
        known = dataset(
            [
                entry(i, region) | {"area": np.prod(np.diff(np.reshape(region.box, (2, 2)), axis=0)) / 2}
                for i, regions in enumerate(references)
                for region in regions
            ]
        )
        found = [
            entry(i, region) | {"score": region.score}
            for i, regions in enumerate(predictions)
            for region in regions
            if region.label != "3"
        ]
        evaluator = COCOeval(known, dataset(found), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return [float(value) for value in evaluator.stats]


@needs_evaluator
@pytest.mark.parametrize("by", ["box", "mask"])
@pytest.mark.parametrize("seed", range(3))
def test_equal_to_the_official_evaluator(by: Any, seed: int) -> None:
    predictions, references = drawn(seed)
    sizes = [(SIDE, SIDE)] * len(references) if by == "mask" else None
    scores = detection_scores(predictions, references, by=by, sizes=sizes)
    expected = official(predictions, references, "bbox" if by == "box" else "segm")
    assert len(scores) == sum(value > -1 for value in expected)
    np.testing.assert_allclose(list(scores.values()), [v for v in expected if v > -1], atol=1e-9)


@needs_evaluator
@pytest.mark.parametrize("seed", range(2))
def test_real_annotations_are_scored_as_the_official_evaluator_does(shared_data: Path, seed: int) -> None:
    """Outlines say what is small, and crowds count neither as found nor as missed."""
    coco = pytest.importorskip("pycocotools.coco", reason="the official COCO evaluator is not installed")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    file = shared_data / "coco_mini/annotations/instances_train2017.json"
    random = np.random.default_rng(seed)
    predictions: list[list[Region]] = []
    entries: list[dict[str, Any]] = []
    samples = list(open_dataset(file))
    for sample in samples:
        near = [*sample.regions, *crowd_of(sample)] * 2
        found = [
            replace(
                region,
                box=tuple((np.array(region.box) + random.normal(0, 6, 4)).tolist()),
                polygons=(),
                score=random.random(),
            )
            for region in near
        ]
        predictions.append(found)
        for region in found:
            left, top, right, bottom = region.box
            box = [left, top, right - left, bottom - top]
            entries.append({"image_id": sample.extra["image_id"], "bbox": box, "score": region.score})
    with contextlib.redirect_stdout(io.StringIO()):
        known = coco.COCO(str(file))
        number = {category["name"]: category["id"] for category in known.dataset["categories"]}
        labels = [region.label for regions in predictions for region in regions]
        found = [e | {"category_id": number[label]} for e, label in zip(entries, labels, strict=True)]
        evaluator = cocoeval.COCOeval(known, known.loadRes(found), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    scores = detection_scores(
        predictions, [s.regions for s in samples], crowds=[crowd_of(s) for s in samples]
    )
    np.testing.assert_allclose(list(scores.values()), evaluator.stats, atol=1e-9)


@needs_evaluator
def test_outlines_are_rasterised_as_masks() -> None:
    square = Region("a", (0, 0, 4, 4), ((0, 0, 4, 0, 4, 4, 0, 4),))
    right = Region("a", (2, 0, 6, 4), ((2, 0, 6, 0, 6, 4, 2, 4),))
    assert mask_intersection_union([square], [right]) == (8, 24)
    assert mask_intersection_union([square, right], [square]) == (16, 24)
    assert mask_intersection_union([], [square]) == (0, 16)
    painted = np.zeros((5, 9), bool)
    painted[:, :4] = True
    assert mask_intersection_union([Region("a", (0, 0, 4, 5), mask=painted)], [right]) == (8, 28)
    with pytest.raises(UsageError, match="sizes differ"):
        mask_intersection_union(*([Region("a", (0, 0, 1, 1), mask=painted[n:])] for n in (0, 1)))
    with pytest.raises(UsageError, match="nor polygons"):
        mask_intersection_union([], [Region("a", (0, 0, 1, 1))])


@needs_evaluator
def test_all_found_is_one_and_nothing_found_is_zero() -> None:
    references = [
        [Region("cat", (0, 0, 40, 40))],
        [],
        [Region("dog", (5, 5, 50, 60)), Region("cat", (0, 0, 50, 50))],
    ]
    perfect = detection_scores(references, references)
    assert perfect["mAP"] == pytest.approx(1)
    assert "mAP small" not in perfect
    assert detection_scores([[], [], []], references)["mAP"] == 0


@needs_evaluator
def test_what_does_not_fit_is_said() -> None:
    region = Region("cat", (0, 0, 1, 1))
    with pytest.raises(UsageError, match="1 images, references of 2"):
        detection_scores([[]], [[region], []])
    with pytest.raises(UsageError, match="no region"):
        detection_scores([[]], [[]])
    with pytest.raises(UsageError, match="sizes"):
        detection_scores([[]], [[region]], by="mask")
    with pytest.raises(UsageError, match='"cat" has no polygons'):
        detection_scores([[]], [[region]], by="mask", sizes=[(9, 9)])


def test_without_the_evaluator_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"\.\[evaluate\]"):
        detection_scores([[]], [[Region("cat", (0, 0, 1, 1))]])


def test_overlap_is_that_of_painted_boxes() -> None:
    random = np.random.default_rng(0)
    corners = random.integers(0, 12, (200, 2, 2, 2))
    boxes = np.concatenate([corners.min(2), corners.max(2)], 2).astype(float)  # [N, 2, 4]
    expected: list[float] = []
    for pair in boxes.astype(int):
        first, second = np.zeros((2, 12, 12), bool)
        for canvas, (left, top, right, bottom) in zip((first, second), pair, strict=True):
            canvas[top:bottom, left:right] = True
        expected.append((first & second).sum() / max((first | second).sum(), 1))
    np.testing.assert_allclose(paired_iou(boxes[:, 0], boxes[:, 1]), expected)


def test_grounding() -> None:
    scores = grounding_scores([[0, 0, 2, 2], [0, 0, 2, 2]], [[0, 0, 2, 1], [1, 1, 3, 3]])
    assert scores == {"accuracy@0.5": 0.5, "mean IoU": pytest.approx((1 / 2 + 1 / 7) / 2)}
    with pytest.raises(UsageError):
        grounding_scores(np.zeros((0, 4)), np.zeros((0, 4)))
    with pytest.raises(UsageError, match="twice"):
        grounding_scores(np.zeros((1, 4)), np.zeros((2, 4)))


def test_masks() -> None:
    one, other = np.array([[1, 1], [0, 0]], bool), np.array([[1, 0], [0, 0]], bool)
    scores = mask_scores([one, one & False], [other, one & False])
    assert scores == {"mean IoU": 0.75, "overall IoU": 0.5}
    with pytest.raises(UsageError, match="mask 0"):
        mask_scores([one], [other[:1]])
    with pytest.raises(UsageError):
        mask_scores([], [])


def test_label_maps() -> None:
    scores = label_map_scores([[0, 0, 1, 1]], [[0, 1, 1, 255]], ignored=255)
    assert scores == {"mIoU": 0.5, "pixel accuracy": pytest.approx(2 / 3)}
    with pytest.raises(UsageError, match="ignored"):
        label_map_scores([[0]], [[255]], ignored=255)
    with pytest.raises(UsageError):
        label_map_scores([[0]], [[0, 1]])
