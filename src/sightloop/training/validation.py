"""Evaluation during a training run, on images held out of it: recall, ITM accuracy, captions, answers,
dialogues, boxes, drawings."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sightloop.data.datasets.dataset import Dataset
from sightloop.data.datasets.synthetic import SceneCheck, check_scene, parse_scene, plain_combination
from sightloop.data.images.preprocess import preprocess
from sightloop.errors import ImageError
from sightloop.inference.model import Model
from sightloop.metrics import (
    caption_scores,
    detection_not_computed,
    detection_scores,
    exact_match,
    matching_curves,
    rank_metrics,
    roc_auc,
    score_retrieval,
    truth_rank,
    vqa_accuracy,
)
from sightloop.protocols import RegionNetwork
from sightloop.ranking.dialogue_network import judges_dialogues
from sightloop.training.config import EvaluationSettings
from sightloop.types import Limits, Pixels, Sample

# Metrics that compare checkpoints, in order of preference -> objectives that train them.
_SCORES = {
    "mAP": {"prompted"},
    "CIDEr": {"lm", "prompted"},
    "text-to-image recall@1": {"itc", "clip", "siglip"},
    "VQA accuracy": {"vqa", "prompted"},
    "VQA exact match": {"vqa", "prompted"},
    "top-1 accuracy": {"classes"},
    "dialogue MRR": {"dialogue"},
    "drawings right": {"flow"},
}
_OTHER_TEXTS = "drawings right (other texts)"


class Validation(NamedTuple):
    """What an evaluation during training found.

    Attributes:
        values: metrics by name, 0..1, CIDEr 0..10.
        texts: (key, generated caption) of the first images.
        drawings: (key, image drawn of its first caption) of the first images.
    """

    values: dict[str, float]
    texts: tuple[tuple[str, str], ...] = ()
    drawings: tuple[tuple[str, Image.Image], ...] = ()


def validate(
    model: Model, dataset: Dataset, settings: EvaluationSettings, *, boxes: bool = False
) -> Validation:
    """Metrics of a model on the tasks that it can do and the dataset has annotations for.

    Args:
        model: evaluated in evaluation mode, and set back.
        dataset: its first `settings.samples` images; those that cannot be read are left out.
        settings: number of images, decoding of captions.
        boxes: also detect, which is slow.
    """
    was_training = model.module.training
    model.module.eval()
    try:
        samples, images = load_samples(model, dataset, settings.samples)
        values: dict[str, float] = {}
        texts: tuple[tuple[str, str], ...] = ()
        drawings: tuple[tuple[str, Image.Image], ...] = ()
        captioned = [i for i, sample in enumerate(samples) if sample.captions]
        if captioned and "embed" in model.capabilities:
            values |= _retrieval(model, [samples[i] for i in captioned], [images[i] for i in captioned])
        if captioned and "caption" in model.capabilities:
            generated = model.caption(
                [images[i] for i in captioned],
                num_beams=settings.num_beams,
                max_new_tokens=settings.max_tokens,
            )
            values |= _captions(generated, [samples[i].captions for i in captioned])
            texts = tuple((samples[i].key, text) for i, text in zip(captioned, generated, strict=True))[
                : settings.show
            ]
        if "answer" in model.capabilities:
            values |= _answers(model, samples, images)
        if model.labels:
            values |= _classes(model, samples, images)
        if judges_dialogues(model.network):
            values |= _dialogues(model, samples, images)
        if boxes:
            values |= _boxes(model, samples, images)
        if captioned and "draw" in model.capabilities:
            scores, drawings = _drawings(model, [samples[i] for i in captioned], settings.show)
            values |= scores
        return Validation(values, texts, drawings)
    finally:
        model.module.train(was_training)


def validation_score(values: Mapping[str, float], terms: Collection[str]) -> float | None:
    """The metric that compares checkpoints of a run.

    Args:
        values: metrics of an evaluation.
        terms: objectives of the run, whose metrics are preferred.

    Returns:
        The value, or None if no metric was computed.
    """
    measured = [name for name in _SCORES if math.isfinite(values.get(name, math.nan))]
    return values[order_metrics(measured, terms)[0]] if measured else None


def order_metrics(names: Iterable[str], terms: Collection[str]) -> list[str]:
    """Names of metrics, those of the trained objectives first, the one that compares checkpoints at the head."""
    names = list(names)
    trained = [name for name in _SCORES if name in names and _SCORES[name] & {*terms}]
    return list(dict.fromkeys([*trained, *names]))


def at_chance(values: Mapping[str, float], images: int, terms: Collection[str]) -> str:
    """A warning if metrics of the trained objectives are at chance level, "" if they are not.

    Chance level: within three standard errors of a guess, 1 / images for recall@1, 1/2 for ITM, for drawings what
    they show of the texts of other images.

    Args:
        values: metrics of an evaluation.
        images: number of images.
        terms: objectives of the run; metrics of others are ignored.
    """
    guesses: dict[str, float] = {}
    if {"itc", "clip", "siglip"} & {*terms}:
        guesses["text-to-image recall@1"] = 1 / max(images, 1)
    if "itm" in terms:
        guesses["ITM accuracy (random)"] = 0.5
    bad = [
        f"{name} is {values[name]:.3f} (guessing: {p:.3f})"
        for name, p in guesses.items()
        if name in values and values[name] <= p + 3 * (p * (1 - p) / max(images, 1)) ** 0.5
    ]
    if "flow" in terms and _OTHER_TEXTS in values:
        right, chance = values["drawings right"], values[_OTHER_TEXTS]
        if right <= chance + 3 * max(chance * (1 - chance) / max(images, 1), 1 / max(images, 1) ** 2) ** 0.5:
            bad.append(f"drawings right are {right:.3f} (by the texts of other images: {chance:.3f})")
    if not bad:
        return ""
    return (
        f"on held-out images, {' and '.join(bad)}: at chance. If the training loss falls all the same, the model "
        "overfits: check that each caption belongs to its image"
    )


def load_samples(model: Model, dataset: Dataset, limit: int) -> tuple[list[Sample], list[Pixels]]:
    """The samples among the first `limit` whose image can be read, and their preprocessed images."""
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
    """Recall of ITC both ways, ties and equal texts as in `evaluate`, and accuracy of ITM."""
    texts = [text for sample in samples for text in sample.captions]
    similarity = model.similarity(images, texts)  # [n, m]
    positive = np.array([[text in sample.captions for text in texts] for sample in samples])  # [n, m]
    recall = score_retrieval(similarity, positive, (1, 10)).mean
    values = {name: value for name, value in recall.items() if "recall" in name}
    if "match" in model.capabilities and not positive.all():
        values |= _matching(model, samples, images, np.where(positive, -np.inf, similarity))
    return values


def _matching(
    model: Model, samples: Sequence[Sample], images: list[Pixels], wrong: NDArray[np.float32]
) -> dict[str, float]:
    """Balanced accuracy of ITM at 0.5: each image's first text against a random and a hard false one.

    Args:
        model: with an ITM head.
        samples: of n images.
        images: preprocessed.
        wrong: `[n, m]`, ITC similarity of images and all texts, -inf for the image's own: its largest is the hard one.
    """
    texts = [text for sample in samples for text in sample.captions]
    first = [sample.captions[0] for sample in samples]
    true = model.match(images, first) > 0.5
    false_texts = {
        "random": [*first[1:], first[0]],
        "hard": [texts[i] for i in wrong.argmax(1).tolist()],
    }
    values: dict[str, float] = {}
    for kind, others in false_texts.items():
        # Without images that this text describes, too.
        kept = [i for i, text in enumerate(others) if text not in samples[i].captions]
        if kept:
            rejected = model.match([images[i] for i in kept], [others[i] for i in kept]) <= 0.5
            values[f"ITM accuracy ({kind})"] = float((true.mean() + rejected.mean()) / 2)
    return values


def _captions(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    scores = caption_scores(texts, [list(texts) for texts in references])
    exact = np.mean([text in gold for text, gold in zip(texts, references, strict=True)])
    return {"CIDEr": scores["CIDEr"], "BLEU-4": scores["BLEU-4"], "exact match": float(exact)}


def _answers(model: Model, samples: Sequence[Sample], images: list[Pixels]) -> dict[str, float]:
    questions = [(i, q) for i, sample in enumerate(samples) for q in sample.questions]
    if not questions:
        return {}
    answers = model.answer([images[i] for i, _ in questions], [q.question for _, q in questions])
    references = [list(q.answers) for _, q in questions]
    if all(
        len(texts) == 1 for texts in references
    ):  # the official accuracy leaves an answer out, here the only one
        return {"VQA exact match": exact_match(answers, references)}
    return {"VQA accuracy": vqa_accuracy(answers, references)["accuracy"]}


def _dialogues(model: Model, samples: Sequence[Sample], images: list[Pixels]) -> dict[str, float]:
    """R@1 and MRR of the true answers among their candidates, by ITM; the area of each attribute."""
    ranks: list[int] = []
    scores: defaultdict[str, list[float]] = defaultdict(list)
    labels: defaultdict[str, list[float]] = defaultdict(list)
    for sample, pixels in zip(samples, images, strict=True):
        own = [dialogue for dialogue in sample.dialogues if any(one.candidates for one in dialogue.rounds)]
        judged = (model.judge_answers(pixels, dialogue) for dialogue in own)
        for one, each in zip(chain(*(dialogue.rounds for dialogue in own)), chain(*judged), strict=True):
            if one.truth is not None:
                ranks.append(truth_rank(each.match, one.truth))
            for name in one.attributes.keys() & each.attributes.keys():
                scores[name] += each.attributes[name].tolist()
                labels[name] += one.attributes[name]
    if not ranks:
        return {}
    values = {
        f"dialogue {name}": float(rank_metrics(np.array(ranks))[name].mean()) for name in ("R@1", "MRR")
    }
    for name in sorted(scores):
        if 0 < sum(labels[name]) < len(labels[name]):
            values[f"area ({name})"] = roc_auc(matching_curves(scores[name], labels[name]))
    return values


def _classes(model: Model, samples: Sequence[Sample], images: list[Pixels]) -> dict[str, float]:
    known = [i for i, sample in enumerate(samples) if sample.label in model.labels]
    if not known:
        return {}
    best = model.classify([images[i] for i in known]).argmax(1).tolist()
    correct = [model.labels[j] == samples[i].label for i, j in zip(known, best, strict=True)]
    return {"top-1 accuracy": float(np.mean(correct))}


def _boxes(model: Model, samples: Sequence[Sample], images: list[Pixels]) -> dict[str, float]:
    """COCO mAP. Networks that are prompted with labels get those of the image's own annotations."""
    known = [i for i, sample in enumerate(samples) if sample.regions]
    if not known or detection_not_computed():
        return {}
    if isinstance(model.network, RegionNetwork) and model.network.phrase_separator:
        names = [list(dict.fromkeys(region.label for region in samples[i].regions)) for i in known]
        regions = [model.detect(images[i], labels)[0] for i, labels in zip(known, names, strict=True)]
    else:
        regions = model.detect([images[i] for i in known])
    scores = detection_scores(regions, [samples[i].regions for i in known])
    return {name: scores.get(name, 0.0) for name in ("mAP", "mAP@0.5")}


