"""Calibration of the ITM head on held-out pairs: the decision threshold, and the weight of the ITC cosine.

ITM scores training pairs higher than unseen ones, so that 0.5 rejects too many unseen true pairs. The bias is shifted
so that on held-out pairs the true-positive rate equals the true-negative rate. If the network can add the ITC cosine
to its logit (`match_cosine` of BLIP), the weight with the largest area under the ROC curve is chosen first.

A model may come with digests of the images that it has learned (`nano` does). Scores of their true pairs are
overfitted and cannot be used, but false pairs are still new: then the share of false pairs dropped is kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sightloop.checkpoints.catalog import BUNDLED
from sightloop.checkpoints.hub import BUNDLED_FOLDER
from sightloop.data.copies.learned_images import read_digests
from sightloop.data.datasets.dataset import Dataset
from sightloop.inference.load import load
from sightloop.inference.model import Model
from sightloop.metrics import equal_error_threshold, matching_curves, roc_auc
from sightloop.protocols import Embedder, Matcher, require
from sightloop.tasks.embed import embed_images
from sightloop.training.events import Calibrated
from sightloop.training.validation import load_samples
from sightloop.types import Floats, Pixels, Sample

MIN_IMAGES = 20  # fewest images to calibrate on
_HELD_OUT_PART, _MIN_HELD_OUT, _MAX_HELD_OUT = 20, 50, 500  # a twentieth, 50 to 500 images
_COSINES = (0.0, 5.0, 10.0, 20.0, 40.0)  # weights of the ITC cosine to choose from

Truths: TypeAlias = NDArray[np.bool_]


def split_held_out(dataset: Dataset) -> tuple[Dataset, Dataset]:
    """Splits a dataset for training and calibration.

    The split depends on the samples' keys alone: a run that continues from the result of another one, with the same
    data or more, does not calibrate on images learned before.

    Returns:
        The training samples, and a twentieth of all, within 50..500 and at most a quarter; none if fewer than 20.
    """
    count = len(dataset)
    held = min(max(count // _HELD_OUT_PART, _MIN_HELD_OUT), _MAX_HELD_OUT, count // 4)
    if held < MIN_IMAGES:
        return dataset, dataset.select([])
    order = np.array(sorted(range(count), key=lambda index: _hash(dataset.key(index))), np.int64)
    return dataset.select(np.sort(order[held:])), dataset.select(order[:held])


def learned_digests(start: str) -> frozenset[bytes]:
    """Digests of the images that a local model has learned; empty if it comes without."""
    return read_digests(BUNDLED_FOLDER if start == BUNDLED else Path(start)) if start else frozenset()


def calibrate(
    model: Model, dataset: Dataset, limit: int, origin: tuple[int, str], start: str = ""
) -> Calibrated | None:
    """Calibrates a model's ITM head, in place.

    Args:
        model: with an ITM head.
        dataset: captioned images. Each caption makes two pairs: with its own image, and with another one.
        limit: greatest number of samples, from the first.
        origin: (step, name of the dataset) for the event.
        start: model that the training started from. Images that it has learned are left out; if too few remain, its
            share of dropped false pairs is kept instead.

    Returns:
        The calibration, or None if there are too few images.
    """
    known = learned_digests(start)
    if known:
        indices = range(min(limit, len(dataset)))
        digests = dataset.select(indices).image_digests()
        fresh = [index for index, digest in zip(indices, digests, strict=True) if digest not in known]
        if len(fresh) < MIN_IMAGES:
            return _carry_over(model, dataset.select(sorted({*indices} - {*fresh})), origin, start)
        dataset = dataset.select(fresh)
    pairs = _score_pairs(model, dataset, limit)
    if pairs is None:
        return None
    current = _match_cosine(model)
    areas = {w: _area(pairs.margins + (w - current) * pairs.itc, pairs.match) for w in _cosine_weights(model)}
    cosine = max(areas, key=lambda weight: areas[weight])  # of equal areas the smallest weight
    pairs = pairs._replace(margins=pairs.margins + (cosine - current) * pairs.itc)
    return _set_threshold(model, pairs, cosine, equal_error_threshold(pairs.margins, pairs.match), origin)


def _carry_over(model: Model, dataset: Dataset, origin: tuple[int, str], start: str) -> Calibrated | None:
    """Sets the threshold at which the model drops the share of false pairs that its start drops."""
    start_pairs = _score_pairs(load(start, device=str(model.device)), dataset, len(dataset))
    pairs = _score_pairs(model, dataset, len(dataset))
    if start_pairs is None or pairs is None:
        return None
    dropped = float((start_pairs.margins[~start_pairs.match] < 0).mean())
    threshold = float(np.quantile(pairs.margins[~pairs.match], dropped))
    return replace(_set_threshold(model, pairs, _match_cosine(model), threshold, origin), start=start)


class _ScoredPairs(NamedTuple):
    """Scores of n pairs.

    Args:
        margins: `[n]`, logit of "match" minus logit of "no match".
        itc: `[n]`, ITC cosine, 0 if it cannot be added.
        match: `[n]`, True for true pairs.
        images: number of images.
    """

    margins: Floats
    itc: Floats
    match: Truths
    images: int


def _score_pairs(model: Model, dataset: Dataset, limit: int) -> _ScoredPairs | None:
    was_training = model.module.training
    model.module.eval()
    try:
        samples, images = load_samples(model, dataset, limit)
        captioned = [i for i, sample in enumerate(samples) if sample.captions]
        pairs, match = _pairs([samples[i] for i in captioned])
        if min(len(captioned), int((~match).sum())) < MIN_IMAGES:
            return None
        scores = _match_margins(model, [images[i] for i in captioned], pairs)
        return _ScoredPairs(*scores, match, len(captioned))
    finally:
        model.module.train(was_training)


def _match_cosine(model: Model) -> float:
    """The weight of the ITC cosine in the logit of "match" now, 0 if it cannot be added."""
    return require(model.network, Matcher).match_cosine or 0.0


def _cosine_weights(model: Model) -> Sequence[float]:
    """Weights of the ITC cosine to choose from; 0 alone if the network has no embeddings, or cannot add it."""
    can_add = "embed" in model.capabilities and require(model.network, Matcher).match_cosine is not None
    return _COSINES if can_add else _COSINES[:1]


def _set_threshold(
    model: Model, pairs: _ScoredPairs, cosine: float, threshold: float, origin: tuple[int, str]
) -> Calibrated:
    """Sets the weight of the ITC cosine, and a probability of 0.5 at a margin of `threshold`."""
    before = _shares(pairs.margins - (cosine - _match_cosine(model)) * pairs.itc >= 0, pairs.match)
    require(model.network, Matcher).calibrate_match(threshold, cosine)
    area, after = _area(pairs.margins, pairs.match), _shares(pairs.margins >= threshold, pairs.match)
    return Calibrated(*origin, pairs.images, len(pairs.margins), area, before, after, cosine)


def _area(scores: Floats, match: Truths) -> float:
    return roc_auc(matching_curves(scores, match))


def _pairs(samples: Sequence[Sample]) -> tuple[list[tuple[int, str]], Truths]:
    """Captions with their own image, then with the next one in the order of the keys' hashes; which are true."""
    order = sorted(range(len(samples)), key=lambda i: _hash(samples[i].key))
    other = dict(zip(order, [*order[1:], *order[:1]], strict=True))
    true = [(i, text) for i, sample in enumerate(samples) for text in sample.captions]
    wrong = [(other[i], text) for i, text in true if text not in samples[other[i]].captions]
    return [*true, *wrong], np.arange(len(true) + len(wrong)) < len(true)


