"""Captioning as an evaluation task: COCO's metrics, CLIPScore, and statistics of the captions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from sightloop.evaluation.predictions import Records
from sightloop.evaluation.results import ExampleCase, MetricTable, TaskScores
from sightloop.evaluation.task import EvalOptions, Events, TaskContext, TaskPhase, over_images
from sightloop.evaluation.writing import how_written, ranking_settings, write_captions
from sightloop.metrics import (
    CaptionScores,
    bleu,
    caption_statistics,
    meteor_spice_not_computed,
    ptb_tokenize,
    score_captions,
)
from sightloop.types import Floats, JsonDict, Pixels, Sample

if TYPE_CHECKING:
    from sightloop.inference.model import Model

_CLIP_PROMPT = "A photo depicts "
_CLIP_WEIGHT = 2.5
_COCO = "COCO's Penn Treebank tokens, lower case, without punctuation; "
_PROTOCOLS = {
    "ROUGE-L": "ROUGE-L, beta 1.2, the mean over images (Lin 2004)",
    "CIDEr": "CIDEr as in COCO's code (CIDEr-D: clipped, sigma 6), document frequencies from these references",
    "CIDEr-D": "the same number as CIDEr, which is CIDEr-D in COCO's code",
    "SPICE": "the official jar, the mean over images",
}


class CaptioningTask:
    """One caption per image, against the captions that people wrote."""

    def __init__(
        self, options: EvalOptions, train_captions: Callable[[], Iterable[str]] = tuple[str]
    ) -> None:
        """Takes the options, and a function that reads the captions of the training data."""
        self.options = options
        self._read_train_captions = train_captions
        self.settings: JsonDict = {
            "prompt": options.prompt,
            "decoding": dict(options.decoding),
            "clip": options.clip,
            **ranking_settings(options),
        }

    @cached_property
    def train_captions(self) -> set[str]:
        """The captions of the training data, as PTB tokens."""
        return set(ptb_tokenize(self._read_train_captions()))

    def wants(self, sample: Sample) -> bool:
        """It needs references."""
        return bool(sample.captions)

    def phases(self) -> Sequence[TaskPhase]:
        """Captions; then, if a model for CLIPScore is named, its cosines."""
        phases = [TaskPhase("captioning", "caption", over_images(self._caption), "caption")]
        if self.options.clip:
            phases.append(
                TaskPhase("embedding for CLIPScore", "cosines", self._embed, model=self.options.clip)
            )
        return phases

    def _caption(self, model: Model, samples: list[Sample], images: list[Pixels]) -> list[JsonDict]:
        return write_captions(model, images, self.options)

    def _embed(self, work: TaskContext, samples: list[Sample]) -> Events:
        """Cosines of each caption with its image, and with the nearest reference."""

        def predict(model: Model, batch: list[Sample], images: list[Pixels]) -> list[JsonDict]:
            cosines: list[JsonDict] = []
            for image, sample in zip(model.embed_images(images), batch, strict=True):
                caption = work.records[sample.key]["caption"]
                texts = model.embed_texts([_CLIP_PROMPT + text for text in (caption, *sample.captions)])
                image_cosine = float((image @ texts[0]).max())
                reference_cosine = float((texts[1:] @ texts[0]).max())
                cosines.append({"cosines": [image_cosine, reference_cosine]})
            return cosines

        return over_images(predict)(work, samples)

    def score(self, samples: Sequence[Sample], records: Records) -> TaskScores:
        """COCO's metrics, statistics of the captions, and CLIPScore where its cosines were computed."""
        keys = [sample.key for sample in samples]
        captions = [str(records[key]["caption"]) for key in keys]
        scores = score_captions(captions, [list(sample.captions) for sample in samples])
        metrics = _coco_metrics(keys, scores)
        not_computed = dict(meteor_spice_not_computed())
        if reason := _cider_not_computed(samples, scores):
            metrics = [metric for metric in metrics if not metric.name.startswith("CIDEr")]
            not_computed |= dict.fromkeys([name for name in _PROTOCOLS if name.startswith("CIDEr")], reason)
        if "SPICE" in scores.per_sample and not np.isfinite(scores.per_sample["SPICE"]).all():
            not_computed["SPICE"] = (
                "the jar gives NaN for images with no proposition in caption and references"
            )
        metrics += self._sample_statistics(keys, captions)
        if all("cosines" in records[key] for key in keys):
            metrics += self._clip_scores(keys, records)
        else:
            not_computed |= dict.fromkeys(
                ("CLIPScore", "RefCLIPScore"), "no embedding model was named for it"
            )
        metrics += _corpus_numbers(keys, captions, scores)
        cases = _caption_cases(samples, captions, scores.per_sample["CIDEr"], scores.per_sample["ROUGE-L"])
        ending = how_written(self.options)
        metrics = [replace(metric, protocol=metric.protocol + ending) for metric in metrics]
        return TaskScores(
            tuple(metrics),
            not_computed,
            cases,
            "CIDEr; disputed: CIDEr and ROUGE-L rank the image differently",
        )

    def _clip_scores(self, keys: list[str], records: Records) -> list[MetricTable]:
        cosines = np.clip([records[key]["cosines"] for key in keys], 0, None)  # [N, 2]
        clip_score, reference = _CLIP_WEIGHT * cosines[:, 0], cosines[:, 1]
        total = clip_score + reference
        harmonic = np.divide(2 * clip_score * reference, total, out=np.zeros(len(keys)), where=total > 0)
        by = f'by {self.options.clip}, "{_CLIP_PROMPT}" before each text (Hessel et al. 2021)'
        protocol = f"2.5 x max(cosine of image and caption, 0), {by}"
        reference_protocol = f"harmonic mean of CLIPScore and the nearest reference, {by}"
        return [
            MetricTable("CLIPScore", protocol, "images", keys, clip_score),
            MetricTable("RefCLIPScore", reference_protocol, "images", keys, harmonic),
        ]

    def _sample_statistics(self, keys: list[str], captions: list[str]) -> list[MetricTable]:
        statistics = [caption_statistics([caption]) for caption in captions]
        length = np.array([each["length"] for each in statistics])
        repetition = np.array([each["repetition"] for each in statistics])
        repetition_protocol = "share of captions in which three words in a row occur twice"
        metrics = [
            MetricTable("length", "words in a caption", "images", keys, length),
            MetricTable("repetition", repetition_protocol, "images", keys, repetition),
        ]
        if self.train_captions:
            unseen = np.array([c not in self.train_captions for c in ptb_tokenize(captions)], np.float64)
            protocol = "share of captions that are not in the training data"
            metrics.append(MetricTable("unseen", protocol, "images", keys, unseen))
        return metrics


