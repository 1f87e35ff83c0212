"""A short evaluation while a training goes on: what the model can do by now, on images it does not learn from."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sightloop.data.datasets.dataset import Dataset
from sightloop.data.images.preprocess import preprocess
from sightloop.errors import ImageError
from sightloop.inference.model import Model
from sightloop.metrics import caption_scores, detection_not_computed, detection_scores
from sightloop.protocols import RegionNetwork
from sightloop.training.config import EvaluationSettings
from sightloop.types import Limits, Pixels, Sample

# Which of the values says what the best checkpoint is: the first that is there, of those that an objective trains.
_SCORES = {
    "mAP": {"prompted"},
    "CIDEr": {"lm", "prompted"},
    "text_to_image_R@1": {"itc", "clip", "siglip"},
    "answers": {"vqa", "prompted"},
    "classes": {"classes"},
}


def validate(
    model: Model, dataset: Dataset, settings: EvaluationSettings, *, boxes: bool = False
) -> tuple[dict[str, float], tuple[tuple[str, str], ...]]:
    """Values by name, 0 to 1 apart from CIDEr (0 to 10), and (key, caption written) of the first images.

    The dataset's first `samples` images; what they lack (captions, questions, labels) or the model cannot do is left
    out. Images that cannot be read are left out too. boxes: things are to be found as well, which takes a while.
    """
    was_training = model.module.training
    model.module.eval()
    try:
        samples, images = load_samples(model, dataset, settings.samples)
        values: dict[str, float] = {}
        texts: tuple[tuple[str, str], ...] = ()
        captioned = [i for i, sample in enumerate(samples) if sample.captions]
        if captioned and "embed" in model.capabilities:
            values |= _retrieval(model, [samples[i] for i in captioned], [images[i] for i in captioned])
        if captioned and "caption" in model.capabilities:
            found = model.caption(
                [images[i] for i in captioned],
                num_beams=settings.num_beams,
                max_new_tokens=settings.max_tokens,
            )
            values |= _captions(found, [samples[i].captions for i in captioned])
            texts = tuple((samples[i].key, text) for i, text in zip(captioned, found, strict=True))[
                : settings.show
            ]
        if "answer" in model.capabilities:
            values |= _answers(model, samples, images)
        if model.labels:
            values |= _classes(model, samples, images)
        if boxes:
            values |= _boxes(model, samples, images)
        return values, texts
    finally:
        model.module.train(was_training)


def validation_score(values: Mapping[str, float], terms: Collection[str]) -> float | None:
    """The number by which checkpoints of a run with these objectives are compared, None where none was measured."""
    there = [name for name in _SCORES if name in values]
    trained = [name for name in there if _SCORES[name] & {*terms}]
    return values[(trained or there)[0]] if there else None


def at_chance(values: Mapping[str, float], images: int, terms: Collection[str]) -> str:
    """What is no better than guessing on these unseen images, in words; empty where all is better.

    Within three standard errors of what a guesser gets: 1 / images for recall@1, a half for ITM's verdicts. Only
    what these objectives train: a captioner is free to forget how to judge.
    """
    guesses: dict[str, float] = {}
    if {"itc", "clip", "siglip"} & {*terms}:
        guesses["text_to_image_R@1"] = 1 / max(images, 1)
    if "itm" in terms:
        guesses["itm_random"] = 0.5
    bad = [
        f"{name} is {values[name]:.3f} (guessing: {p:.3f})"
        for name, p in guesses.items()
        if name in values and values[name] <= p + 3 * (p * (1 - p) / max(images, 1)) ** 0.5
    ]
    if not bad:
        return ""
    return (
        f"on images that it does not learn from, {' and '.join(bad)}: at chance. If the training loss falls "
        "nevertheless, pairs are learned by heart: look whether each caption belongs to its image"
    )


def load_samples(model: Model, dataset: Dataset, limit: int) -> tuple[list[Sample], list[Pixels]]:
    """Of the first `most` samples those whose image can be read, and the images, prepared for the model."""
    samples: list[Sample] = []
    images: list[Pixels] = []
    for index in range(min(limit, len(dataset))):
        try:
            sample = dataset[index]
            source = sample.image if isinstance(sample.image, bytes) else str(sample.image)
            images.append(preprocess(source, model.image_spec, limits=Limits()))
            samples.append(sample)
        except ImageError:
            continue
    return samples, images


def _retrieval(model: Model, samples: Sequence[Sample], images: list[Pixels]) -> dict[str, float]:
    """ITC's recall both ways, and how often ITM tells the image's own text from another one's."""
    texts = [text for sample in samples for text in sample.captions]
    owner = np.concatenate([np.full(len(sample.captions), i) for i, sample in enumerate(samples)])
    similarity = model.similarity(images, texts)
    right = owner == np.arange(len(samples))[:, None]  # [n, m]
    values: dict[str, float] = {}
    best = np.where(right, similarity, -np.inf).max(1)
    to_text = (similarity >= best[:, None]).sum(1) - (right & (similarity >= best[:, None])).sum(1)
    own = similarity[owner, np.arange(len(texts))]
    to_image = (similarity >= own).sum(0) - 1
    for k in (1, 10):
        values[f"image_to_text_R@{k}"] = float((to_text < k).mean())
        values[f"text_to_image_R@{k}"] = float((to_image < k).mean())
    if "match" in model.capabilities and len(samples) > 1:
        values |= _matching(model, samples, images, np.where(right, -np.inf, similarity))
    return values


