"""ITM's threshold: 0.5 is moved to where, of unseen pairs, as large a share of true ones stays as of wrong ones goes.

Training pairs are judged better than others, so a judge that is fair to them says no to the world too often.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from sightread.data.samples import Dataset
from sightread.pipelines import rerank
from sightread.pipelines.checkup import readable
from sightread.pipelines.metrics.matching import balanced_threshold, matching_scores
from sightread.pipelines.model import Model
from sightread.pipelines.run_events import Calibrated
from sightread.types import Pixels, Sample

FEWEST = 20  # pictures: from fewer, a threshold is a guess
_PART, _LEAST, _MOST = 20, 50, 500

Floats: TypeAlias = NDArray[np.float64]
Truths: TypeAlias = NDArray[np.bool_]


def held_out(dataset: Dataset) -> tuple[Dataset, Dataset]:
    """(to learn from, to calibrate on): the second has a twentieth of the samples, but 50 to 500, at most a quarter of
    all, and none where that would be fewer than 20.

    Their keys alone say which: a training that starts from the result of another one, with the same data or more,
    does not calibrate on what was learned before.
    """
    count = len(dataset)
    held = min(max(count // _PART, _LEAST), _MOST, count // 4)
    if held < FEWEST:
        return dataset, dataset.select([])
    order = np.array(sorted(range(count), key=lambda index: _hash(dataset.key(index))), np.int64)
    return dataset.select(np.sort(order[held:])), dataset.select(order[:held])


def calibrate(model: Model, dataset: Dataset, most: int, about: tuple[int, str]) -> Calibrated | None:
    """Moves the threshold of the model's judge, in place, and says what that changes; None where pairs are too few.

    Of the dataset's first `most` samples every caption counts twice: with its own picture, and with another one.
    about: the step and the name of the data, for the event.
    """
    was_training = model.network.training
    model.network.eval()
    try:
        samples, pictures = readable(model, dataset, most)
        told = [i for i, sample in enumerate(samples) if sample.captions]
        pairs, match = _pairs([samples[i] for i in told])
        if min(len(told), int((~match).sum())) < FEWEST:
            return None
        odds = _judged(model, [pictures[i] for i in told], pairs)
    finally:
        model.network.train(was_training)
    threshold = balanced_threshold(odds, match)
    move_threshold(model.network, threshold)
    area = matching_scores(odds, match, logits=True)["roc_auc"]
    before, after = (_shares(odds >= limit, match) for limit in (0.0, threshold))
    return Calibrated(about[0], about[1], len(told), len(pairs), area, before, after)


def move_threshold(network: Any, odds: float) -> None:
    """What has these odds now (the logit of "match" less that of "no match") gets the probability 0.5."""
    with torch.no_grad():
        network.match_head.bias[1] -= odds


def _pairs(samples: Sequence[Sample]) -> tuple[list[tuple[int, str]], Truths]:
    """(picture, text): all captions with their own, then with the next picture in the order of the keys' hashes."""
    order = sorted(range(len(samples)), key=lambda i: _hash(samples[i].key))
    other = dict(zip(order, [*order[1:], *order[:1]], strict=True))
    true = [(i, text) for i, sample in enumerate(samples) for text in sample.captions]
    wrong = [(other[i], text) for i, text in true if text not in samples[other[i]].captions]
    return [*true, *wrong], np.arange(len(true) + len(wrong)) < len(true)


def _judged(model: Model, pictures: Sequence[Pixels], pairs: Sequence[tuple[int, str]]) -> Floats:
    """The odds of each pair `[n]`; each picture is encoded once. Every picture is in a pair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a text that is longer than the model reads
        texts = rerank.Texts(model, [text for _, text in pairs])
    owner = np.array([picture for picture, _ in pairs])
    odds = np.empty(len(pairs))
    for start in range(0, len(pictures), model.batch_size):
        part = pictures[start : start + model.batch_size]
        rows = [np.flatnonzero(owner == start + place) for place in range(len(part))]
        logits = np.concatenate(rerank.judge(model, model.encode(part), texts, rows)).astype(np.float64)
        odds[np.concatenate(rows)] = logits[:, 1] - logits[:, 0]
    return odds


def _shares(taken: Truths, match: Truths) -> dict[str, float]:
    return {"kept": float(taken[match].mean()), "dropped": float(1 - taken[~match].mean())}


def _hash(key: str) -> bytes:
    return blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
