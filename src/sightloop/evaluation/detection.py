"""Detection, phrase grounding and referring segmentation as evaluation tasks: COCO mAP, box accuracy, mask IoU."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from sightloop.data.datasets.schema import fields_from_region, region_from_fields
from sightloop.errors import UsageError
from sightloop.evaluation.predictions import Records
from sightloop.evaluation.results import ExampleCase, MetricTable, TaskScores, memoize_rows
from sightloop.evaluation.task import EvalOptions, TaskPhase, over_images, row
from sightloop.metrics import detection_scores, mask_intersection_union, paired_iou
from sightloop.types import Floats, JsonDict, Pixels, Region, Sample

if TYPE_CHECKING:
    from sightloop.inference.model import Model

ImageRegions: TypeAlias = list[tuple[Region, ...]]  # of every image

_RESAMPLES = 100  # each is a whole COCO evaluation
_MAX_RESAMPLED_BOXES = 20_000  # with more, the interval would take minutes
_MIN_IOU = 0.5  # of a correct region
_DESCRIPTIONS = {"detect": "detecting objects", "locate": "locating phrases", "segment": "segmenting phrases"}
_FORMAT_HINT = (
    " Or score a file of another program with --predictions FILE: lines of "
    '{"key": ..., "regions": [{"label": "cat", "box": [left, top, right, bottom], "score": 0.9}]}; "polygons" for '
    "masks; the label is the phrase, if one was asked for."
)


class _RegionModel(Protocol):
    """The methods of models that give regions; which of them a model has, its capabilities tell."""

    def detect(self, images: list[Pixels], labels: list[str] | None) -> list[list[Region]]: ...
    def locate(self, images: list[Pixels], phrases: list[str]) -> list[list[Region]]: ...
    def segment(self, images: list[Pixels], phrases: list[str]) -> list[list[Region]]: ...


class DetectionTask:
    """One of three tasks in which a model gives regions.

    detect: boxes of all objects, or of those that `labels` name.
    locate: the box that each label of an image refers to.
    segment: the outline of what each label of an image refers to.
    """

    def __init__(self, verb: Literal["detect", "locate", "segment"], options: EvalOptions) -> None:
        self.verb = verb
        self.labels = None if options.labels is None else list(options.labels)
        self.settings: JsonDict = {"labels": self.labels} if verb == "detect" else {}

    def wants(self, sample: Sample) -> bool:
        """Every image to detect, since regions in an image without objects are wrong; else those with regions."""
        return self.verb == "detect" or bool(self._phrases(sample))

    def phases(self) -> Sequence[TaskPhase]:
        """One: all phrases of an image together."""
        predict = self._detect if self.verb == "detect" else self._ground
        return [TaskPhase(_DESCRIPTIONS[self.verb], "regions", over_images(predict), self.verb, _FORMAT_HINT)]

    def _phrases(self, sample: Sample) -> list[str]:
        """The labels of an image, each once.

        Several regions with one label are one phrase: `locate` needs any of them, `segment` all of them together.
        """
        usable = [
            region
            for region in sample.regions
            if self.verb != "segment" or region.polygons or region.mask is not None
        ]
        return list(dict.fromkeys(region.label for region in usable))

    def _detect(self, model: Model, samples: list[Sample], images: list[Pixels]) -> list[JsonDict]:
        detections = cast(_RegionModel, model).detect(images, self.labels)
        return [{"regions": [fields_from_region(region) for region in regions]} for regions in detections]

    def _ground(self, model: Model, samples: list[Sample], images: list[Pixels]) -> list[JsonDict]:
        """One query per phrase; the image is repeated for each of its phrases."""
        region_model = cast(_RegionModel, model)
        verb = region_model.locate if self.verb == "locate" else region_model.segment
        queries = [(index, text) for index, sample in enumerate(samples) for text in self._phrases(sample)]
        results = verb([images[index] for index, _ in queries], [text for _, text in queries])
        records: list[JsonDict] = [{"regions": []} for _ in samples]
        for (index, text), regions in zip(queries, results, strict=True):
            records[index]["regions"] += [fields_from_region(region) | {"label": text} for region in regions]
        return records

    def score(self, samples: Sequence[Sample], records: Records) -> TaskScores:
        """COCO's mAP and mAR (detect); box accuracy (locate); mean and overall IoU of masks (segment)."""
        predictions: ImageRegions = []
        for sample in samples:
            try:
                predictions.append(
                    tuple(region_from_fields(fields) for fields in records[sample.key]["regions"])
                )
            except ValueError as error:
                raise UsageError(f"{sample.key}: {error}") from error
        if self.verb == "detect":
            return _score_detections(samples, predictions)
        phrases = [
            _Phrase(
                row(sample.key, i), sample.key, _with_label(text, regions), _with_label(text, sample.regions)
            )
            for sample, regions in zip(samples, predictions, strict=True)
            for i, text in enumerate(self._phrases(sample))
        ]
        return (_score_boxes if self.verb == "locate" else _score_masks)(phrases)


