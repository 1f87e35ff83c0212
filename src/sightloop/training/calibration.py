"""The judge's verdict is set on unseen pairs: how much ITC counts beside ITM, and where the threshold lies.

Training pairs are judged better than others, so a judge that is fair to them says no to the world too often: 0.5 is
moved to where as large a share of true pairs stays as of wrong ones goes. Where a network can count ITC's cosine too
(`match_cosine` of BLIP), it does so as often as sorts the pairs best. A model may come with digests of the images
that it has learned from (`nano` does): true pairs of these are known by heart and tell nothing, but wrong ones are
still new, so that of those as many are to be dropped as before.
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
from sightloop.data.datasets.dataset import Dataset
from sightloop.data.images.decode import read_file
from sightloop.errors import ImageError
from sightloop.inference.load import load
from sightloop.inference.model import Model
from sightloop.metrics import balanced_threshold, matching_curves, roc_area
from sightloop.protocols import Embedder, Matcher, require
from sightloop.tasks.embed import embed_images
from sightloop.training.events import Calibrated
from sightloop.training.validation import load_samples
from sightloop.types import Floats, Pixels, Sample

MIN_IMAGES = 20  # images: from fewer, a threshold is a guess
DIGESTS_FILE, DIGEST_BYTES = "learned.bin", 3  # a file in a model's folder; bytes of an image's digest in it
_PART, _LEAST, _MOST = 20, 50, 500
_COSINES = (0.0, 5.0, 10.0, 20.0, 40.0)  # that ITC may count beside ITM's logit

Truths: TypeAlias = NDArray[np.bool_]


def split_held_out(dataset: Dataset) -> tuple[Dataset, Dataset]:
    """(to learn from, to calibrate on): the second has a twentieth of the samples, but 50 to 500, at most a quarter of
    all, and none where that would be fewer than 20.

    Their keys alone say which: a training that starts from the result of another one, with the same data or more,
    does not calibrate on what was learned before.
    """
    count = len(dataset)
    held = min(max(count // _PART, _LEAST), _MOST, count // 4)
    if held < MIN_IMAGES:
        return dataset, dataset.select([])
    order = np.array(sorted(range(count), key=lambda index: _hash(dataset.key(index))), np.int64)
    return dataset.select(np.sort(order[held:])), dataset.select(order[:held])


def learned_digests(start: str) -> frozenset[bytes]:
    """The digests of images it learned from that come with a model on this machine; mostly there are none."""
    path = (BUNDLED_FOLDER if start == BUNDLED else Path(start)) / DIGESTS_FILE
    known = path.read_bytes() if start and path.is_file() else b""
    return frozenset(known[at : at + DIGEST_BYTES] for at in range(0, len(known), DIGEST_BYTES))


def image_digest(dataset: Dataset, index: int) -> bytes:
    """What tells an image from nearly every other, from its encoded bytes; empty where they cannot be read."""
    try:
        picture = dataset[index].image
        data = picture if isinstance(picture, bytes) else read_file(str(picture))
    except ImageError:
        return b""
    return blake2b(data, digest_size=DIGEST_BYTES).digest()


def calibrate(
    model: Model, dataset: Dataset, limit: int, origin: tuple[int, str], start: str = ""
) -> Calibrated | None:
    """Sets the verdict of the model's judge, in place, and says what that changes; None where pairs are too few.

    Of the dataset's first `most` samples every caption counts twice: with its own image, and with another one.
    about: the step and the name of the data, for the event. start: the model that the training began with; images
    that it has learned from are left out, and where too few are left, what share of wrong texts it drops is kept.
    """
    known = learned_digests(start)
    if known:
        seen = range(min(limit, len(dataset)))
        fresh = [index for index in seen if image_digest(dataset, index) not in known]
        if len(fresh) < MIN_IMAGES:
            return _carry_over(model, dataset.select(sorted({*seen} - {*fresh})), origin, start)
        dataset = dataset.select(fresh)
    pairs = _score_pairs(model, dataset, limit)
    if pairs is None:
        return None
    counted = _match_cosine(model)
    areas = {w: _area(pairs.margins + (w - counted) * pairs.itc, pairs.match) for w in _cosine_weights(model)}
    cosine = max(areas, key=lambda each: areas[each])  # of equal ones the first, which counts ITC least
    pairs = pairs._replace(odds=pairs.margins + (cosine - counted) * pairs.itc)
    return _set_threshold(model, pairs, cosine, balanced_threshold(pairs.margins, pairs.match), origin)


def _carry_over(model: Model, dataset: Dataset, origin: tuple[int, str], start: str) -> Calibrated | None:
    """The share of wrong texts that is dropped stays what it was, with images that were known from the start."""
    theirs = _score_pairs(load(start, device=str(model.device)), dataset, len(dataset))
    pairs = _score_pairs(model, dataset, len(dataset))
    if theirs is None or pairs is None:
        return None
    dropped = float((theirs.margins[~theirs.match] < 0).mean())
    threshold = float(np.quantile(pairs.margins[~pairs.match], dropped))
    return replace(_set_threshold(model, pairs, _match_cosine(model), threshold, origin), start=start)


class _ScoredPairs(NamedTuple):
    """Pairs `[n]`: the odds of the judge (the logit of "match" less that of "no match"), ITC's cosine (0 where it
    cannot count), which are true; of how many images."""

    margins: Floats
    itc: Floats
    match: Truths
    images: int


def _score_pairs(model: Model, dataset: Dataset, limit: int) -> _ScoredPairs | None:
    was_training = model.module.training
    model.module.eval()
    try:
        samples, pictures = load_samples(model, dataset, limit)
        told = [i for i, sample in enumerate(samples) if sample.captions]
        pairs, match = _pairs([samples[i] for i in told])
        if min(len(told), int((~match).sum())) < MIN_IMAGES:
            return None
        return _ScoredPairs(*_match_margins(model, [pictures[i] for i in told], pairs), match, len(told))
    finally:
        model.module.train(was_training)


def _match_cosine(model: Model) -> float:
    """The weight of the ITC cosine in the logit of "match" now, 0 if it cannot be added."""
    return require(model.network, Matcher).match_cosine or 0.0


def _cosine_weights(model: Model) -> Sequence[float]:
    """Weights of the ITC cosine to choose from; 0 alone if the network has no embeddings, or cannot add it."""
    able = "embed" in model.capabilities and require(model.network, Matcher).match_cosine is not None
    return _COSINES if able else _COSINES[:1]


def _set_threshold(
    model: Model, pairs: _ScoredPairs, cosine: float, threshold: float, origin: tuple[int, str]
) -> Calibrated:
    """Sets the weight of the ITC cosine, and a probability of 0.5 for log odds of `threshold`."""
    before = _shares(pairs.margins - (cosine - _match_cosine(model)) * pairs.itc >= 0, pairs.match)
    require(model.network, Matcher).calibrate_match(threshold, cosine)
    area, after = _area(pairs.margins, pairs.match), _shares(pairs.margins >= threshold, pairs.match)
    return Calibrated(*origin, pairs.images, len(pairs.margins), area, before, after, cosine)


def _area(scores: Floats, match: Truths) -> float:
    return roc_area(matching_curves(scores, match))


def _pairs(samples: Sequence[Sample]) -> tuple[list[tuple[int, str]], Truths]:
    """(image, text): all captions with their own, then with the next image in the order of the keys' hashes."""
    order = sorted(range(len(samples)), key=lambda i: _hash(samples[i].key))
    other = dict(zip(order, [*order[1:], *order[:1]], strict=True))
    true = [(i, text) for i, sample in enumerate(samples) for text in sample.captions]
    wrong = [(other[i], text) for i, text in true if text not in samples[other[i]].captions]
    return [*true, *wrong], np.arange(len(true) + len(wrong)) < len(true)