def _match_margins(
    model: Model, images: Sequence[Pixels], pairs: Sequence[tuple[int, str]]
) -> tuple[Floats, Floats]:
    """Margins `[n]` and ITC cosines `[n]` (0 if they cannot be added) of n pairs; each image is encoded once.

    Args:
        model: with an ITM head.
        images: all of them in at least one pair.
        pairs: (index of the image, text).
    """
    strings = [text for _, text in pairs]
    embeds = len(_cosine_weights(model)) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # texts longer than the model's limit
        texts = model.tokenize(strings)
        embeddings = model.embed_texts(strings) if embeds else None  # [n, P]
    owner = np.array([image for image, _ in pairs])
    margins, cosines = np.empty(len(pairs)), np.zeros(len(pairs))
    for start in range(0, len(images), model.sizer.default):
        part = images[start : start + model.sizer.default]
        rows = [np.flatnonzero(owner == start + i) for i in range(len(part))]  # pairs of each image
        encoded, own = model.encode(part), np.concatenate(rows)
        logits = np.concatenate(model.match_scores(encoded, texts, rows)).astype(np.float64)  # [r, 2]
        margins[own] = logits[:, 1] - logits[:, 0]
        if embeddings is not None:
            image_embeddings = embed_images(require(model.network, Embedder), encoded).cpu().numpy()  # [b, P]
            cosines[own] = (image_embeddings[owner[own] - start] * embeddings[own]).sum(axis=1)
    return margins, cosines


def _shares(accepted: Truths, match: Truths) -> dict[str, float]:
    """Share of true pairs accepted (true-positive rate), and of false pairs rejected (true-negative rate)."""
    return {"kept": float(accepted[match].mean()), "dropped": float(1 - accepted[~match].mean())}


def _hash(key: str) -> bytes:
    return blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
