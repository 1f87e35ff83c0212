"""POPE as an evaluation task: questions about objects that are there and objects that are not (Li et al. 2023)."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np

from sightloop.data.rng import generator
from sightloop.errors import UsageError
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
from sightloop.evaluation.writing import draw_answers, table_settings, write_answers
from sightloop.metrics import matching_curves, pope_counts, pope_metrics, pope_question, roc_auc, says_yes
from sightloop.types import Floats, JsonDict, Pixels, Sample

if TYPE_CHECKING:
    from sightloop.inference.model import Model

AbsentChoice: TypeAlias = Literal["random", "popular", "adversarial"]

_YES = re.compile(r"\byes\b", re.IGNORECASE)
_MOST = 3  # objects that are there, for each image; as many that are not, for each way of choosing them
_STATEMENT = "there is {} in the image"
_CHOICES: dict[AbsentChoice, str] = {
    "random": "drawn by the seed among all labels",
    "popular": "the labels of most images",
    "adversarial": "the labels that most often occur together with the objects that are there",
}
_HARDEST: AbsentChoice = "adversarial"
_METRICS = {
    "accuracy": "share of right answers",
    "precision": "share of the yeses that are right",
    "recall": "share of the objects that are there to which the answer is yes",
    "F1": "harmonic mean of precision and recall",
    "yes ratio": "share of yeses; half of the objects are there",
    "ROC AUC": "area under the ROC curve of the ITM probabilities, ties count half",
}
_MEASURES = [
    Measure(
        f"{name} ({_HARDEST})",
        f"POPE (Li et al. 2023): {_METRICS[name]}; absent objects: {_CHOICES[_HARDEST]}; of the answers kept of those "
        "drawn (top-k 40)",
        "images",
        (0, 1, 2, 3),
        lambda means, name=name: pope_metrics(means)[name],
    )
    for name in ("accuracy", "F1")
]
_JUDGED = {
    None: 'written freely; no if "no", "No" or "not" is a word of its first sentence, else yes',
    "likelihood": "yes or no, whichever is likelier",
    "itm": f'yes if ITM\'s probability of "{_STATEMENT.format("a ...")}" is 0.5 or more',
}


class PopeObjects(NamedTuple):
    """What is asked about one image.

    Attributes:
        present: up to three objects that are there.
        absent: as many that are not, for each way of choosing them.
    """

    present: tuple[str, ...]
    absent: Mapping[AbsentChoice, tuple[str, ...]]

    @property
    def asked(self) -> list[str]:
        """Every object once, in the order of the questions."""
        return list(
            dict.fromkeys((*self.present, *(name for names in self.absent.values() for name in names)))
        )


class PopeTask:
    """ "Is there a dog in the image?", for labels of boxes of the image and for labels of other images."""

    def __init__(self, options: EvalOptions, samples: Sequence[Sample]) -> None:
        if options.rank_samples is not None and options.score_by is not None:
            raise UsageError("rank_samples: goes without score_by, as answers are drawn and ranked")
        if options.score_by == "both":
            raise UsageError("score_by=both: is of dialogues; choose likelihood or itm")
        self.options = options
        self.objects = draw_objects(samples, options.seed)
        self.settings: JsonDict = {
            "seed": options.seed,
            "score_by": options.score_by,
            "decoding": dict(options.decoding),
            **table_settings(options),
        }

    def wants(self, sample: Sample) -> bool:
        """It needs boxes, and labels of other images that are not here."""
        return sample.key in self.objects

    def phases(self) -> Sequence[TaskPhase]:
        """All questions about an image together: one answer each, and where asked for drawn and ranked ones."""
        if self.options.score_by == "itm":
            hint = " Without score_by (--score-by) a model that answers is asked."
            return [TaskPhase("judging", "answers", over_images(self._judge), "match", hint)]
        hint = ' A model that matches can judge: score_by="itm", --score-by itm.'
        phases = [TaskPhase("answering", "answers", over_images(self._answer), "answer", hint)]
        if self.options.rank_samples is not None:
            phases.append(TaskPhase("drawing and ranking", "ranked", over_images(self._draw), "answer"))
        return phases

    def _answer(self, model: Model, samples: list[Sample], images: list[Pixels]) -> list[JsonDict]:
        candidates = None if self.options.score_by is None else ["yes", "no"]
        return write_answers(model, images, self._questions(samples), self.options, candidates)

    def _draw(self, model: Model, samples: list[Sample], images: list[Pixels]) -> list[JsonDict]:
        return draw_answers(model, images, self._questions(samples), self.options)

    def _questions(self, samples: Sequence[Sample]) -> list[list[str]]:
        return [[pope_question(name) for name in self.objects[sample.key].asked] for sample in samples]

    def _judge(self, model: Model, samples: list[Sample], images: list[Pixels]) -> list[JsonDict]:
        records: list[JsonDict] = []
        for sample, image in zip(samples, images, strict=True):
            texts = [_statement(name) for name in self.objects[sample.key].asked]
            scores = model.match(image, texts).tolist()
            answers = ["yes" if score >= 0.5 else "no" for score in scores]
            records.append({"answers": answers, "scores": [[score] for score in scores]})
        return records

    def score(self, samples: Sequence[Sample], records: Records) -> TaskScores:
        """Each metric for each way of choosing absent objects; images are resampled with all of their questions."""
        keys = [sample.key for sample in samples]
        # [images, 4] for each way: hits, false alarms, misses, correct rejections
        counts: dict[AbsentChoice, Floats] = {choice: np.zeros((len(samples), 4)) for choice in _CHOICES}
        for row, sample in enumerate(samples):
            answer_of = self._answers(sample, records)
            for choice, own in counts.items():
                own[row] = pope_counts(*_pairs(self.objects[sample.key], choice, answer_of)).sum(0)
        tables = [
            MetricTable(
                f"{name} ({choice})",
                f"{protocol}; {self._protocol(choice, int(own.sum()))}",
                "images",
                keys,
                own,
                of_means=lambda means, name=name: pope_metrics(means)[name],
            )
            for name, protocol in _METRICS.items()
            if name != "ROC AUC"
            for choice, own in counts.items()
        ]
        if self.options.score_by is None:
            tables.append(self._unclear_table(samples, records))
        if self.options.score_by == "itm":
            tables += [self._roc_table(choice, samples, records) for choice in _CHOICES]
        weights: JsonDict = {}
        if self.options.rank_samples is not None:
            ranked = self._ranked(samples, records)
            more, weights = ranking_metrics(ranked, self.options.rank_samples, _MEASURES)
            tables += more
        silent = [choice for choice, own in counts.items() if not own[:, :2].any()]
        not_computed = {f"precision ({choice})": "no answer is yes" for choice in silent}
        cases = tuple(self._case(sample, self._answers(sample, records)) for sample in samples)
        example_order = "share of right answers to all questions of an image; disputed: half of them are yes"
        return TaskScores(tuple(tables), not_computed, cases, example_order, weights=weights)

    def _ranked(self, samples: Sequence[Sample], records: Records) -> list[RankedQuestion]:
        """The questions of the hardest way to choose absent objects, with their candidates."""
        ranked: list[RankedQuestion] = []
        for sample in samples:
            own, record = self.objects[sample.key], records[sample.key]
            answer_of = self._answers(sample, records)
            drawn_of = dict(zip(own.asked, record["ranked"], strict=True))
            for name in (*own.present, *own.absent[_HARDEST]):
                drawn, greedy, truth = drawn_of[name], answer_of[name], name in own.present
                count = partial(_outcome, truth=truth)
                ranked.append(ranked_question(sample.key, sample.key, drawn, greedy, count))
        return ranked

    def _answers(self, sample: Sample, records: Records) -> dict[str, str]:
        """Answers by object."""
        answers = records[sample.key]["answers"]
        return dict(zip(self.objects[sample.key].asked, map(str, answers), strict=True))

    def _protocol(self, choice: AbsentChoice, questions: int) -> str:
        return (
            f'POPE (Li et al. 2023): {questions:,} questions "Is there a ... in the image?", up to {_MOST} labels of '
            f"an image's boxes and as many labels without a box there: {_CHOICES[choice]}; the answer is "
            f"{_JUDGED[self.options.score_by]}"
        )

    def _unclear_table(self, samples: Sequence[Sample], records: Records) -> MetricTable:
        """Answers that are no answer to the question, which POPE counts as yes."""
        rows = np.zeros((len(samples), 2))
        for row, sample in zip(rows, samples, strict=True):
            answers = self._answers(sample, records).values()
            row[:] = sum(says_yes(text) and not _YES.search(text) for text in answers), len(answers)
        protocol = "share of answers, to all questions, with neither yes nor no in them, which count as yes"
        keys = [sample.key for sample in samples]
        return MetricTable("neither", protocol, "images", keys, rows, of_means=ratio_of_means)

    def _roc_table(self, choice: AbsentChoice, samples: Sequence[Sample], records: Records) -> MetricTable:
        """Rows: an image's probabilities, first of objects that are there, then of others; NaN fills them up."""
        rows = np.full((len(samples), 2 * _MOST), np.nan)
        for row, sample in zip(rows, samples, strict=True):
            own = self.objects[sample.key]
            scores = dict(zip(own.asked, (s for (s,) in records[sample.key]["scores"]), strict=True))
            row[: len(own.present)] = [scores[name] for name in own.present]
            row[_MOST : _MOST + len(own.present)] = [scores[name] for name in own.absent[choice]]
        protocol = f"{_METRICS['ROC AUC']}; {self._protocol(choice, int(np.isfinite(rows).sum()))}"
        keys = [sample.key for sample in samples]
        return MetricTable(f"ROC AUC ({choice})", protocol, "images", keys, rows, of_rows=_roc_auc)

    def _case(self, sample: Sample, answer_of: Mapping[str, str]) -> ExampleCase:
        present = self.objects[sample.key].present
        right = [name for name, text in answer_of.items() if says_yes(text) == (name in present)]
        wrong = {
            "says yes to": [n for n, text in answer_of.items() if n not in present and says_yes(text)],
            "says no to": [n for n, text in answer_of.items() if n in present and not says_yes(text)],
            "right about": right,
        }
        lines = tuple((what, ", ".join(names)) for what, names in wrong.items() if names)
        yes = sum(map(says_yes, answer_of.values())) / len(answer_of)
        marks = tuple(("people", region) for region in sample.regions)
        return ExampleCase(sample.key, len(right) / len(answer_of), -abs(yes - 0.5), lines, marks)


