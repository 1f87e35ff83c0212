"""Image-text matching as an evaluation task: does the score separate captions of an image from others?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sightloop.data.rng import generator
from sightloop.errors import UsageError
from sightloop.evaluation.predictions import Records
from sightloop.evaluation.results import ExampleCase, MetricTable, TaskScores, memoize_rows
from sightloop.evaluation.task import EvalOptions, TaskPhase, over_images, row
from sightloop.metrics import matching_curves, matching_scores, ptb_tokenize
from sightloop.types import Floats, Floats32, Integers, JsonDict, Pixels, Sample

if TYPE_CHECKING:
    from sightloop.inference.model import Model

_POOL = 200  # captions among which a hard mismatch is chosen

_KINDS = {
    "random": "the caption of another image, drawn by the seed",
    "hard": f"of {_POOL} captions of other images, drawn by the seed, the one that shares most words",
}
_PROTOCOLS = {
    "roc_auc": "area under the ROC curve, ties count half",
    "average_precision": "area under precision and recall",
    "accuracy": "share of pairs on the right side of 0.5",
    "recommended_threshold": "the threshold with the fewest wrong pairs; both kinds of error cost the same",
    "false_match_rate": "mismatches taken for matches at the recommended threshold",
    "missed_match_rate": "matches lost at the recommended threshold",
    "ece": "expected calibration error, 15 bins (Guo et al. 2017)",
    "temperature": "divisor of the logits with the least log loss, fitted on these pairs",
    "ece_calibrated": "calibration error with that temperature, on the same pairs",
}


class Mismatch(NamedTuple):
    """Captions of other images for one caption: a random one, and one that is similar to it."""

    random: str
    hard: str


class MatchingTask:
    """Scores of each caption with its image, of a random and of a hard mismatch with the same image."""

    def __init__(self, options: EvalOptions, samples: Sequence[Sample]) -> None:
        self.match_by = options.match_by
        self.mismatches = draw_mismatches([s for s in samples if s.captions], options.seed)
        self.settings: JsonDict = {"match_by": options.match_by, "seed": options.seed}

    def wants(self, sample: Sample) -> bool:
        """It needs captions."""
        return bool(sample.captions)

    def phases(self) -> Sequence[TaskPhase]:
        """One: all pairs of an image together."""
        if self.match_by == "itc":
            return [TaskPhase("comparing pairs", "scores", over_images(self._cosines), "embed")]
        hint = ' For the cosine of the embeddings: match_by="itc", --match-by itc.'
        return [TaskPhase("judging pairs", "scores", over_images(self._probabilities), "match", hint)]

    def _texts(self, sample: Sample) -> list[str]:
        """Three texts per caption: itself, its random mismatch, its hard mismatch."""
        return [
            text
            for caption, mismatch in zip(sample.captions, self.mismatches[sample.key], strict=True)
            for text in (caption, *mismatch)
        ]

    def _probabilities(self, model: Model, samples: list[Sample], images: list[Pixels]) -> list[JsonDict]:
        texts = [self._texts(sample) for sample in samples]
        pairs = [(image, text) for image, own in zip(images, texts, strict=True) for text in own]
        scores = model.match([image for image, _ in pairs], [text for _, text in pairs])
        return _split_scores(scores, texts)

    def _cosines(self, model: Model, samples: list[Sample], images: list[Pixels]) -> list[JsonDict]:
        texts = [self._texts(sample) for sample in samples]
        owner = np.repeat(np.arange(len(samples)), [len(own) for own in texts])  # image of every text, [T]
        text_vectors = model.embed_texts([text for own in texts for text in own])  # [T, P]
        image_vectors = model.embed_images(images)[owner].reshape(len(owner), -1, text_vectors.shape[1])
        return _split_scores((image_vectors * text_vectors[:, None]).sum(2).max(1), texts)

    def score(self, samples: Sequence[Sample], records: Records) -> TaskScores:
        """For random and for hard mismatches: curves, calibration, the recommended threshold and its errors."""
        row_keys = [row(sample.key, i) for sample in samples for i in range(len(sample.captions))]
        # [captions, 3]: score of the caption, of its random mismatch, of its hard mismatch
        scores = np.array(
            [triple for sample in samples for triple in records[sample.key]["scores"]], np.float64
        )
        score_name = "ITM probability" if self.match_by == "itm" else "ITC cosine"
        metrics: list[MetricTable] = []
        curves: dict[str, tuple[str, str, Floats]] = {}
        for column, (kind, mismatches) in enumerate(_KINDS.items(), 1):
            pairs = scores[:, [0, column]]
            pair_scores = memoize_rows(_pair_scores)
            for name in pair_scores(pairs):
                protocol = (
                    f"{score_name}; every caption with its image against as many mismatches: {mismatches}"
                )
                if name in _PROTOCOLS:
                    protocol = f"{_PROTOCOLS[name]}; {protocol}"
                metrics.append(
                    MetricTable(
                        f"{name} ({kind})",
                        protocol,
                        "captions",
                        row_keys,
                        pairs,
                        of_rows=lambda rows, name=name, pair_scores=pair_scores: pair_scores(rows)[name],
                    )
                )
            roc = matching_curves(*_flat(pairs))
            curves[f"ROC ({kind})"] = (
                "false positive rate",
                "true positive rate",
                np.stack([roc.false_positive_rate, roc.recall], 1),
            )
            curves[f"precision and recall ({kind})"] = (
                "recall",
                "precision",
                np.stack([roc.recall, roc.precision], 1),
            )
        return TaskScores(
            tuple(metrics),
            cases=tuple(
                _pair_case(sample, records[sample.key]["scores"], self.mismatches) for sample in samples
            ),
            ranked="score of an image's worst caption minus that of its hard mismatch; disputed: both are close",
            curves=curves,
        )


def draw_mismatches(samples: Sequence[Sample], seed: int) -> dict[str, list[Mismatch]]:
    """Wrong captions for every caption of every sample: key -> one `Mismatch` per caption.

    The hard one shares the most words of 200 drawn captions (intersection over union of their PTB tokens). Neither is a
    caption of the image itself, however that is capitalized or punctuated. A function of the samples and the seed.

    Raises:
        UsageError: no other image has another caption.
    """
    texts = [(sample.key, text) for sample in samples for text in sample.captions]
    tokens = ptb_tokenize(text for _, text in texts)
    bags = [set(line.split()) for line in tokens]
    mismatches: dict[str, list[Mismatch]] = {}
    first = 0  # index in `texts` of the sample's first caption
    for sample in samples:
        own = set(tokens[first : first + len(sample.captions)])
        chosen: list[Mismatch] = []
        for index in range(len(sample.captions)):
            random = generator("evaluate", "mismatch", seed, sample.key, index)
            order = random.permutation(len(texts)) if len(texts) <= 4 * _POOL else None
            drawn = random.integers(len(texts), size=2 * _POOL) if order is None else order
            pool = [j for j in drawn.tolist() if texts[j][0] != sample.key and tokens[j] not in own][:_POOL]
            if not pool:
                raise UsageError("matching: needs captions that differ from image to image")
            bag = bags[first + index]
            hard = max(pool, key=lambda j: len(bag & bags[j]) / max(1, len(bag | bags[j])))
            chosen.append(Mismatch(texts[pool[0]][1], texts[hard][1]))
        mismatches[sample.key] = chosen
        first += len(sample.captions)
    return mismatches


def _split_scores(scores: Floats32, texts: Sequence[list[str]]) -> list[JsonDict]:
    """Scores `[T]` of the texts of several images as rows of three per caption, image by image."""
    ends = np.cumsum([len(own) for own in texts])[:-1]
    return [{"scores": part.reshape(-1, 3).tolist()} for part in np.split(scores, ends)]


def _flat(pairs: Floats) -> tuple[Floats, Integers]:
    """Scores `[2N]` and labels `[2N]` of pairs `[N, 2]`: first the captions, label 1, then the mismatches, label 0."""
    return pairs.T.ravel(), np.repeat([1, 0], len(pairs))


def _pair_scores(pairs: Floats) -> dict[str, float]:
    scores = matching_scores(*_flat(pairs))
    return {name: value for name, value in scores.items() if not name.endswith("_at_recommended")}


def _pair_case(
    sample: Sample, scores: list[list[float]], mismatches: Mapping[str, list[Mismatch]]
) -> ExampleCase:
    """The caption of an image whose hard mismatch comes nearest to it, or beats it."""
    margins = [own - hard for own, _, hard in scores]
    worst = int(np.argmin(margins))
    lines = (
        (f"own {scores[worst][0]:.3f}", sample.captions[worst]),
        (f"hard {scores[worst][2]:.3f}", mismatches[sample.key][worst].hard),
    )
    return ExampleCase(sample.key, margins[worst], -abs(margins[worst]), lines)