def _cider_not_computed(samples: Sequence[Sample], scores: CaptionScores) -> str:
    """Why CIDEr is 0 for any captions; "" if it is not. Its weights are 0 for words that are in all references."""
    if len(samples) < 2:
        return "its weights are document frequencies, which need the references of at least two images"
    if scores.per_sample["CIDEr"].any():
        return ""
    references = [list(sample.captions) for sample in samples]
    if score_captions([texts[0] for texts in references], references).per_sample["CIDEr"].any():
        return ""
    return "the references of all images have the same words, so its weights are 0 for any captions"


def _coco_metrics(keys: list[str], scores: CaptionScores) -> list[MetricTable]:
    metrics = [
        MetricTable(
            f"BLEU-{n}",
            f"{_COCO}corpus BLEU-{n}, closest reference length (Papineni et al. 2002)",
            "images",
            keys,
            scores.bleu_counts.astype(np.float64),
            of_means=lambda means, n=n: bleu(means * len(keys))[:, n - 1],
        )
        for n in range(1, 5)
    ]
    for name, protocol in _PROTOCOLS.items():
        if name in scores.per_sample and np.isfinite(scores.per_sample[name]).all():
            metrics.append(MetricTable(name, _COCO + protocol, "images", keys, scores.per_sample[name]))
    return metrics


def _corpus_numbers(keys: list[str], captions: list[str], scores: CaptionScores) -> list[MetricTable]:
    """Numbers of the whole corpus, without interval."""
    statistics = caption_statistics(captions)
    protocols = {
        "vocabulary": "different words in all captions",
        "distinct": "share of different captions",
    }
    numbers = [
        MetricTable.constant(
            name,
            f"{protocol}; depends on the number of samples, so no interval",
            "images",
            keys,
            statistics[name],
        )
        for name, protocol in protocols.items()
    ]
    if "METEOR" in scores.corpus:
        protocol = f"{_COCO}the official jar over the corpus; no mean over samples, so no interval"
        numbers.append(MetricTable.constant("METEOR", protocol, "images", keys, scores.corpus["METEOR"]))
    return numbers


def _caption_cases(
    samples: Sequence[Sample], captions: list[str], cider: Floats, rouge: Floats
) -> tuple[ExampleCase, ...]:
    """One case per image; disputed is what CIDEr `[N]` ranks high and ROUGE-L `[N]` low, or the reverse."""
    ranks = [np.argsort(np.argsort(scores, kind="stable")) / len(samples) for scores in (cider, rouge)]
    return tuple(
        ExampleCase(
            sample.key,
            float(cider[i]),
            float(abs(ranks[0][i] - ranks[1][i])),
            (
                ("model", captions[i]),
                *(("people", text) for text in sample.captions[:3]),
                ("CIDEr, ROUGE-L", f"{cider[i]:.2f}, {rouge[i]:.2f}"),
            ),
        )
        for i, sample in enumerate(samples)
    )