def _match_margins(
    model: Model, images: Sequence[Pixels], pairs: Sequence[tuple[int, str]]
) -> tuple[Floats, Floats]:
    """The odds of each pair `[n]` and ITC's cosine, 0 where that cannot count; each image is encoded once.

    Every image is in a pair.
    """
    strings = [text for _, text in pairs]
    embeds = len(_cosine_weights(model)) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a text that is longer than the model reads
        texts = model.tokenize(strings)
        words = model.embed_texts(strings) if embeds else None
    owner = np.array([picture for picture, _ in pairs])
    odds, cosines = np.empty(len(pairs)), np.zeros(len(pairs))
    for start in range(0, len(images), model.batch_size):
        part = images[start : start + model.batch_size]
        rows = [np.flatnonzero(owner == start + place) for place in range(len(part))]
        image, mine = model.encode(part), np.concatenate(rows)
        logits = np.concatenate(model.match_scores(image, texts, rows)).astype(np.float64)
        odds[mine] = logits[:, 1] - logits[:, 0]
        if words is not None:
            seen = embed_images(require(model.network, Embedder), image).cpu().numpy()
            cosines[mine] = (seen[owner[mine] - start] * words[mine]).sum(axis=1)
    return odds, cosines


def _shares(taken: Truths, match: Truths) -> dict[str, float]:
    return {"kept": float(taken[match].mean()), "dropped": float(1 - taken[~match].mean())}


def _hash(key: str) -> bytes:
    return blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