class _Phrase(NamedTuple):
    """A phrase of an image, with the regions of the model and those of the data."""

    row_key: str
    key: str
    predicted: tuple[Region, ...]
    references: tuple[Region, ...]


def _with_label(label: str, regions: Sequence[Region]) -> tuple[Region, ...]:
    return tuple(region for region in regions if region.label == label)


def _score_detections(samples: Sequence[Sample], predictions: ImageRegions) -> TaskScores:
    references = [sample.regions for sample in samples]
    crowds = [crowd_of(sample) for sample in samples]
    boxes = sum(map(len, (*predictions, *references)))
    without_score = {region.score is None for regions in predictions for region in regions}
    if len(without_score) == 2:
        raise UsageError(
            "detect: some predicted regions have a score and some have none; give all of them one"
        )
    protocol = "COCO's box evaluation (faster-coco-eval)"
    if True in without_score:
        protocol += "; the predictions have no scores, all count the same"

    def scores(rows: Floats) -> dict[str, float]:
        """COCO's numbers of the images with these indices, which may repeat."""
        chosen = rows.astype(np.int64).tolist()
        if not any(references[i] for i in chosen):
            return {}
        return detection_scores(
            [predictions[i] for i in chosen],
            [references[i] for i in chosen],
            crowds=[crowds[i] for i in chosen],
        )

    keys = [sample.key for sample in samples]
    rows = np.arange(len(samples), dtype=np.float64)  # the indices of the images
    memoized = memoize_rows(scores)
    metrics: list[MetricTable] = []
    for name, value in memoized(rows).items():
        if boxes > _MAX_RESAMPLED_BOXES:
            reason = f"{protocol}; {boxes:,} boxes are too many for an interval by resampling"
            metrics.append(MetricTable.constant(name, reason, "images", keys, value))
            continue
        metrics.append(
            MetricTable(
                name,
                f"{protocol}; interval of {_RESAMPLES} resampled sets",
                "images",
                keys,
                rows,
                of_rows=lambda rows, name=name: memoized(rows).get(name, math.nan),
                resamples=_RESAMPLES,
            )
        )
    cases = tuple(
        _region_case(sample.key, _agreement(regions, sample.regions), regions, sample.regions, masks=False)
        for sample, regions in zip(samples, predictions, strict=True)
    )
    ranked = (
        "agreement: matched regions, of all that people or the model have; disputed: high score and wrong"
    )
    return TaskScores(tuple(metrics), cases=cases, ranked=ranked)


def crowd_of(sample: Sample) -> tuple[Region, ...]:
    """Regions that COCO marks as a crowd: neither to be detected nor wrong to detect."""
    boxes = [(str(each["label"]), *map(float, each["bbox"])) for each in sample.extra.get("crowd", ())]
    return tuple(Region(label, (x, y, x + width, y + height)) for label, x, y, width, height in boxes)


def _agreement(predicted: Sequence[Region], references: Sequence[Region]) -> float:
    """Matched regions, of all that either side has, 0..1.

    Greedy: in order of score, each predicted region is matched with the nearest reference left of its label, from an
    IoU of 0.5 on. 2 matches of 3 predicted and 4 references: 2 / (3 + 4 - 2) = 0.4.
    """
    left = list(references)
    for region in sorted(predicted, key=_score, reverse=True):
        ious = [_iou(region, other) if other.label == region.label else 0.0 for other in left]
        if ious and max(ious) >= _MIN_IOU:
            left.pop(int(np.argmax(ious)))
    matched = len(references) - len(left)
    return matched / max(1, len(predicted) + len(references) - matched)


