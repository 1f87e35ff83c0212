"""Does the cut of a search keep its promise? `python -m benchmarks.no_match -d dev-000.tar [--itm]`.

The images with captions are split in half at random, 20 times. One half is the index; its captions, one an image, are
the background texts, scored with their own images masked as `search --cut` does. The captions of the other half are
queries that nothing in the index shows: the share of them with p <= cut is the measured rate of false finds. What is
missed is the share of the index's own captions with p > cut. The areas under the ROC curve compare the score of a
caption with its image in the index and without: 0.5 is chance.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch

import sightloop
from sightloop.inference.model import Model
from sightloop.search.calibration import JUDGED, POOL, Background, NullScores, best_mean
from sightloop.search.score_weights import area, learn_scores
from sightloop.types import Floats, Floats32, Integers, Sample

CUTS = (0.05, 0.1, 0.2)
_JUDGED_OF_ALL = 3 * JUDGED  # in each half there are then 16 of them, but for a few texts


def itm_log_odds(model: Model, samples: Sequence[Sample], texts: list[str], ranked: Integers) -> Floats32:
    """Log odds `[m, n]` of the pairs of each text and its images in `ranked` `[m, k]` and its own; NaN elsewhere."""
    tokens = model.tokenize(texts)
    odds = np.full((len(texts), len(samples)), np.nan, np.float32)
    start = 0
    with torch.inference_mode():
        for batch in model.preprocessor.batches([sample.image for sample in samples]):
            wanted = [
                np.flatnonzero((ranked == i).any(axis=1) | (np.arange(len(texts)) == i))
                for i in range(start, start + len(batch))
            ]
            logits = model.match_scores(model.encode(batch), tokens, wanted)
            for i, (rows, pair) in enumerate(zip(wanted, logits, strict=True), start):
                odds[rows, i] = pair[:, 1] - pair[:, 0]
            start += len(batch)
            print(f"  ITM: {start:,} of {len(samples):,} images", flush=True)
    return odds


class Split:
    """One half of the images as an index, the captions of the other half as queries.

    Args:
        images: unit vectors `[n, d]`.
        texts: of one caption an image, `[n, d]`.
        odds: of `itm_log_odds`; None for ITC.
        seed: of the split.
    """

    def __init__(self, images: Floats32, texts: Floats32, odds: Floats32 | None, seed: int) -> None:
        order = np.random.default_rng(seed).permutation(len(images))
        self.own, self.others = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
        self._images, self._texts, self._odds = images, texts, odds
        self._ids = [str(i) for i in self.own]
        self._bank = Background(texts[self.own], self._ids, images[self.own])

    def signals(self, text: int, *, masked: bool = False) -> tuple[Floats, float]:
        """Signals and best cosine of a text with the index, or with all of it but the text's own image."""
        rows = self.own[self.own != text] if masked else self.own
        cosines = self._images[rows] @ self._texts[text]
        order = np.argsort(-cosines, kind="stable")[: POOL if self._odds is None else JUDGED]
        chosen = rows[order]
        own, ids = str(text) if text in self.own else "", [str(i) for i in chosen]
        values = self._bank.signals(self._texts[text], cosines[order], self._images[chosen], ids, own)
        if self._odds is not None:
            odds = np.nan_to_num(self._odds[text, chosen], nan=-np.inf)
            values = np.array([best_mean(odds[None])[0], odds.max(), *values])
        return values, float(cosines.max())

    def measure(self) -> list[float]:
        """Rates of false finds and shares missed for each cut, areas of the score and of the cosine."""
        without, absent_cosines = zip(*(self.signals(i, masked=True) for i in self.own), strict=True)
        with_own, present_cosines = zip(*(self.signals(i) for i in self.own), strict=True)
        kind = "itc" if self._odds is None else "itm"
        weights, absent, present = learn_scores(kind, np.stack(without), np.stack(with_own))
        queries = weights.scores(np.stack([self.signals(i)[0] for i in self.others]))
        null = NullScores(kind, np.sort(absent), np.sort(present), len(self.own), "")
        false = [float((null.p_values(queries) <= cut).mean()) for cut in CUTS]
        missed = [float((null.p_values(present) > cut).mean()) for cut in CUTS]
        return [
            *false,
            *missed,
            area(present, absent),
            area(np.array(present_cosines), np.array(absent_cosines)),
        ]


def embed(model: Model, data: str, *, with_odds: bool) -> tuple[Floats32, Floats32, Floats32 | None]:
    """Unit vectors of images and of one caption each, and ITM log odds if they are asked for."""
    samples = [sample for sample in sightloop.open_dataset(data) if sample.captions]
    captions = [sample.captions[0] for sample in samples]
    images, texts = model.embed_images([s.image for s in samples]), model.embed_texts(captions)
    if not with_odds:
        return images, texts, None
    ranked = np.argsort(-(texts @ images.T), axis=1, kind="stable")[:, :_JUDGED_OF_ALL]
    return images, texts, itm_log_odds(model, samples, captions, ranked)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the rates."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-d", "--data", help="images with captions")
    parser.add_argument("-m", "--model", default="nano")
    parser.add_argument(
        "--itm", action="store_true", help="the ITM score (48 pairs a caption), not the ITC score"
    )
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument(
        "--vectors", help="an .npz with images and texts, unit vectors, in place of a model's"
    )
    options = parser.parse_args(arguments)
    odds, name = None, options.vectors or options.model
    if options.vectors:
        with np.load(options.vectors) as file:
            images, texts = file["images"], file["texts"]
    elif options.data:
        images, texts, odds = embed(sightloop.load(options.model), options.data, with_odds=options.itm)
    else:
        parser.error("--data or --vectors: give one of them")
    results = np.array([Split(images, texts, odds, seed).measure() for seed in range(options.splits)])
    mean, spread = results.mean(axis=0), results.std(axis=0)
    kind = "ITM" if options.itm else "ITC"
    print(f"{kind}, {name}: {len(texts):,} captions, half of the images indexed, {options.splits} splits")
    for i, cut in enumerate(CUTS):
        print(
            f"promised {100 * cut:4.0f} %   false finds {100 * mean[i]:5.1f} % +- {100 * spread[i]:.1f}   "
            f"missed {100 * mean[len(CUTS) + i]:5.1f} %"
        )
    print(f"area: score {mean[-2]:.3f}, best cosine {mean[-1]:.3f}")


if __name__ == "__main__":
    main()
