"""CHAIR as an evaluation task: objects that captions name and images do not show (Rohrbach et al. 2018)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from sightloop.errors import UsageError
from sightloop.evaluation.captioning import CaptioningTask
from sightloop.evaluation.predictions import Records
from sightloop.evaluation.ranked_answers import (
    Measure,
    RankedQuestion,
    TextCounts,
    ranked_question,
    ranking_metrics,
)
from sightloop.evaluation.results import ExampleCase, MetricTable, TaskScores, ratio_of_means
from sightloop.evaluation.task import EvalOptions, TaskPhase, object_labels, over_images
from sightloop.evaluation.writing import draw_captions, table_settings
from sightloop.metrics import ObjectNames, chair_counts, coco_objects, present_objects
from sightloop.types import Floats, JsonDict, Pixels, Sample

if TYPE_CHECKING:
    from sightloop.inference.model import Model

_PROTOCOLS = {
    "CHAIRs": "share of captions that name an object which is not there",
    "CHAIRi": "share of the objects named, each as often as it is named, that are not there",
    "object recall": "share of the images' objects that their captions name",
    "objects named": "objects that a caption names, each as often as it is named; one that names none cannot be wrong",
}
_KEPT = "of the caption kept of those drawn (top-k 40)"
_MEASURES = (
    Measure("CHAIRs", f"{_PROTOCOLS['CHAIRs']}; {_KEPT}", "images", less_is_better=True),
    Measure(
        "CHAIRi", f"{_PROTOCOLS['CHAIRi']}; {_KEPT}", "images", (1, 2), ratio_of_means, less_is_better=True
    ),
    Measure("objects named", f"{_PROTOCOLS['objects named']}; {_KEPT}", "images", (2,)),
)
_MIN_MENTIONS = 10  # of an object that has a number of its own
_MAX_OBJECTS = 12  # with a number of their own, those that are named most often


class ChairTask:
    """The captions of the task `captions`, and what they name that is neither boxed nor in people's captions."""

    def __init__(self, options: EvalOptions, samples: Sequence[Sample]) -> None:
        """Reads the list of objects, and the objects of every image.

        Raises:
            UsageError: a list of another form, or one that names nothing in these images.
        """
        self._options = options
        self._captioning = CaptioningTask(replace(options, rank_samples=None, rank_by=None))
        self.settings: JsonDict = {**self._captioning.settings, **table_settings(options)}
        self.names = coco_objects() if options.objects is None else ObjectNames(options.objects)
        self._present = {
            sample.key: present_objects(object_labels(sample), sample.captions, self.names)
            for sample in samples
        }
        if not any(self._present.values()) and any(map(self.wants, samples)):
            raise UsageError(
                f"chair: no box and no caption of the data names one of {len(self.names.names)} objects "
                f"({', '.join(self.names.names[:3])}, ...): give a list of the data's own objects "
                "(--objects FILE, with lines such as dog: puppy, hound)"
            )

    def wants(self, sample: Sample) -> bool:
        """It needs boxes or captions."""
        return bool(object_labels(sample) or sample.captions)

    def phases(self) -> Sequence[TaskPhase]:
        """That of the captions, and where asked for drawn and ranked ones."""
        phases = list(self._captioning.phases()[:1])
        if self._options.rank_samples is not None:
            phases.append(TaskPhase("drawing and ranking", "ranked", over_images(self._draw), "caption"))
        return phases

    def _draw(self, model: Model, samples: list[Sample], images: list[Pixels]) -> list[JsonDict]:
        return draw_captions(model, images, self._options)

    def score(self, samples: Sequence[Sample], records: Records) -> TaskScores:
        """CHAIRs, CHAIRi and what the captions do name; images are resampled."""
        keys = [sample.key for sample in samples]
        captions = {key: str(records[key]["caption"]) for key in keys}
        # [images, 4]: mentions, hallucinated ones, different objects that are named rightly, objects of the image
        counts = np.array(
            [chair_counts(captions[key], self._present[key], self.names) for key in keys], np.float64
        )
        truth = self._truth(samples)
        lied = (counts[:, 1] > 0).astype(np.float64)
        tables = [
            MetricTable("CHAIRs", f"{_PROTOCOLS['CHAIRs']}; {truth}", "images", keys, lied),
            _ratio("CHAIRi", f"{_PROTOCOLS['CHAIRi']}; {truth}", keys, counts[:, [1, 0]]),
            _ratio("object recall", f"{_PROTOCOLS['object recall']}; {truth}", keys, counts[:, [2, 3]]),
            MetricTable("objects named", _PROTOCOLS["objects named"], "images", keys, counts[:, 0]),
        ]
        tables += self._by_object(keys, captions)
        weights: JsonDict = {}
        if self._options.rank_samples is not None:
            ranked = self._ranked(samples, records)
            more, weights = ranking_metrics(ranked, self._options.rank_samples, _MEASURES)
            tables += more
        not_computed = {} if counts[:, 0].any() else {"CHAIRi": "no caption names an object of the list"}
        cases = tuple(self._case(sample, captions[sample.key]) for sample in samples)
        example_order = (
            "objects that are not there, then those that are; disputed: a box and people's captions disagree"
        )
        return TaskScores(tuple(tables), not_computed, cases, example_order, weights=weights)

    def _ranked(self, samples: Sequence[Sample], records: Records) -> list[RankedQuestion]:
        """The images with the captions that were drawn."""
        ranked: list[RankedQuestion] = []
        for sample in samples:
            key, record = sample.key, records[sample.key]
            count = partial(self._count, key=key)
            ranked.append(ranked_question(key, key, record["ranked"], str(record["caption"]), count))
        return ranked

    def _count(self, caption: str, key: str) -> TextCounts:
        """Whether a caption names what is not there, such mentions, all mentions; without any it is right."""
        counts = chair_counts(caption, self._present[key], self.names)
        wrong = float(counts.hallucinated > 0)
        return TextCounts((wrong, counts.hallucinated, counts.mentions), 1 - wrong)

    def _truth(self, samples: Sequence[Sample]) -> str:
        """What counts as there, for the protocols."""
        boxes, texts = sum(bool(object_labels(s)) for s in samples), sum(bool(s.captions) for s in samples)
        return (
            f"CHAIR (Rohrbach et al. 2018), {len(self.names.names)} objects; there is what a box ({boxes:,} of "
            f"{len(samples):,} images have any) or a caption by people ({texts:,} have any) names"
        )

    def _by_object(self, keys: Sequence[str], captions: dict[str, str]) -> list[MetricTable]:
        """CHAIRi of the objects that are named most often."""
        mentioned = {key: Counter(m.name for m in self.names.mentions(captions[key])) for key in keys}
        totals = Counter[str]()
        for counter in mentioned.values():
            totals.update(counter)
        tables: list[MetricTable] = []
        for name, total in totals.most_common(_MAX_OBJECTS):
            if total >= _MIN_MENTIONS:
                own = [key for key in keys if mentioned[key][name]]
                rows = [
                    [mentioned[k][name] * (name not in self._present[k]), mentioned[k][name]] for k in own
                ]
                protocol = f"share of the {total:,} mentions of {name} in images without one"
                tables.append(_ratio(f"CHAIRi[{name}]", protocol, own, np.array(rows, np.float64)))
        return tables

    def _case(self, sample: Sample, caption: str) -> ExampleCase:
        present = self._present[sample.key]
        mentions = self.names.mentions(caption)
        wrong = [
            m.word if m.word == m.name else f"{m.word} ({m.name})" for m in mentions if m.name not in present
        ]
        counts = chair_counts(caption, present, self.names)
        boxed = present_objects(object_labels(sample), (), self.names)
        captioned = present_objects((), sample.captions, self.names)
        doubtful = len((boxed ^ captioned) & {m.name for m in mentions}) if boxed and captioned else 0
        lines = [("model", caption)]
        lines += [("not there", ", ".join(wrong))] if wrong else []
        lines += [("there", ", ".join(sorted(present)))] if present else []
        lines += [("people", text) for text in sample.captions[:2]]
        marks = tuple(("people", region) for region in sample.regions)
        quality = counts.recalled / (counts.present + 1) - counts.hallucinated
        return ExampleCase(sample.key, quality, doubtful, tuple(lines), marks)


def _ratio(name: str, protocol: str, keys: Sequence[str], rows: Floats) -> MetricTable:
    """A ratio of sums over images: rows `[N, 2]`, numerator and denominator."""
    return MetricTable(name, protocol, "images", keys, rows, of_means=ratio_of_means)
