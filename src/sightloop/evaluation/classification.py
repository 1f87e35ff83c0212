"""Classification as an evaluation task: zero-shot, or by a fine-tuned classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sightloop.errors import UsageError
from sightloop.evaluation.predictions import Records
from sightloop.evaluation.results import ExampleCase, MetricTable, TaskScores
from sightloop.evaluation.task import EvalOptions, TaskPhase, over_images
from sightloop.evaluation.templates import TEMPLATES
from sightloop.types import Floats, Integers, JsonDict, Pixels, Sample

if TYPE_CHECKING:
    from sightloop.inference.model import Model

_TOP = 5


class ClassificationTask:
    """Classification of labeled images: by the model's classifier if it was fine-tuned for exactly these labels, else
    zero-shot."""

    def __init__(self, options: EvalOptions, samples: Sequence[Sample]) -> None:
        data_labels = {sample.label for sample in samples if sample.label is not None}
        self.labels = sorted(data_labels) if options.labels is None else list(options.labels)
        if unknown := sorted(data_labels - set(self.labels)):
            raise UsageError(
                f"labels: {unknown[0]!r} is a label of the data, and not among those given; add it"
            )
        if len(self.labels) < 2:
            raise UsageError(
                f"classify: needs at least two labels, but there are {len(self.labels)}; name a folder with subfolders "
                "for the classes, data with a label column, or more labels"
            )
        self.templates = options.template_texts
        self.settings: JsonDict = {"labels": self.labels, "templates": self.templates}

    def wants(self, sample: Sample) -> bool:
        """It needs a label."""
        return sample.label is not None

    def phases(self) -> Sequence[TaskPhase]:
        """One: the labels of highest probability."""
        return [TaskPhase("classifying", "top", over_images(self._classify), "classify")]

    def _classify(self, model: Model, samples: list[Sample], images: list[Pixels]) -> list[JsonDict]:
        fine_tuned = tuple(self.labels) == model.labels
        probabilities = model.classify(images, None if fine_tuned else self.labels, self.templates)  # [B, C]
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :_TOP]
        return [
            {"top": [[self.labels[j], float(row[j])] for j in chosen]}
            | ({"learned": True} if fine_tuned else {})
            for row, chosen in zip(probabilities, best, strict=True)
        ]

    def score(self, samples: Sequence[Sample], records: Records) -> TaskScores:
        """Top-1, top-5, mean over classes, accuracy of each class, and the confusion matrix."""
        keys = [sample.key for sample in samples]
        index_of = {label: i for i, label in enumerate(self.labels)}
        true = np.array([index_of[sample.label or ""] for sample in samples])  # [N]
        tops = [records[key]["top"] for key in keys]
        predicted = np.array([index_of[top[0][0]] for top in tops])  # [N]
        hits = (predicted == true).astype(np.float64)
        top_hits = np.array(
            [s.label in [label for label, _ in top] for s, top in zip(samples, tops, strict=True)], np.float64
        )
        method = self._method(fine_tuned=any("learned" in records[key] for key in keys))

        def accuracy(name: str, protocol: str, chosen: Integers, values: Floats) -> MetricTable:
            chosen_keys = [keys[i] for i in chosen]
            return MetricTable(name, f"{protocol}; {method}", "images", chosen_keys, values[chosen])

        everything = np.arange(len(keys))
        metrics = [accuracy("top-1", "share whose label is the first", everything, hits)]
        if len(self.labels) > _TOP:
            metrics.append(
                accuracy("top-5", "share whose label is among the first five", everything, top_hits)
            )
        metrics.append(
            MetricTable(
                "mean per class",
                f"mean over classes of the share of their images whose label is the first; {method}",
                "images",
                keys,
                np.stack([true, hits], 1),
                of_rows=_mean_per_class,
            )
        )
        for index, label in enumerate(self.labels):
            if len(of_class := np.flatnonzero(true == index)):
                metrics.append(accuracy(f"top-1[{label}]", f"of the images labeled {label}", of_class, hits))
        confusion = np.zeros((len(self.labels),) * 2, np.int64)  # [true, predicted]
        np.add.at(confusion, (true, predicted), 1)
        return TaskScores(
            tuple(metrics),
            cases=tuple(_class_case(s, top) for s, top in zip(samples, tops, strict=True)),
            ranked="probability of the label minus that of the best other; disputed: the first two are close",
            confusion=(tuple(self.labels), confusion),
        )

    def _method(self, *, fine_tuned: bool) -> str:
        """How the classes were predicted, for the protocol."""
        if fine_tuned:
            return f"by the layer that was fine-tuned for these {len(self.labels)} classes"
        names = [name for name, texts in TEMPLATES.items() if texts == self.templates]
        templates = f"the set {names[0]}" if names else " | ".join(self.templates)
        return (
            f"zero-shot over {len(self.labels)} classes; {len(self.templates)} template(s) averaged as embeddings "
            f"(Radford et al. 2021, 3.1.4): {templates}"
        )


def _mean_per_class(rows: Floats) -> float:
    """Mean accuracy of the classes that occur; rows `[N, 2]`: class index, 1 or 0 for a hit."""
    classes = rows[:, 0].astype(np.int64)
    sizes = np.bincount(classes)
    return float((np.bincount(classes, rows[:, 1])[sizes > 0] / sizes[sizes > 0]).mean())


def _class_case(sample: Sample, top: list[tuple[str, float]]) -> ExampleCase:
    own = dict(top).get(sample.label or "", 0.0)
    best_other = max((p for label, p in top if label != sample.label), default=0.0)
    disputed = -(top[0][1] - top[1][1]) if len(top) > 1 else -1.0
    lines = (("label", sample.label or ""), ("model", ", ".join(f"{label} {p:.2f}" for label, p in top[:3])))
    return ExampleCase(sample.key, own - best_other, disputed, lines)