def _score_boxes(phrases: Sequence[_Phrase]) -> TaskScores:
    """Of each phrase the box with the highest score; of equal ones the first."""
    ious = np.array(
        [
            max(_iou(max(phrase.predicted, key=_score), other) for other in phrase.references)
            if phrase.predicted
            else 0.0
            for phrase in phrases
        ]
    )  # [phrases]
    method = "the box of highest score for each phrase, against what it refers to (the nearest of several)"
    numbers = {
        "accuracy@0.5": (
            f"share with an intersection over union of at least 0.5; {method}",
            ious >= _MIN_IOU,
        ),
        "mean IoU": (f"intersection over union of boxes; {method}", ious),
    }
    return _phrase_scores(phrases, ious, numbers, masks=False)


def _score_masks(phrases: Sequence[_Phrase]) -> TaskScores:
    """All outlines of a phrase together, as one mask."""
    areas = np.array(
        [mask_intersection_union(phrase.predicted, phrase.references) for phrase in phrases]
    )  # [phrases, 2]
    ious = areas[:, 0] / areas[:, 1].clip(1)
    method = "one mask per phrase, rasterized as COCO does"
    numbers = {
        "mIoU": (f"mean over phrases of intersection over union; {method}", ious),
        "overall IoU": (f"sum of all intersections over sum of all unions; {method}", areas),
        "precision@0.5": (
            f"share with an intersection over union of at least 0.5; {method}",
            ious >= _MIN_IOU,
        ),
    }
    return _phrase_scores(phrases, ious, numbers, masks=True)


def _phrase_scores(
    phrases: Sequence[_Phrase],
    ious: Floats,
    numbers: Mapping[str, tuple[str, NDArray[np.generic]]],
    *,
    masks: bool,
) -> TaskScores:
    """Metrics of phrases, and one case per image: its phrase with the lowest IoU.

    Args:
        phrases: phrases of all images.
        ious: intersection over union of each, `[phrases]`.
        numbers: metric -> (protocol, rows `[phrases]`, or `[phrases, 2]`: intersections and unions to be summed).
        masks: outlines are drawn, not boxes.
    """
    metrics = [
        MetricTable(
            name,
            protocol,
            "phrases",
            [phrase.row_key for phrase in phrases],
            rows.astype(np.float64),
            of_means=None if rows.ndim == 1 else lambda means: means[:, 0] / means[:, 1].clip(1e-12),
        )
        for name, (protocol, rows) in numbers.items()
    ]
    worst: dict[str, tuple[float, _Phrase]] = {}
    for iou, phrase in zip(ious.tolist(), phrases, strict=True):
        if iou < worst.get(phrase.key, (2.0, phrase))[0]:
            worst[phrase.key] = (iou, phrase)
    cases = [
        _region_case(key, iou, phrase.predicted, phrase.references, masks)
        for key, (iou, phrase) in worst.items()
    ]
    ranked = "intersection over union of an image's worst phrase; disputed: high score and wrong"
    return TaskScores(tuple(metrics), cases=tuple(cases), ranked=ranked)


def _region_case(
    key: str, quality: float, predicted: Sequence[Region], references: Sequence[Region], masks: bool
) -> ExampleCase:
    """A case with regions drawn as outlines (`masks`) or boxes; disputed is a high score with low quality."""
    top_score = max(map(_score, predicted), default=0.0)
    lines = (
        ("model", _label_counts(predicted)),
        ("people", _label_counts(references)),
        ("agreement", f"{quality:.2f}"),
    )
    marks = tuple(
        (source, region if masks else replace(region, polygons=()))
        for source, regions in (("people", references), ("model", predicted))
        for region in regions
    )
    return ExampleCase(key, quality, top_score * (1 - quality), lines, marks)


def _label_counts(regions: Sequence[Region]) -> str:
    """The labels with their counts: "dog x 2, cat"."""
    counts = Counter(region.label for region in regions)
    return ", ".join(f"{label} x {n}" if n > 1 else label for label, n in counts.items()) or "nothing"


def _score(region: Region) -> float:
    return 1.0 if region.score is None else region.score


def _iou(first: Region, second: Region) -> float:
    return float(paired_iou([first.box], [second.box])[0])