def _matching(
    model: Model, samples: Sequence[Sample], images: list[Pixels], wrong: NDArray[np.float32]
) -> dict[str, float]:
    """Verdicts at 0.5 on each image's first text, the text that ITC likes best of the others', and the next one's."""
    texts = [text for sample in samples for text in sample.captions]
    first = [sample.captions[0] for sample in samples]
    hard = [texts[i] for i in wrong.argmax(1).tolist()]
    random = [*first[1:], first[0]]
    true = model.match(images, first) > 0.5
    return {
        "itm_random": float((true.mean() + (model.match(images, random) <= 0.5).mean()) / 2),
        "itm_hard": float((true.mean() + (model.match(images, hard) <= 0.5).mean()) / 2),
    }


def _captions(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    scores = caption_scores(texts, [list(texts) for texts in references])
    exact = np.mean([text in gold for text, gold in zip(texts, references, strict=True)])
    return {"CIDEr": scores["CIDEr"], "BLEU-4": scores["BLEU-4"], "captions_exact": float(exact)}


def _answers(model: Model, samples: Sequence[Sample], images: list[Pixels]) -> dict[str, float]:
    asked = [(i, q) for i, sample in enumerate(samples) for q in sample.questions]
    if not asked:
        return {}
    answers = model.answer([images[i] for i, _ in asked], [q.question for _, q in asked])
    return {
        "answers": float(np.mean([text in q.answers for text, (_, q) in zip(answers, asked, strict=True)]))
    }


def _classes(model: Model, samples: Sequence[Sample], images: list[Pixels]) -> dict[str, float]:
    known = [i for i, sample in enumerate(samples) if sample.label in model.labels]
    if not known:
        return {}
    best = model.classify([images[i] for i in known]).argmax(1).tolist()
    right = [model.labels[j] == samples[i].label for i, j in zip(known, best, strict=True)]
    return {"classes": float(np.mean(right))}


def _boxes(model: Model, samples: Sequence[Sample], images: list[Pixels]) -> dict[str, float]:
    """COCO's mAP of the things that people named; who is asked for names is asked for those of the image."""
    known = [i for i, sample in enumerate(samples) if sample.regions]
    if not known or detection_not_computed():
        return {}
    if isinstance(model.network, RegionNetwork) and model.network.phrase_separator:
        names = [list(dict.fromkeys(region.label for region in samples[i].regions)) for i in known]
        regions = [model.detect(images[i], asked)[0] for i, asked in zip(known, names, strict=True)]
    else:
        regions = model.detect([images[i] for i in known])
    scores = detection_scores(regions, [samples[i].regions for i in known])
    return {name: scores.get(name, 0.0) for name in ("mAP", "mAP@0.5")}
