"""Image-text matching as a task: which pairs belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sightloop.data.rng import generator
from sightloop.errors import UsageError
from sightloop.evaluation.predictions import Records
from sightloop.evaluation.results import ExampleCase, MetricTable, TaskScores, remembered
from sightloop.evaluation.task import EvalOptions, Events, TaskContext, TaskPhase, row
from sightloop.metrics import matching_curves, matching_scores, tokenize
from sightloop.types import Floats, JsonDict, Pixels, Sample

_POOL = 200  # captions that a hard mismatch is chosen among


class MatchingTask:
    """Which score is a match: each caption with its image, against captions of other images."""

    def __init__(self, options: EvalOptions, samples: Sequence[Sample]) -> None:
        self.match_by = options.match_by
        self.wrong = mismatches([s for s in samples if s.captions], options.seed)
        self.settings: JsonDict = {"match_by": options.match_by, "seed": options.seed}

    def wants(self, sample: Sample) -> bool:
        """It needs captions."""
        return bool(sample.captions)

    def phases(self) -> Sequence[TaskPhase]:
        """One: all pairs of an image together."""
        if self.match_by == "itc":
            return [TaskPhase("comparing pairs", "scores", self._score_pairs, "embed")]
        without = ' For the cosine of the embeddings: match_by="itc", --match-by itc.'
        return [TaskPhase("judging pairs", "scores", self._score_pairs, "match", without)]

    def _score_pairs(self, work: TaskContext, samples: list[Sample]) -> Events:
        def verb(some: list[Sample], pictures: list[Pixels]) -> list[JsonDict]:
            texts = [
                t for s in some for i, own in enumerate(s.captions) for t in (own, *self.wrong[s.key][i])
            ]
            owner = [place for place, s in enumerate(some) for _ in range(3 * len(s.captions))]
            model = work.model()
            if self.match_by == "itm":
                scores = model.match([pictures[place] for place in owner], texts)
            else:
                vectors = model.embed_texts(texts)
                images = model.embed_images(pictures)[owner].reshape(len(texts), -1, vectors.shape[1])
                scores = (images * vectors[:, None]).sum(2).max(1)
            ends = np.cumsum([3 * len(sample.captions) for sample in some])[:-1]
            return [{"scores": part.reshape(-1, 3).tolist()} for part in np.split(scores, ends)]

        return work.pictures(samples, verb)

    def score(self, samples: Sequence[Sample], records: Records) -> TaskScores:
        """For random and for hard mismatches: curves, calibration, the recommended threshold and its cost."""
        rows = [row(sample.key, i) for sample in samples for i in range(len(sample.captions))]
        table = np.array([each for sample in samples for each in records[sample.key]["scores"]], np.float64)
        what = "ITM probability" if self.match_by == "itm" else "ITC cosine"
        kinds = {
            "random": "the caption of another image, drawn by the seed",
            "hard": f"of {_POOL} captions of other images, drawn by the seed, the one that shares most words",
        }
        measures: list[MetricTable] = []
        curves: dict[str, tuple[str, str, Floats]] = {}
        for column, (kind, words) in enumerate(kinds.items(), 1):
            pairs = table[:, [0, column]]
            family = remembered(_pair_scores)
            for name in family(pairs):
                protocol = f"{what}; every caption with its image against as many mismatches: {words}"
                if said := _SAID.get(name):
                    protocol = f"{said}; {protocol}"
                measures.append(
                    MetricTable(
                        f"{name} ({kind})",
                        protocol,
                        "captions",
                        rows,
                        pairs,
                        of_rows=lambda drawn, name=name, family=family: family(drawn)[name],
                    )
                )
            drawn = matching_curves(pairs.T.ravel(), np.repeat([1, 0], len(pairs)))
            curves[f"ROC ({kind})"] = (
                "false matches",
                "matches found",
                np.stack([drawn.false_positive_rate, drawn.recall], 1),
            )
            curves[f"precision and recall ({kind})"] = (
                "recall",
                "precision",
                np.stack([drawn.recall, drawn.precision], 1),
            )
        cases = tuple(_pair_case(sample, records[sample.key]["scores"], self.wrong) for sample in samples)
        how = "score of a caption less that of its hard mismatch, the worst of an image; disputed: both are close"
        return TaskScores(tuple(measures), cases=cases, ranked=how, curves=curves)


_SAID = {
    "roc_auc": "area under the ROC curve, ties count half",
    "average_precision": "area under precision and recall",
    "accuracy": "share of pairs on the right side of 0.5",
    "recommended_threshold": "the threshold with the fewest wrong pairs; both kinds of error cost the same",
    "false_match_rate": "mismatches taken for matches at the recommended threshold",
    "missed_match_rate": "matches lost at the recommended threshold",
    "ece": "expected calibration error, 15 bins (Guo et al. 2017)",
    "temperature": "what divides the logits for the least log loss, fitted on these pairs",
    "ece_calibrated": "calibration error with that temperature, on the same pairs",
}


def mismatches(samples: Sequence[Sample], seed: int) -> dict[str, list[tuple[str, str]]]:
    """For every caption of every sample a wrong one drawn at random, and a hard one: of 200 drawn, the one that shares
    the most words. A function of the seed and the samples; no caption of the image itself, in whatever spelling.

    Raises UsageError where no other image has another caption.
    """
    texts = [(sample.key, text) for sample in samples for text in sample.captions]
    tokens = tokenize(text for _, text in texts)
    bags = [set(line.split()) for line in tokens]
    found: dict[str, list[tuple[str, str]]] = {}
    place = 0
    for sample in samples:
        own = set(tokens[place : place + len(sample.captions)])
        chosen: list[tuple[str, str]] = []
        for index in range(len(sample.captions)):
            random = generator("evaluate", "mismatch", seed, sample.key, index)
            order = random.permutation(len(texts)) if len(texts) <= 4 * _POOL else None
            drawn = random.integers(len(texts), size=2 * _POOL) if order is None else order
            others = [j for j in drawn.tolist() if texts[j][0] != sample.key and tokens[j] not in own][:_POOL]
            if not others:
                raise UsageError("matching: needs captions that differ from image to image")
            bag = bags[place + index]
            hard = max(others, key=lambda j: len(bag & bags[j]) / max(1, len(bag | bags[j])))
            chosen.append((texts[others[0]][1], texts[hard][1]))
        found[sample.key] = chosen
        place += len(sample.captions)
    return found


def _pair_scores(pairs: Floats) -> dict[str, float]:
    scores = matching_scores(pairs.T.ravel(), np.repeat([1, 0], len(pairs)))
    return {name: value for name, value in scores.items() if not name.endswith("_at_recommended")}


def _pair_case(
    sample: Sample, scores: list[list[float]], wrong: Mapping[str, list[tuple[str, str]]]
) -> ExampleCase:
    """By the caption that its hard mismatch comes nearest to, or beats."""
    margins = [own - hard for own, _, hard in scores]
    worst = int(np.argmin(margins))
    lines = (
        (f"own {scores[worst][0]:.3f}", sample.captions[worst]),
        (f"hard {scores[worst][2]:.3f}", wrong[sample.key][worst][1]),
    )
    return ExampleCase(sample.key, margins[worst], -abs(margins[worst]), lines)