def _drawings(
    model: Model, samples: Sequence[Sample], show: int
) -> tuple[dict[str, float], tuple[tuple[str, Image.Image], ...]]:
    """Drawings of first captions: by the parser those of plain scenes, of own and other texts; the first `show`."""
    texts = [sample.captions[0] for sample in samples]
    scenes = {i: scene for i, text in enumerate(texts) if (scene := plain_combination(text)) is not None}
    wanted = list(dict.fromkeys(texts[i] for i in sorted({*scenes, *range(min(show, len(texts)))})))
    drawn = dict(zip(wanted, model.draw(wanted), strict=True))
    shown = tuple((sample.key, drawn[sample.captions[0]]) for sample in samples[:show])
    if len(scenes) < 2:
        return {}, shown
    objects = {i: parse_scene(np.asarray(drawn[texts[i]].convert("RGB"))) for i in scenes}
    own = [check_scene(objects[i], scene) for i, scene in scenes.items()]
    others = [*scenes][1:] + [*scenes][:1]
    swapped = [check_scene(objects[i], scenes[j]) for i, j in zip(scenes, others, strict=True)]
    values = {"drawings right": _share(own, "correct"), _OTHER_TEXTS: _share(swapped, "correct")}
    for name in ("object", "color", "count", "position"):
        values[f"drawing {name}"] = _share(own, name)
    return {name: value for name, value in values.items() if math.isfinite(value)}, shown


def _share(checks: Sequence[SceneCheck], name: str) -> float:
    """Share of the checks in which something is right, of those that say it; NaN if none does."""
    known = [getattr(check, name) for check in checks if getattr(check, name) is not None]
    return float(np.mean(known)) if known else math.nan
