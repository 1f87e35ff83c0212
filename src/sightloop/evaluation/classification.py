"""Tasks in which a model chooses or scores: classes, matching pairs, features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sightloop.errors import UsageError
from sightloop.evaluation.predictions import Records
from sightloop.evaluation.results import ExampleCase, MetricTable, TaskScores
from sightloop.evaluation.task import EvalOptions, Events, TaskContext, TaskPhase
from sightloop.evaluation.templates import TEMPLATES
from sightloop.types import Floats, JsonDict, Pixels, Sample

_TOP = 5


class ClassificationTask:
    """Classification of labelled images: by the model's own layer where it was fine-tuned for these very labels,
    zero-shot otherwise."""

    def __init__(self, options: EvalOptions, samples: Sequence[Sample]) -> None:
        own = {sample.label for sample in samples if sample.label is not None}
        self.labels = sorted(own) if options.labels is None else list(options.labels)
        if strange := sorted(own - set(self.labels)):
            raise UsageError(f"labels: {strange[0]!r} is a label of the data, and not among those given")
        if len(self.labels) < 2:
            raise UsageError("classify: needs at least two labels")
        self.templates = options.sentences
        self.settings: JsonDict = {"labels": self.labels, "templates": self.templates}

    def _named(self) -> str:
        known = [name for name, texts in TEMPLATES.items() if texts == self.templates]
        return f"the set {known[0]}" if known else " | ".join(self.templates)

    def wants(self, sample: Sample) -> bool:
        """It needs a label."""
        return sample.label is not None

    def phases(self) -> Sequence[TaskPhase]:
        """One."""
        return [TaskPhase("classifying", "top", self._classify, "classify")]

    def _classify(self, work: TaskContext, samples: list[Sample]) -> Events:
        def verb(_: list[Sample], pictures: list[Pixels]) -> list[JsonDict]:
            model = work.model()
            learned = tuple(self.labels) == model.labels
            found = model.classify(pictures, None if learned else self.labels, self.templates)
            best = np.argsort(-found, axis=1, kind="stable")[:, :_TOP]
            return [
                {"top": [[self.labels[j], float(row[j])] for j in chosen]}
                | ({"learned": True} if learned else {})
                for row, chosen in zip(found, best, strict=True)
            ]

        return work.pictures(samples, verb)

    def score(self, samples: Sequence[Sample], records: Records) -> TaskScores:
        """Top-1, top-5, the mean over classes, each class, and who is taken for whom."""
        keys = [sample.key for sample in samples]
        number = {label: i for i, label in enumerate(self.labels)}
        true = np.array([number[sample.label or ""] for sample in samples])
        tops = [records[key]["top"] for key in keys]
        first = np.array([number[top[0][0]] for top in tops])
        hit = (first == true).astype(np.float64)
        many = np.array(
            [s.label in [label for label, _ in top] for s, top in zip(samples, tops, strict=True)]
        )
        learned = any("learned" in records[key] for key in keys)
        how = (
            f"by the layer that was fine-tuned for these {len(self.labels)} classes"
            if learned
            else (
                f"zero-shot over {len(self.labels)} classes; {len(self.templates)} template(s) averaged as embeddings "
                f"(Radford et al. 2021, 3.1.4): {self._named()}"
            )
        )

        def per_class(table: Floats) -> float:
            of = table[:, 0].astype(np.int64)
            sizes = np.bincount(of)
            return float((np.bincount(of, table[:, 1])[sizes > 0] / sizes[sizes > 0]).mean())

        def accuracy(name: str, words: str, chosen: NDArray[np.int64], values: Floats) -> MetricTable:
            rows = [keys[i] for i in chosen]
            return MetricTable(name, f"{words}; {how}", "images", rows, values[chosen])

        whole = np.arange(len(keys))
        measures = [accuracy("top-1", "share whose label is the first", whole, hit)]
        if len(self.labels) > _TOP:
            measures.append(
                accuracy("top-5", "share whose label is among the first five", whole, many.astype(np.float64))
            )
        measures.append(
            MetricTable(
                "mean per class",
                f"mean over classes of the share of their images whose label is the first; {how}",
                "images",
                keys,
                np.stack([true, hit], 1),
                of_rows=per_class,
            )
        )
        for place, label in enumerate(self.labels):
            if len(mine := np.flatnonzero(true == place)):
                measures.append(accuracy(f"top-1[{label}]", f"of the images labelled {label}", mine, hit))
        table = np.zeros((len(self.labels),) * 2, np.int64)
        np.add.at(table, (true, first), 1)
        cases = tuple(_class_case(s, top) for s, top in zip(samples, tops, strict=True))
        how = "probability of the label less that of the best other; disputed: the first two are close"
        return TaskScores(tuple(measures), cases=cases, ranked=how, confusion=(tuple(self.labels), table))


def _class_case(sample: Sample, top: list[tuple[str, float]]) -> ExampleCase:
    mine = dict(top).get(sample.label or "", 0.0)
    wrong = max((p for label, p in top if label != sample.label), default=0.0)
    close = -(top[0][1] - top[1][1]) if len(top) > 1 else -1.0
    lines = (("label", sample.label or ""), ("model", ", ".join(f"{label} {p:.2f}" for label, p in top[:3])))
    return ExampleCase(sample.key, mine - wrong, close, lines)
