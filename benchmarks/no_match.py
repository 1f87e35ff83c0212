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
from sightloop.types import Floats, Floats32, Integers, Sample

CUTS = (0.05, 0.1, 0.2)
_JUDGED_OF_ALL = 3 * JUDGED  # in each half there are then 16 of them, but for a few texts


def area(present: Floats, absent: Floats) -> float:
    """Area under the ROC curve: probability that a present text scores higher than an absent one."""
    order = np.sort(absent)
    below = np.searchsorted(order, present, "left") + np.searchsorted(order, present, "right")
    return float(below.mean() / 2 / len(absent))


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
        self._bank = Background(texts[self.own], self._ids)

    def score(self, text: int, *, masked: bool = False) -> tuple[float, float]:
        """Score and best cosine of a text with the index, or with all of it but the text's own image."""
        rows = self.own[self.own != text] if masked else self.own
        cosines = self._images[rows] @ self._texts[text]
        order = np.argsort(-cosines, kind="stable")[: POOL if self._odds is None else JUDGED]
        chosen = rows[order]
        if self._odds is not None:
            values = np.nan_to_num(self._odds[text, chosen], nan=-np.inf)
        else:
            own = str(text) if text in self.own else ""
            ids = [str(i) for i in chosen]
            values = self._bank.normalized(cosines[order], self._images[chosen], ids, own)
        return float(best_mean(values[None])[0]), float(cosines.max())

    def measure(self) -> list[float]:
        """Rates of false finds and shares missed for each cut, areas of the score and of the cosine."""
        absent, absent_cosines = np.array([self.score(i, masked=True) for i in self.own]).T
        present, present_cosines = np.array([self.score(i) for i in self.own]).T
        queries = np.array([self.score(i)[0] for i in self.others])
        null = NullScores("itc", np.sort(absent), np.sort(present), len(self.own), "")
        false = [float((null.p_values(queries) <= cut).mean()) for cut in CUTS]
        missed = [float((null.p_values(present) > cut).mean()) for cut in CUTS]
        return [*false, *missed, area(present, absent), area(present_cosines, absent_cosines)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the rates."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-d", "--data", required=True, help="images with captions")
    parser.add_argument("-m", "--model", default="nano")
    parser.add_argument(
        "--itm", action="store_true", help="the ITM score (48 pairs a caption), not the ITC score"
    )
    parser.add_argument("--splits", type=int, default=20)
    options = parser.parse_args(arguments)
    model: Model = sightloop.load(options.model)
    samples = [sample for sample in sightloop.open_dataset(options.data) if sample.captions]
    captions = [sample.captions[0] for sample in samples]
    images, texts = model.embed_images([s.image for s in samples]), model.embed_texts(captions)
    odds = None
    if options.itm:
        ranked = np.argsort(-(texts @ images.T), axis=1, kind="stable")[:, :_JUDGED_OF_ALL]
        odds = itm_log_odds(model, samples, captions, ranked)
    results = np.array([Split(images, texts, odds, seed).measure() for seed in range(options.splits)])
    mean, spread = results.mean(axis=0), results.std(axis=0)
    kind = "ITM" if options.itm else "ITC"
    print(
        f"{kind}, {model.name}: {len(samples):,} captions, half of the images indexed, {options.splits} splits"
    )
    for i, cut in enumerate(CUTS):
        print(
            f"promised {100 * cut:4.0f} %   false finds {100 * mean[i]:5.1f} % +- {100 * spread[i]:.1f}   "
            f"missed {100 * mean[len(CUTS) + i]:5.1f} %"
        )
    print(f"area: score {mean[-2]:.3f}, best cosine {mean[-1]:.3f}")


if __name__ == "__main__":
    main()