def draw_objects(samples: Sequence[Sample], seed: int) -> dict[str, PopeObjects]:
    """Objects that are asked about, for each sample with boxes: a function of the samples and the seed.

    As many absent ones as present ones, so that half of the answers are yes. An absent object is no label of the
    image's boxes; where a way of choosing finds none, it is drawn at random. Equal frequencies are ordered by name.

    Raises:
        UsageError: no image lacks a label that another one has.
    """
    labels = {s.key: own for s in samples if (own := set(map(_name, object_labels(s))))}
    counts = Counter(name for own in labels.values() for name in sorted(own))
    popular = sorted(counts, key=lambda name: (-counts[name], name))
    together: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for own in labels.values():
        for name in own:
            together[name].update(other for other in own if other != name)
    companions = {
        name: sorted(others, key=lambda other, others=others: (-others[other], other))
        for name, others in together.items()
    }
    drawn: dict[str, PopeObjects] = {}
    for key, own in labels.items():
        others = [name for name in sorted(counts) if name not in own]
        random = generator("evaluate", "pope", seed, key)
        present = [sorted(own)[i] for i in random.permutation(len(own))[: min(_MOST, len(others))].tolist()]
        shuffled = [others[i] for i in random.permutation(len(others)).tolist()]
        orders: dict[AbsentChoice, list[list[str]]] = {
            "random": [shuffled] * len(present),
            "popular": [popular] * len(present),
            "adversarial": [companions[name] for name in present],
        }
        if present:
            absent: dict[AbsentChoice, tuple[str, ...]] = {
                choice: _first_absent(order, own, shuffled) for choice, order in orders.items()
            }
            drawn[key] = PopeObjects(tuple(present), absent)
    if not drawn:
        raise UsageError(
            "pope: needs images with labeled boxes, and labels that some of them have and others have not"
        )
    return drawn


