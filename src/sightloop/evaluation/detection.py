"""Tasks in which a model finds things: all of them, those that a phrase refers to, and their outlines."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sightloop.data.datasets.schema import fields_from_region, region_from_fields
from sightloop.errors import UsageError
from sightloop.evaluation.predictions import Records
from sightloop.evaluation.results import ExampleCase, MetricTable, MetricValue, TaskScores, remembered
from sightloop.evaluation.task import EvalOptions, Events, TaskContext, TaskPhase, row
from sightloop.metrics import detection_scores, mask_overlap, paired_iou
from sightloop.types import Floats, JsonDict, Pixels, Region, Sample

Regions: TypeAlias = list[tuple[Region, ...]]

_DETECT_SETS = 100  # each is a whole evaluation
_MOST_BOXES = 20_000  # with more, resampled sets would take minutes
_ENOUGH = 0.5  # of intersection over union
_FORMAT = (
    " Or score a file of another program with --predictions FILE: lines of "
    '{"key": ..., "regions": [{"label": "cat", "box": [left, top, right, bottom], "score": 0.9}]}; "polygons" for '
    "masks; where a phrase was asked for, it is the label."
)


class DetectionTask:
    """detect: everything, or what `labels` name. locate: the box that each label of the data refers to. segment: the
    outline of that."""

    def __init__(self, verb: Literal["detect", "locate", "segment"], options: EvalOptions) -> None:
        self.verb = verb
        self.asked = None if options.labels is None else list(options.labels)
        self.settings: JsonDict = {"labels": self.asked} if verb == "detect" else {}

    def wants(self, sample: Sample) -> bool:
        """To detect, every image counts: what is found where nothing is, is wrong. Else it needs regions."""
        return self.verb == "detect" or bool(self._phrases(sample))

    def phases(self) -> Sequence[TaskPhase]:
        """One: all phrases of an image together."""
        what = {"detect": "finding things", "locate": "locating phrases", "segment": "outlining phrases"}
        return [TaskPhase(what[self.verb], "regions", self._find, self.verb, _FORMAT)]

    def _phrases(self, sample: Sample) -> list[str]:
        """Every label once. Things that share a label are one phrase: any of them is right to locate, and all together
        are to outline."""
        usable = [
            region
            for region in sample.regions
            if self.verb != "segment" or region.polygons or region.mask is not None
        ]
        return list(dict.fromkeys(region.label for region in usable))

    def _find(self, work: TaskContext, samples: list[Sample]) -> Events:
        model: Any = work.model()  # that it has the verb is known by now

        def everything(_: list[Sample], pictures: list[Pixels]) -> list[JsonDict]:
            found: list[list[Region]] = model.detect(pictures, self.asked)
            return [{"regions": [fields_from_region(region) for region in regions]} for regions in found]

        def phrases(some: list[Sample], pictures: list[Pixels]) -> list[JsonDict]:
            asked = [(place, text) for place, sample in enumerate(some) for text in self._phrases(sample)]
            verb = model.locate if self.verb == "locate" else model.segment
            found: list[list[Region]] = verb(
                [pictures[place] for place, _ in asked], [text for _, text in asked]
            )
            records: list[JsonDict] = [{"regions": []} for _ in some]
            for (place, text), regions in zip(asked, found, strict=True):
                records[place]["regions"] += [
                    fields_from_region(region) | {"label": text} for region in regions
                ]
            return records

        return work.pictures(samples, everything if self.verb == "detect" else phrases)

    def score(self, samples: Sequence[Sample], records: Records) -> TaskScores:
        """COCO's mAP and mAR; the accuracy of boxes; mean and overall IoU of masks."""
        found: Regions = []
        for sample in samples:
            try:
                found.append(tuple(region_from_fields(fields) for fields in records[sample.key]["regions"]))
            except ValueError as error:
                raise UsageError(f"{sample.key}: {error}") from error
        if self.verb == "detect":
            return _detected(samples, found)
        pairs = [
            _Phrase(
                row(sample.key, i), sample.key, *(_named(text, every) for every in (regions, sample.regions))
            )
            for sample, regions in zip(samples, found, strict=True)
            for i, text in enumerate(self._phrases(sample))
        ]
        return (_located if self.verb == "locate" else _outlined)(pairs)


class _Phrase(NamedTuple):
    """What a phrase of an image refers to, and what was found for it."""

    row: str
    key: str
    found: tuple[Region, ...]
    known: tuple[Region, ...]


def _named(label: str, regions: Sequence[Region]) -> tuple[Region, ...]:
    return tuple(region for region in regions if region.label == label)


