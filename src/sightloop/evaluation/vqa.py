"""Questions about images as a task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sightloop.evaluation.predictions import Records
from sightloop.evaluation.results import ExampleCase, MetricTable, TaskScores
from sightloop.evaluation.task import EvalOptions, Events, TaskContext, TaskPhase, row
from sightloop.metrics import exact_match, normalize_answer, vqa_accuracies, wups, wups_not_computed
from sightloop.types import JsonDict, Pixels, Sample

_FEWEST_ANSWERS = 4  # with fewer, leaving one out, nobody can reach 1


_MOST_KINDS = 12


class VqaTask:
    """Answers to the questions about each image."""

    def __init__(self, options: EvalOptions, samples: Sequence[Sample]) -> None:
        self.options = options
        self.candidates: list[str] | None = None
        self.source = "written freely"
        if options.answer_by == "rank":
            own = {
                answer for sample in samples for question in sample.questions for answer in question.answers
            }
            self.candidates = sorted(own) if options.candidates is None else list(options.candidates)
            whose = "all answers of this data" if options.candidates is None else "a given list"
            self.source = f"chosen among {len(self.candidates):,} candidates ({whose})"
        self.settings: JsonDict = {
            "answer_by": options.answer_by,
            "candidates": self.candidates,
            "decoding": dict(options.decoding),
        }

    def wants(self, sample: Sample) -> bool:
        """It needs questions with answers."""
        return any(question.answers for question in sample.questions)

    def phases(self) -> Sequence[TaskPhase]:
        """One: all questions of an image together."""
        return [TaskPhase("answering", "answers", self._answer, "answer")]

    def _answer(self, work: TaskContext, samples: list[Sample]) -> Events:
        def verb(some: list[Sample], pictures: list[Pixels]) -> list[JsonDict]:
            counts = [len(sample.questions) for sample in some]
            asked = [question.question for sample in some for question in sample.questions]
            repeated = [p for p, count in zip(pictures, counts, strict=True) for _ in range(count)]
            options = self.options.decoding
            given = work.model().answer(repeated, asked, candidates=self.candidates, **options)
            ends = np.cumsum(counts)
            return [{"answers": given[end - n : end]} for n, end in zip(counts, ends, strict=True)]

        return work.pictures(samples, verb)

    def score(self, samples: Sequence[Sample], records: Records) -> TaskScores:
        """The official accuracy, exact match and WUPS; by kind of answer and by how questions begin."""
        asked = [
            (row(sample.key, i), question, str(records[sample.key]["answers"][i]))
            for sample in samples
            for i, question in enumerate(sample.questions)
            if question.answers
        ]
        rows = [key for key, _, _ in asked]
        written, given = [text for _, _, text in asked], [list(question.answers) for _, question, _ in asked]
        exact = np.array([exact_match([a], [b]) for a, b in zip(written, given, strict=True)])
        how = f"; {self.source}"
        words = f"equal to an answer, both normalised as for VQA{how}"
        measures = [MetricTable("exact match", words, "questions", rows, exact)]
        missing: dict[str, str] = {}
        best = exact
        if (fewest := min(map(len, given))) >= _FEWEST_ANSWERS:
            best = vqa_accuracies(written, given)
            words = f"official VQA accuracy, leave one answer out (Antol et al. 2015){how}"
            measures.insert(0, MetricTable("accuracy", words, "questions", rows, best))
        else:
            missing["accuracy"] = (
                f"the official one needs {_FEWEST_ANSWERS} answers a question; one here has {fewest}"
            )
        if reason := wups_not_computed():
            missing["WUPS"] = reason
        else:
            for limit in (0.9, 0.0):
                near = np.array([wups([a], [b], limit) for a, b in zip(written, given, strict=True)])
                words = f"WUPS at {limit:g} over WordNet's nouns (Malinowski and Fritz 2014){how}"
                measures.append(MetricTable(f"WUPS@{limit:g}", words, "questions", rows, near))
        first = measures[0]
        for kind, chosen in _kinds(asked).items():
            mine = [rows[place] for place in chosen]
            measures.append(
                MetricTable(f"{first.name}[{kind}]", first.protocol, "questions", mine, best[chosen])
            )
        how = (
            f"mean {first.name} of an image's questions, the worst shown; disputed: people answer differently"
        )
        return TaskScores(tuple(measures), (), missing, _answer_cases(samples, asked, best), how)


def _kinds(asked: list[tuple[str, Any, str]]) -> dict[str, list[int]]:
    """Where questions are of each kind: by their commonest answer, and by their first two words."""
    found: dict[str, list[int]] = {}
    openings = Counter(_opening(question.question) for _, question, _ in asked)
    shown = {words for words, count in openings.most_common(_MOST_KINDS) if count >= max(10, len(asked) / 50)}
    for place, (_, question, _) in enumerate(asked):
        answer = Counter(text.strip().lower() for text in question.answers).most_common(1)[0][0]
        plain = normalize_answer(answer)
        kind = "yes/no" if plain in ("yes", "no") else "number" if plain.isdigit() else "other"
        found.setdefault(kind, []).append(place)
        if (opening := _opening(question.question)) in shown:
            found.setdefault(f"{opening} ...", []).append(place)
    return dict(sorted(found.items()))


def _opening(question: str) -> str:
    return " ".join(question.lower().split()[:2])


def _answer_cases(
    samples: Sequence[Sample], asked: list[tuple[str, Any, str]], scores: NDArray[np.float64]
) -> tuple[ExampleCase, ...]:
    """One an image: its worst question. Disputed is where people disagree."""
    places: dict[str, list[int]] = {}
    for place, (key, _, _) in enumerate(asked):
        places.setdefault(key.rpartition("#")[0], []).append(place)
    cases: list[ExampleCase] = []
    for sample in samples:
        if not (mine := places.get(sample.key)):
            continue
        _, question, text = asked[min(mine, key=lambda place: scores[place])]
        counts = Counter(question.answers)
        agreed = max(counts.values()) / len(question.answers)
        people = ", ".join(f"{answer} ({n})" for answer, n in counts.most_common(4))
        lines = (("question", question.question), ("model", text), ("people", people))
        cases.append(ExampleCase(sample.key, float(scores[mine].mean()), 1 - agreed, lines))
    return tuple(cases)
