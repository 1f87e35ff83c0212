"""Visual question answering as an evaluation task: VQA accuracy, exact match, WUPS, also by type of question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sightloop.evaluation.dataset import PredictBatch
from sightloop.evaluation.predictions import Records
from sightloop.evaluation.ranked_answers import (
    Measure,
    RankedQuestion,
    TextCounts,
    ranked_question,
    ranking_metrics,
)
from sightloop.evaluation.results import ExampleCase, MetricTable, TaskScores
from sightloop.evaluation.task import EvalOptions, RunPhase, TaskPhase, over_images, row
from sightloop.evaluation.writing import draw_answers, write_answers
from sightloop.metrics import exact_match, normalize_answer, vqa_accuracies, wups, wups_not_computed
from sightloop.types import Floats, JsonDict, Pixels, Question, Sample

if TYPE_CHECKING:
    from sightloop.inference.model import Model

_MIN_ANSWERS = (
    4  # per question: with 3, leaving one out, at most 2 match and min(1, matches / 3) stays below 1
)
_MAX_OPENINGS = 12  # first words by which questions are grouped
_RANKED = Measure("exact match", "exact match of the answer kept of those drawn (top-k 40)", "questions")


class _Answered(NamedTuple):
    """A question with the answer of the model."""

    row_key: str
    key: str
    question: Question
    text: str


class VqaTask:
    """Answers to the questions about each image: generated, or ranked among candidates."""

    def __init__(self, options: EvalOptions, samples: Sequence[Sample]) -> None:
        self.options = options
        self.candidates: list[str] | None = None
        self.method = "written freely"  # for the protocols
        if options.answer_by == "rank":
            data_answers = {
                answer for sample in samples for question in sample.questions for answer in question.answers
            }
            self.candidates = sorted(data_answers) if options.candidates is None else list(options.candidates)
            source = "all answers of this data" if options.candidates is None else "a given list"
            self.method = f"chosen among {len(self.candidates):,} candidates ({source})"
        self.settings: JsonDict = {
            "answer_by": options.answer_by,
            "candidates": self.candidates,
            "decoding": dict(options.decoding),
        }
        if options.rank_samples is not None:
            self.settings |= {"rank_samples": options.rank_samples, "rank_by": options.rank_by}

    def wants(self, sample: Sample) -> bool:
        """It needs questions with answers."""
        return any(question.answers for question in sample.questions)

    def phases(self) -> Sequence[TaskPhase]:
        """All questions of an image together: greedy, and where asked for drawn and ranked."""
        phases = [TaskPhase("answering", "answers", self.over(self._answer), "answer")]
        if self.options.rank_samples is not None:
            phases.append(TaskPhase("drawing and ranking", "ranked", self.over(self._rank), "answer"))
        return phases

    def over(self, predict: PredictBatch) -> RunPhase:
        """A phase that applies `predict` to the images."""
        return over_images(predict)

    def _rank(self, model: Model, batch: list[Sample], images: list[Pixels]) -> list[JsonDict]:
        questions = [[question.question for question in sample.questions] for sample in batch]
        return draw_answers(model, images, questions, self.options)

    def _answer(self, model: Model, samples: list[Sample], images: list[Pixels]) -> list[JsonDict]:
        questions = [[question.question for question in sample.questions] for sample in samples]
        return write_answers(model, images, questions, self.options, self.candidates)

    def score(self, samples: Sequence[Sample], records: Records) -> TaskScores:
        """The official accuracy, exact match and WUPS; the first of them also by type of question."""
        answered = [
            _Answered(row(sample.key, i), sample.key, question, str(records[sample.key]["answers"][i]))
            for sample in samples
            for i, question in enumerate(sample.questions)
            if question.answers
        ]
        row_keys = [each.row_key for each in answered]
        texts, references = (
            [each.text for each in answered],
            [list(each.question.answers) for each in answered],
        )
        not_computed: dict[str, str] = {}
        metrics: list[MetricTable] = []

        def add(name: str, protocol: str, scores: Floats) -> None:
            metrics.append(MetricTable(name, f"{protocol}; {self.method}", "questions", row_keys, scores))

        fewest = min(map(len, references))
        if fewest >= _MIN_ANSWERS:
            protocol = "official VQA accuracy, leave one answer out (Antol et al. 2015)"
            add("accuracy", protocol, vqa_accuracies(texts, references))
        else:
            not_computed["accuracy"] = (
                f"the official one needs {_MIN_ANSWERS} answers per question; a question here has {fewest}"
            )
        exact = np.array([exact_match([a], [b]) for a, b in zip(texts, references, strict=True)])
        add("exact match", "equal to an answer, both normalized as for VQA", exact)
        if reason := wups_not_computed():
            not_computed["WUPS"] = reason
        else:
            for threshold in (0.9, 0.0):
                scores = np.array([wups([a], [b], threshold) for a, b in zip(texts, references, strict=True)])
                protocol = f"WUPS at {threshold:g} over WordNet's nouns (Malinowski and Fritz 2014)"
                add(f"WUPS@{threshold:g}", protocol, scores)
        weights: JsonDict = {}
        if self.options.rank_samples is not None:
            ranked = _ranked_questions(samples, records)
            tables, weights = ranking_metrics(ranked, self.options.rank_samples, [_RANKED])
            metrics += tables
        main = metrics[0]
        for question_type, indices in _question_types(answered).items():
            type_keys = [row_keys[i] for i in indices]
            name = f"{main.name}[{question_type}]"
            metrics.append(MetricTable(name, main.protocol, "questions", type_keys, main.rows[indices]))
        cases = _answer_cases(samples, answered, main.rows)
        ranked_by = f"mean {main.name} of the questions of an image, the worst shown; disputed: people differ"
        return TaskScores(tuple(metrics), not_computed, cases, ranked_by, weights=weights)


def _ranked_questions(samples: Sequence[Sample], records: Records) -> list[RankedQuestion]:
    """The questions with their candidates."""
    return [
        ranked_question(
            row(sample.key, i),
            sample.key,
            records[sample.key]["ranked"][i],
            str(records[sample.key]["answers"][i]),
            partial(_exact, answers=question.answers),
        )
        for sample in samples
        for i, question in enumerate(sample.questions)
        if question.answers
    ]


def _exact(text: str, answers: Sequence[str]) -> TextCounts:
    right = exact_match([text], [list(answers)])
    return TextCounts((right,), right)


def _question_types(answered: Sequence[_Answered]) -> dict[str, list[int]]:
    """Question type -> indices of its questions, in alphabetical order.

    Every question has a type by its most frequent answer: "yes/no", "number" or "other". Those that begin with the two
    words of many questions have that type too: "how many ...".
    """
    openings = Counter(_opening(each.question) for each in answered)
    min_count = max(10, len(answered) / 50)
    frequent = {words for words, count in openings.most_common(_MAX_OPENINGS) if count >= min_count}
    indices: dict[str, list[int]] = {}
    for index, each in enumerate(answered):
        answer = Counter(text.strip().lower() for text in each.question.answers).most_common(1)[0][0]
        normalized = normalize_answer(answer)
        answer_type = (
            "yes/no" if normalized in ("yes", "no") else "number" if normalized.isdigit() else "other"
        )
        indices.setdefault(answer_type, []).append(index)
        if (opening := _opening(each.question)) in frequent:
            indices.setdefault(f"{opening} ...", []).append(index)
    return dict(sorted(indices.items()))


def _opening(question: Question) -> str:
    return " ".join(question.question.lower().split()[:2])


def _answer_cases(
    samples: Sequence[Sample], answered: Sequence[_Answered], scores: Floats
) -> tuple[ExampleCase, ...]:
    """One case per image, with its worst question by `scores` `[questions]`; disputed is where people disagree."""
    indices_of: dict[str, list[int]] = {}
    for index, each in enumerate(answered):
        indices_of.setdefault(each.key, []).append(index)
    cases: list[ExampleCase] = []
    for sample in samples:
        if not (indices := indices_of.get(sample.key)):
            continue
        worst = answered[min(indices, key=lambda index: scores[index])]
        counts = Counter(worst.question.answers)
        agreement = max(counts.values()) / len(worst.question.answers)
        people = ", ".join(f"{answer} ({n})" for answer, n in counts.most_common(4))
        lines = (("question", worst.question.question), ("model", worst.text), ("people", people))
        cases.append(ExampleCase(sample.key, float(scores[indices].mean()), 1 - agreement, lines))
    return tuple(cases)