def _detected(samples: Sequence[Sample], found: Regions) -> TaskScores:
    known = [sample.regions for sample in samples]
    crowds = [crowd_of(sample) for sample in samples]
    many = sum(map(len, (*found, *known)))
    unsure = {region.score is None for regions in found for region in regions}
    if len(unsure) == 2:
        raise UsageError(
            "detect: some predicted regions have a score and some have none; give all of them one"
        )
    words = "COCO's box evaluation (faster-coco-eval)"
    if True in unsure:
        words += "; the predictions have no scores, all count the same"

    def scores(rows: Floats) -> dict[str, float]:
        chosen = rows.astype(np.int64).tolist()
        if not any(known[i] for i in chosen):
            return {}
        picked = ([each[i] for i in chosen] for each in (found, known, crowds))
        predictions, references, ignored = picked
        return detection_scores(predictions, references, crowds=ignored)

    whole = np.arange(len(samples), dtype=np.float64)
    facts: list[MetricValue] = []
    measures: list[MetricTable] = []
    family = remembered(scores)
    for name, value in family(whole).items():
        if many > _MOST_BOXES:
            why = f"{words}; {many:,} boxes are too many for an interval by resampling"
            facts.append(MetricValue(name, value, None, None, len(samples), "images", why))
            continue
        measures.append(
            MetricTable(
                name,
                f"{words}; interval of {_DETECT_SETS} resampled sets",
                "images",
                [sample.key for sample in samples],
                whole,
                of_rows=lambda rows, name=name: family(rows).get(name, math.nan),
                sets=_DETECT_SETS,
            )
        )
    cases = tuple(
        _case(sample.key, _agreement(regions, sample.regions), regions, sample.regions, masks=False)
        for sample, regions in zip(samples, found, strict=True)
    )
    how = "agreement: regions found, of all that people or the model have; disputed: sure and wrong"
    return TaskScores(tuple(measures), tuple(facts), cases=cases, ranked=how)


def crowd_of(sample: Sample) -> tuple[Region, ...]:
    """What COCO marks as a crowd: neither to be found nor wrong to find."""
    boxes = [(str(each["label"]), *map(float, each["bbox"])) for each in sample.extra.get("crowd", ())]
    return tuple(Region(label, (x, y, x + wide, y + high)) for label, x, y, wide, high in boxes)


def _agreement(found: Sequence[Region], known: Sequence[Region]) -> float:
    """Regions that agree on label and place, of all that either side has; each found one takes the nearest left."""
    left = list(known)
    for region in sorted(found, key=_surety, reverse=True):
        overlaps = [_overlap(region, other) if other.label == region.label else 0.0 for other in left]
        if overlaps and max(overlaps) >= _ENOUGH:
            left.pop(int(np.argmax(overlaps)))
    agreed = len(known) - len(left)
    return agreed / max(1, len(found) + len(known) - agreed)


def _located(phrases: Sequence[_Phrase]) -> TaskScores:
    """The box that the model is surest of; of equal ones the first."""
    overlaps = np.array(
        [
            max(_overlap(max(phrase.found, key=_surety), other) for other in phrase.known)
            if phrase.found
            else 0.0
            for phrase in phrases
        ]
    )
    how = "the model's surest box for each phrase, against what it refers to (the nearest of several)"
    numbers = {
        "accuracy@0.5": (
            f"share with an intersection over union of at least 0.5; {how}",
            overlaps >= _ENOUGH,
        ),
        "mean IoU": (f"intersection over union of boxes; {how}", overlaps),
    }
    return _of_phrases(phrases, overlaps, numbers, masks=False)


def _outlined(phrases: Sequence[_Phrase]) -> TaskScores:
    """All outlines of a phrase together, as one mask."""
    areas = np.array([mask_overlap(phrase.found, phrase.known) for phrase in phrases])
    overlaps = areas[:, 0] / areas[:, 1].clip(1)
    how = "one mask a phrase, rasterised as COCO does"
    numbers = {
        "mIoU": (f"mean over phrases of intersection over union; {how}", overlaps),
        "overall IoU": (f"sum of all intersections over sum of all unions; {how}", areas),
        "precision@0.5": (
            f"share with an intersection over union of at least 0.5; {how}",
            overlaps >= _ENOUGH,
        ),
    }
    return _of_phrases(phrases, overlaps, numbers, masks=True)


def _of_phrases(
    phrases: Sequence[_Phrase],
    overlaps: Floats,
    numbers: Mapping[str, tuple[str, NDArray[Any]]],
    *,
    masks: bool,
) -> TaskScores:
    """The measures; and for people each image by the phrase that went worst."""
    measures = [
        MetricTable(
            name,
            protocol,
            "phrases",
            [phrase.row for phrase in phrases],
            table.astype(np.float64),
            of_means=None if table.ndim == 1 else lambda means: means[:, 0] / means[:, 1].clip(1e-12),
        )
        for name, (protocol, table) in numbers.items()
    ]
    worst: dict[str, tuple[float, _Phrase]] = {}
    for overlap, phrase in zip(overlaps.tolist(), phrases, strict=True):
        if overlap < worst.get(phrase.key, (2.0, phrase))[0]:
            worst[phrase.key] = (overlap, phrase)
    cases = [_case(key, value, phrase.found, phrase.known, masks) for key, (value, phrase) in worst.items()]
    how = "intersection over union of an image's worst phrase; disputed: sure and wrong"
    return TaskScores(tuple(measures), cases=tuple(cases), ranked=how)


def _case(
    key: str, quality: float, found: Sequence[Region], known: Sequence[Region], masks: bool
) -> ExampleCase:
    """Disputed is where the model is sure and wrong. masks: outlines are drawn, not boxes."""
    sure = max(map(_surety, found), default=0.0)
    lines = (("model", _counted(found)), ("people", _counted(known)), ("agreement", f"{quality:.2f}"))
    sides = (("people", known), ("model", found))
    marks = tuple((who, r if masks else replace(r, polygons=())) for who, side in sides for r in side)
    return ExampleCase(key, quality, sure * (1 - quality), lines, marks)


def _counted(regions: Sequence[Region]) -> str:
    counts = Counter(region.label for region in regions)
    return ", ".join(f"{label} x {n}" if n > 1 else label for label, n in counts.items()) or "nothing"


def _surety(region: Region) -> float:
    return 1.0 if region.score is None else region.score


def _overlap(one: Region, other: Region) -> float:
    return float(paired_iou([one.box], [other.box])[0])
