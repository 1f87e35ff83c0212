"""Tasks in which a model writes: captions, and answers to questions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sightloop.evaluation.predictions import Records
from sightloop.evaluation.results import ExampleCase, MetricTable, MetricValue, TaskScores
from sightloop.evaluation.task import EvalOptions, Events, TaskContext, TaskPhase
from sightloop.metrics import bleu, caption_facts, meteor_spice_not_computed, score_captions, tokenize
from sightloop.types import JsonDict, Pixels, Sample

_CLIP_PROMPT = "A photo depicts "
_CLIP_WEIGHT = 2.5


class CaptioningTask:
    """One caption an image, against the captions that people wrote."""

    def __init__(self, options: EvalOptions, training: Callable[[], Iterable[str]] = tuple[str]) -> None:
        self.options = options
        self._training = training
        self.settings: JsonDict = {
            "prompt": options.prompt,
            "decoding": dict(options.decoding),
            "clip": options.clip,
        }

    @cached_property
    def seen(self) -> set[str]:
        """The captions of the training data, as tokens."""
        return set(tokenize(self._training()))

    def wants(self, sample: Sample) -> bool:
        """It needs references."""
        return bool(sample.captions)

    def phases(self) -> Sequence[TaskPhase]:
        """Captions; then, where a model for it is named, what CLIPScore needs."""
        write = TaskPhase("captioning", "caption", self._write, "caption")
        return [write, TaskPhase("embedding for CLIPScore", "cosines", self._cosines)][
            : 1 + bool(self.options.clip)
        ]

    def _write(self, work: TaskContext, samples: list[Sample]) -> Events:
        def verb(_: list[Sample], pictures: list[Pixels]) -> list[JsonDict]:
            captions = work.model().caption(pictures, self.options.prompt, **self.options.decoding)
            return [{"caption": caption} for caption in captions]

        return work.pictures(samples, verb)

    def _cosines(self, work: TaskContext, samples: list[Sample]) -> Events:
        scorer = work.load(self.options.clip or "")

        def verb(some: list[Sample], pictures: list[Pixels]) -> list[JsonDict]:
            images = scorer.embed_images(pictures)
            found: list[JsonDict] = []
            for image, sample in zip(images, some, strict=True):
                written = work.records[sample.key]["caption"]
                texts = scorer.embed_texts([_CLIP_PROMPT + text for text in (written, *sample.captions)])
                cosine, near = float((image @ texts[0]).max()), float((texts[1:] @ texts[0]).max())
                found.append({"cosines": [cosine, near]})
            return found

        return work.material.run(scorer, work.reading, samples, verb)

    def score(self, samples: Sequence[Sample], records: Records) -> TaskScores:
        """COCO's measures, CLIPScore where asked for, and what the captions are like."""
        keys = [sample.key for sample in samples]
        written = [str(records[key]["caption"]) for key in keys]
        scored = score_captions(written, [list(sample.captions) for sample in samples])
        coco = "COCO's Penn-Treebank tokens, lower case, without punctuation; "
        measures = [
            MetricTable(
                f"BLEU-{n}",
                f"{coco}corpus BLEU-{n}, closest reference length (Papineni et al. 2002)",
                "images",
                keys,
                scored.bleu_counts.astype(np.float64),
                of_means=lambda means, n=n: bleu(means * len(keys))[:, n - 1],
            )
            for n in range(1, 5)
        ]
        said = {
            "ROUGE-L": "ROUGE-L, beta 1.2, the mean over images (Lin 2004)",
            "CIDEr": "CIDEr as COCO's code has it (CIDEr-D: clipped, sigma 6), frequencies from these references",
            "CIDEr-D": "the same number as CIDEr: what COCO's code calls so",
            "SPICE": "the official jar, the mean over images",
        }
        missing = dict(meteor_spice_not_computed())
        if "SPICE" in scored.each and not np.isfinite(scored.each["SPICE"]).all():
            missing["SPICE"] = (
                "some images have nothing to compare on either side, which the jar gives no number"
            )
        for name, protocol in said.items():
            if name in scored.each and np.isfinite(scored.each[name]).all():
                measures.append(MetricTable(name, coco + protocol, "images", keys, scored.each[name]))
        measures += self._like(keys, written)
        facts = self._facts(written)
        if "METEOR" in scored.corpus:
            words = coco + "the official jar over the corpus; no mean of samples, so no interval"
            facts.append(
                MetricValue("METEOR", scored.corpus["METEOR"], None, None, len(keys), "images", words)
            )
        if all("cosines" in records[key] for key in keys):
            measures += self._clip_scores(keys, records)
        else:
            missing |= dict.fromkeys(("CLIPScore", "RefCLIPScore"), "no embedding model was named for it")
        cases = _caption_cases(samples, written, scored.each["CIDEr"], scored.each["ROUGE-L"])
        how = "CIDEr; disputed: CIDEr and ROUGE-L say different things"
        return TaskScores(tuple(measures), tuple(facts), missing, cases, how)

    def _clip_scores(self, keys: list[str], records: Records) -> list[MetricTable]:
        cosines = np.clip([records[key]["cosines"] for key in keys], 0, None)
        of_picture, of_texts = _CLIP_WEIGHT * cosines[:, 0], cosines[:, 1]
        total = of_picture + of_texts
        harmonic = np.divide(2 * of_picture * of_texts, total, out=np.zeros(len(keys)), where=total > 0)
        by = f'by {self.options.clip}, "{_CLIP_PROMPT}" before each text (Hessel et al. 2021)'
        return [
            MetricTable(
                "CLIPScore",
                f"2.5 x max(cosine of image and caption, 0), {by}",
                "images",
                keys,
                of_picture,
            ),
            MetricTable(
                "RefCLIPScore",
                f"harmonic mean of CLIPScore and the nearest reference, {by}",
                "images",
                keys,
                harmonic,
            ),
        ]

    def _like(self, keys: list[str], written: list[str]) -> list[MetricTable]:
        each = [caption_facts([text]) for text in written]
        length = np.array([facts["length"] for facts in each])
        repeats = np.array([facts["repetition"] for facts in each])
        measures = [
            MetricTable("length", "words in a caption", "images", keys, length),
            MetricTable(
                "repetition",
                "share of captions in which three words in a row come twice",
                "images",
                keys,
                repeats,
            ),
        ]
        if self.seen:
            new = np.array([text not in self.seen for text in tokenize(written)], np.float64)
            words = "share of captions that the training data does not have"
            measures.append(MetricTable("unseen", words, "images", keys, new))
        return measures

    def _facts(self, written: list[str]) -> list[MetricValue]:
        facts = caption_facts(written)
        said = {"vocabulary": "different words in all captions", "distinct": "share of different captions"}
        none = "; grows with the number of samples, so no interval"
        return [
            MetricValue(name, facts[name], None, None, len(written), "images", words + none)
            for name, words in said.items()
        ]


def _caption_cases(
    samples: Sequence[Sample], written: list[str], cider: NDArray[np.float64], rouge: NDArray[np.float64]
) -> tuple[ExampleCase, ...]:
    """Disputed is what one measure ranks high and the other low."""
    ranks = [np.argsort(np.argsort(values, kind="stable")) / len(samples) for values in (cider, rouge)]
    return tuple(
        ExampleCase(
            sample.key,
            float(cider[i]),
            float(abs(ranks[0][i] - ranks[1][i])),
            (
                ("model", written[i]),
                *(("people", text) for text in sample.captions[:3]),
                ("CIDEr, ROUGE-L", f"{cider[i]:.2f}, {rouge[i]:.2f}"),
            ),
        )
        for i, sample in enumerate(samples)
    )