def _first_absent(orders: Sequence[Sequence[str]], own: set[str], spare: Sequence[str]) -> tuple[str, ...]:
    """For each order its first name that is neither here nor chosen before; of `spare` where there is none."""
    chosen: list[str] = []
    for order in orders:
        chosen.append(next(name for name in (*order, *spare) if name not in own and name not in chosen))
    return tuple(chosen)


def _pairs(
    objects: PopeObjects, choice: AbsentChoice, answer_of: Mapping[str, str]
) -> tuple[list[str], list[bool]]:
    """Answers to the questions of one way of choosing, and whether the object is there."""
    names = (*objects.present, *objects.absent[choice])
    return [answer_of[name] for name in names], [name in objects.present for name in names]


def _outcome(text: str, *, truth: bool) -> TextCounts:
    (counts,) = pope_counts([text], [truth]).tolist()
    return TextCounts(tuple(counts), float(says_yes(text) == truth))


def _name(label: str) -> str:
    return " ".join(label.replace("_", " ").lower().split())


def _statement(name: str) -> str:
    """ "there is a dog in the image"."""
    return _STATEMENT.format(pope_question(name).removeprefix("Is there ").removesuffix(" in the image?"))


def _roc_auc(rows: Floats) -> float:
    """Of probabilities `[N, 6]`: three of objects that are there, three of others, NaN for none."""
    scores, truths = rows.ravel(), np.tile(np.repeat([1, 0], _MOST), len(rows))
    known = np.isfinite(scores)
    return roc_auc(matching_curves(scores[known], truths[known]))
