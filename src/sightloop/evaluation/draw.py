"""Drawing as an evaluation task: does an image show what its text says, and is it like real ones?

Of texts of plain scenes of the synthetic world an exact parser tells what a drawing shows. Of any text the cosine with
its image (CLIPScore), and distances of the drawn images from the real ones (CMMD, MMD), need a model of embeddings.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from sightloop.data.datasets.synthetic import (
    SceneCheck,
    SceneObject,
    check_scene,
    parse_scene,
    plain_combination,
)
from sightloop.evaluation.predictions import Records
from sightloop.evaluation.results import ExampleCase, MetricTable, TaskScores
from sightloop.evaluation.task import EvalOptions, Events, TaskContext, TaskPhase, over_images
from sightloop.metrics import cmmd, kid
from sightloop.types import Done, Floats, JsonDict, Pixels, Sample

if TYPE_CHECKING:
    from sightloop.inference.model import Model

_CLIP_PROMPT, _CLIP_WEIGHT = "A photo depicts ", 2.5  # Hessel et al. 2021
_RIGHTS = {
    "object": "each shape that the text names is drawn",
    "color": "each is drawn in its color",
    "count": "as many of each shape as the text says, and no other object",
    "position": "the objects lie as the text says, by GenEval's rule (Ghosh et al. 2023); of texts that say it",
    "all right": "object, color, count and position are right",
}
_BY = {"itm": "the ITM logit", "itc": "the ITC cosine", "likelihood": "the log-likelihood of the text"}
_DIMENSIONS = 6  # decimals that are kept of embeddings


class DrawTask:
    """Drawings of each sample's first caption, parsed, judged and embedded."""

    def __init__(self, options: EvalOptions) -> None:
        self.options = options
        self.drawn = options.rank_samples or 1
        self.settings: JsonDict = {
            "seed": options.seed,
            "drawn": self.drawn,
            "rank_by": options.rank_by,
            "clip": options.clip,
        }

    def wants(self, sample: Sample) -> bool:
        """It needs a text."""
        return bool(sample.captions)

    def phases(self) -> Sequence[TaskPhase]:
        """Drawings; then the signals of a judge, and the embeddings of a model for CLIPScore, where they are named."""
        options = self.options
        phases = [TaskPhase("drawing", "objects", self._draw, "draw")]
        if options.rank_by:
            phases.append(TaskPhase("judging drawings", "signals", self._judge, model=options.rank_by))
        if options.clip:
            embed = over_images(self._embed_real)
            phases.append(TaskPhase("embedding drawings", "embedded", self._embed, model=options.clip))
            phases.append(TaskPhase("embedding real images", "real", embed, model=options.clip))
        return phases

    def _draw(self, work: TaskContext, samples: list[Sample]) -> Events:
        keeps_images = bool(self.options.rank_by or self.options.clip)
        count = max(1, work.model.sizer.default // self.drawn)
        for start in range(0, len(samples), count):
            part = samples[start : start + count]
            texts = [sample.captions[0] for sample in part]
            distinct = list(dict.fromkeys(texts))
            images = work.model.draw(distinct, self.drawn, seed=self.options.seed)
            for sample, text in zip(part, texts, strict=True):
                first = distinct.index(text) * self.drawn
                own = images[first : first + self.drawn]
                known = plain_combination(text) is not None
                record: JsonDict = {"objects": [_objects(image) if known else None for image in own]}
                if keeps_images:
                    record["images"] = [_encoded(image) for image in own]
                yield Done(sample.key, record)

    def _judge(self, work: TaskContext, samples: list[Sample]) -> Events:
        # They import torch, which scoring again does not need.
        from sightloop.evaluation.answer_scores import caption_likelihoods
        from sightloop.inference.load import judge_signals

        for sample in samples:
            images = [_decoded(text) for text in work.records[sample.key]["images"]]
            signals = judge_signals(work.model, images, [sample.captions[0]] * len(images))
            if "caption" in work.model.capabilities:
                likelihoods = caption_likelihoods(work.model, images, sample.captions[0])
                for signal, value in zip(signals, likelihoods, strict=True):
                    signal["likelihood"] = value
            yield Done(sample.key, {"signals": signals})

    def _embed(self, work: TaskContext, samples: list[Sample]) -> Events:
        for sample in samples:
            image = work.model.embed_images([_decoded(work.records[sample.key]["images"][0])])[0]
            text = work.model.embed_texts([_CLIP_PROMPT + sample.captions[0]])[0]
            yield Done(sample.key, {"embedded": _rounded(image), "cosine": float((image @ text).max())})

    def _embed_real(self, model: Model, samples: list[Sample], images: list[Pixels]) -> list[JsonDict]:
        return [{"real": _rounded(vector)} for vector in model.embed_images(images)]

    def score(self, samples: Sequence[Sample], records: Records) -> TaskScores:
        """Shares of what is right by the parser, also with the texts of others; best of n; CLIPScore and distances."""
        metrics: list[MetricTable] = []
        cases: tuple[ExampleCase, ...] = ()
        not_computed: dict[str, str] = {}
        known = [sample for sample in samples if plain_combination(sample.captions[0]) is not None]
        if known:
            checks = [_checks(sample.captions[0], records[sample.key]) for sample in known]
            keys = [sample.key for sample in known]
            metrics += _parser_metrics(keys, [own[0] for own in checks], "")
            others = [*known[1:], known[0]]
            swapped = [_checks(o.captions[0], records[s.key])[0] for s, o in zip(known, others, strict=True)]
            metrics += _parser_metrics(keys, swapped, " (other texts)")
            metrics += self._best_of(keys, checks, records)
            cases = _cases(known, checks, records)
        else:
            reason = "no text is one of plain scenes of the synthetic world, which alone are parsed exactly"
            not_computed |= dict.fromkeys(_RIGHTS, reason)
        if self.options.clip:
            metrics += self._distances([sample.key for sample in samples], records)
        else:
            not_computed |= dict.fromkeys(
                ("CLIPScore", "CMMD", "MMD"), "no model of embeddings was named for it"
            )
        return TaskScores(tuple(metrics), not_computed, cases, "share of what is right by the parser")

    def _best_of(
        self, keys: list[str], checks: list[list[SceneCheck]], records: Records
    ) -> list[MetricTable]:
        """Of the first n drawings the best by each signal, n = 4, 16, ... up to all; and its gain over the first."""
        if not self.options.rank_by:
            return []
        right = np.array([[check.correct for check in own] for own in checks], np.float64)  # [N, n]
        metrics: list[MetricTable] = []
        for name, words in _BY.items():
            if any(name not in signal for key in keys for signal in records[key]["signals"]):
                continue
            scores = np.array(
                [[signal[name] for signal in records[key]["signals"]] for key in keys]
            )  # [N, n]
            for count in sorted({n for n in (4, 16, 64) if n <= self.drawn} | {self.drawn}):
                best = right[np.arange(len(keys)), scores[:, :count].argmax(1)]
                protocol = f"of {count} drawings of each text the one with the highest {name}: {words} of "
                protocol += f"{self.options.rank_by}; object, color, count and position are right"
                metrics.append(
                    MetricTable(f"all right, best of {count} by {name}", protocol, "texts", keys, best)
                )
                gain = f"the same, less that of the first drawing: paired, text by text; {protocol}"
                metrics.append(
                    MetricTable(f"gain, best of {count} by {name}", gain, "texts", keys, best - right[:, 0])
                )
        return metrics

    def _distances(self, keys: list[str], records: Records) -> list[MetricTable]:
        by, name = f"by {self.options.clip}", str(self.options.clip)
        cosines = np.clip([records[key]["cosine"] for key in keys], 0, None)
        drawn, real = (
            np.array([np.ravel(records[key][field]) for key in keys]) for field in ("embedded", "real")
        )
        size = drawn.shape[1]
        both = np.concatenate([drawn, real], axis=1)  # [N, 2 P]
        score = (
            f'2.5 x max(cosine of drawing and text, 0), {by}, "{_CLIP_PROMPT}" before it (Hessel et al. 2021)'
        )
        cmmd_protocol = (
            "squared MMD of embeddings of drawn and real images, RBF kernel of width 10, biased, x 1000 (Jayasumana et "
            f"al. 2024, with CLIP L/14 at 336 pixels), {by}; resampled sets repeat images, which raises it"
        )
        mmd_protocol = (
            f"squared MMD of features of {name}, kernel (x.y / P + 1)^3, unbiased: the estimator of KID (Binkowski et "
            "al. 2018), which is of Inception's features; no FID"
        )
        metrics = [MetricTable("CLIPScore", score, "texts", keys, _CLIP_WEIGHT * cosines)]
        metrics.append(
            MetricTable(
                "CMMD",
                cmmd_protocol,
                "texts",
                keys,
                both,
                of_rows=lambda x: cmmd(x[:, :size], x[:, size:]),
                resamples=0,
            )
        )
        if len(keys) > 1:
            metrics.append(
                MetricTable(
                    f"MMD on {name} features",
                    mmd_protocol,
                    "texts",
                    keys,
                    both,
                    of_rows=lambda x: kid(x[:, :size], x[:, size:]),
                    resamples=0,
                )
            )
        return metrics


def _parser_metrics(keys: list[str], checks: list[SceneCheck], ending: str) -> list[MetricTable]:
    metrics: list[MetricTable] = []
    of = "; by the parser, of the first drawing"
    if ending:
        of += " and another sample's text: what is right by chance"
    for name, words in _RIGHTS.items():
        values = {
            key: check.correct if name == "all right" else getattr(check, name)
            for key, check in zip(keys, checks, strict=True)
        }
        known_values = {key: float(value) for key, value in values.items() if value is not None}
        if known_values:
            rows = np.array(list(known_values.values()))
            metrics.append(MetricTable(f"{name}{ending}", words + of, "texts", list(known_values), rows))
    return metrics


def _checks(text: str, record: JsonDict) -> list[SceneCheck]:
    """Whether each drawing shows what a text of plain scenes says."""
    combination = plain_combination(text)
    assert combination is not None
    drawn = [
        [SceneObject(color, shape, tuple(box)) for color, shape, box in own] for own in record["objects"]
    ]
    return [check_scene(objects, combination) for objects in drawn]


def _cases(
    samples: Sequence[Sample], checks: list[list[SceneCheck]], records: Records
) -> tuple[ExampleCase, ...]:
    def seen(sample: Sample) -> str:
        objects = records[sample.key]["objects"][0]
        return ", ".join(f"{color} {shape or 'shape'}" for color, shape, _ in objects) or "nothing"

    return tuple(
        ExampleCase(
            sample.key,
            float(np.mean([own[0].object, own[0].color, own[0].count, own[0].position is not False])),
            0.0,
            (("text", sample.captions[0]), ("drawn, by the parser", seen(sample))),
        )
        for sample, own in zip(samples, checks, strict=True)
    )


def _objects(image: Image.Image) -> list[tuple[str, str, tuple[float, ...]]]:
    return [(one.color, one.shape, one.box) for one in parse_scene(np.asarray(image.convert("RGB")))]


def _encoded(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _decoded(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")


def _rounded(vector: Floats | np.ndarray) -> list[float]:
    return np.round(np.asarray(vector, np.float64), _DIMENSIONS).tolist()
