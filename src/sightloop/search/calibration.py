"""Calibrated no-match: from which score on an index has something that a text describes.

A score says little by itself: the best cosine of a text with 100,000 images is high whatever the text. So the score of
a query is compared with the null, the scores of background texts against the same index with their own images masked:

    p = (1 + number of null scores >= the query's score) / (m + 1)

This is a conformal p-value (Vovk et al. 2005): for queries like the background texts that nothing in the index shows,
p <= 0.1 happens in at most 10 % of cases, whatever the model is worth. What a bad model costs is what it misses, which
is estimated too: the share of background texts that are refused although their own image is there.

Signals of which the score is made (see `score_weights`):

* ITC: the best cosine and the mean of the 5 best, each normalized by what background texts reach with that image (the
  inverted softmax of QB-Norm, Bogolin et al. 2022), so that images that are close to every text do not count; mean and
  spread of the text's cosines with the index, so that texts that are close to every image do not count.
* ITM: beside these, the best ITM log odds (logit of match - logit of no match) among the 16 images that ITC ranks
  first, and the mean of the 5 best.

A background text is scored as a query is: without itself, and without the texts of its own image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sightloop.errors import UsageError
from sightloop.search.score_weights import ScoreKind, ScoreWeights
from sightloop.types import Floats, Floats32, Integers, JsonDict, JsonMapping

BEST = 5  # scores that are averaged
JUDGED = 16  # images that ITM sees for a query
POOL = 100  # images that ITC ranks first, whose cosines are normalized
MIN_BACKGROUND = 500  # texts; fewer do not tell a rate of 5 % from one of 7 %
MAX_BACKGROUND = {"itm": 500, "itc": 1000}
GROWTH = 0.1  # share by which an index may change before its null is made anew

_INVERSE_TEMPERATURE = 20.0  # of the inverted softmax, as in QB-Norm
_FORMAT = 2


def best_mean(scores: Floats | Floats32) -> Floats:
    """Mean of the 5 highest scores of each row: `[n, k]` -> `[n]`; of fewer, of all; -inf without any."""
    if scores.shape[1] == 0:
        return np.full(len(scores), -np.inf)
    best = -np.sort(-scores.astype(np.float64), axis=1)[:, :BEST]
    counted = np.isfinite(best)
    sums = np.where(counted, best, 0).sum(axis=1)
    return np.where(counted.any(axis=1), sums / np.maximum(counted.sum(axis=1), 1), -np.inf)


class Background:
    """Background texts: vectors, the image that each describes, and a sample of the index."""

    def __init__(self, vectors: Floats32, owners: Sequence[str], images: Floats32) -> None:
        """Background texts.

        Args:
            vectors: unit vectors `[m, d]`.
            owners: id of each text's own image; "" for none.
            images: of a sample of the index, unit vectors `[n, d]`, or `[n, q, d]`: the nearest counts.
        """
        self.vectors, self.owners = vectors, tuple(owners)
        self.images = images if images.ndim == 3 else images[:, None]
        self._numbers: dict[str, int] = {}
        for owner in self.owners:
            if owner:
                self._numbers.setdefault(owner, len(self._numbers))
        self._owner: Integers = np.array([self._numbers.get(owner, -1) for owner in self.owners], np.int64)

    def __len__(self) -> int:
        return len(self.owners)

    def signals(
        self, query: Floats32, cosines: Floats32, images: Floats32, ids: Sequence[str], own: str = ""
    ) -> Floats:
        """The ITC signals of a query, float64 `[4]`, as `score_weights.ITC_SIGNALS` names them.

        Args:
            query: its unit vector `[d]`.
            cosines: with the k images that ITC ranks first, `[k]`.
            images: see `normalized`.
            ids: see `normalized`.
            own: see `normalized`.
        """
        values = self.normalized(cosines, images, ids, own)[None]
        others = (self.images @ query).max(axis=1)  # [n]
        mean, spread = (others.mean(), others.std()) if len(others) else (0.0, 0.0)
        return np.array([values.max(initial=-np.inf), best_mean(values)[0], mean, spread], np.float64)

    def normalized(self, cosines: Floats32, images: Floats32, ids: Sequence[str], own: str = "") -> Floats:
        """Cosines of one query, normalized by what the background texts reach with each image.

        Args:
            cosines: of the query with its k images, `[k]`.
            images: unit vectors of the images `[k, d]`, or `[k, q, d]`: the nearest counts.
            ids: of the images.
            own: the image of the query itself, if it is a background text; the texts of this image do not count.

        Returns:
            float64 `[k]`: cosine * 20 - log of the mean over the background texts of exp(their cosine * 20). A text
            does not count for its own image: it is no background there.
        """
        own_number = self._numbers.get(own, -2)
        columns = np.array([self._numbers.get(identity, -2) for identity in ids], np.int64)
        counted = (self._owner[:, None] != columns) & (self._owner != own_number)[:, None]  # [m, k]
        vectors = images if images.ndim == 3 else images[:, None]  # [k, q, d]
        others = self.vectors @ vectors.reshape(-1, vectors.shape[-1]).T  # [m, k * q]
        others = others.reshape(len(self), *vectors.shape[:2]).max(axis=2, initial=-1.0)
        powers = np.exp(_INVERSE_TEMPERATURE * others) * counted
        means = powers.sum(axis=0, dtype=np.float64) / np.maximum(counted.sum(axis=0), 1)
        least = np.exp(-_INVERSE_TEMPERATURE)
        return _INVERSE_TEMPERATURE * cosines.astype(np.float64) - np.log(np.maximum(means, least))


def choose_background(captions: Sequence[Sequence[str]], count: int, seed: int = 0) -> list[tuple[int, str]]:
    """Background texts from the captions of images: one of each image in random order, then second ones.

    Args:
        captions: of each image.
        count: greatest number of texts.
        seed: of the order.

    Returns:
        (index of the image, text); no text twice.
    """
    order = np.random.default_rng(seed).permutation(len(captions)).tolist()
    chosen: dict[str, int] = {}
    for turn in range(max(map(len, captions), default=0)):
        for image in order:
            if len(chosen) >= count:
                return [(owner, text) for text, owner in chosen.items()]
            if turn < len(captions[image]) and (text := str(captions[image][turn]).strip()):
                chosen.setdefault(text, image)
    return [(owner, text) for text, owner in chosen.items()]


@dataclass(frozen=True, slots=True, eq=False)
class NullScores:
    """The null of an index: what texts score that nothing in it shows.

    Args:
        kind: of the scores.
        absent: of the background texts, their own images masked, ascending, float64 `[m]`.
        present: of those that have an image in the index, with it, ascending, float64 `[p]`; may be empty.
        images: number of rows of the index when it was made.
        source: where the texts are from, for people: "captions of the index".
        key: of what else the scores depend on: model, judge, filter, background file.
        weights: of the signals; the plain score by default.
    """

    kind: ScoreKind
    absent: Floats = field(repr=False)
    present: Floats = field(repr=False)
    images: int
    source: str
    key: str = ""
    weights: ScoreWeights | None = field(default=None, repr=False)

    def score(self, signals: Floats) -> float:
        """Score of a query by its signals `[s]`."""
        return float((self.weights or ScoreWeights.plain(self.kind)).scores(signals[None])[0])

    def p_value(self, score: float) -> float:
        """Conformal p-value of a query's score, above 0 and at most 1."""
        return float(self.p_values(np.array([score]))[0])

    def p_values(self, scores: Floats) -> Floats:
        """Conformal p-values `[n]` of scores `[n]`."""
        at_least = len(self.absent) - np.searchsorted(self.absent, scores, side="left")
        return (1 + at_least) / (len(self.absent) + 1)

    def missed(self, cut: float) -> float | None:
        """Share of texts that are refused at this cut although their image is there; None where unknown."""
        if not len(self.present):
            return None
        return float((self.p_values(self.present) > cut).mean())

    def is_stale(self, images: int) -> bool:
        """Whether the index has since grown or shrunk by 10 %."""
        return abs(images - self.images) > GROWTH * max(1, self.images)

    def as_json(self) -> JsonDict:
        """The object that `from_json` reads."""
        scores = {name: np.round(getattr(self, name), 6).tolist() for name in ("absent", "present")}
        facts = {"kind": self.kind, "images": self.images, "source": self.source, "key": self.key}
        used = self.weights or ScoreWeights.plain(self.kind)
        return {"format": _FORMAT, **facts, **scores, "weights": used.values.tolist(), "bias": used.bias}

    @classmethod
    def from_json(cls, value: JsonMapping) -> NullScores:
        """The null of `as_json`. Raises ValueError for anything else."""
        try:
            if value["format"] != _FORMAT or value["kind"] not in ("itm", "itc"):
                raise ValueError("another format")
            absent, present = (np.sort(np.array(value[name], np.float64)) for name in ("absent", "present"))
            weights = ScoreWeights(np.array(value["weights"], np.float64), float(value["bias"]))
            facts = int(value["images"]), str(value["source"]), str(value["key"])
            return cls(value["kind"], absent, present, *facts, weights)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a calibration: {error}") from error


def check_cut(cut: float) -> None:
    """Raises UsageError for a promised rate that is not between 0 and 1."""
    if not 0 < cut < 1:
        raise UsageError(f"cut={cut:g}: must be between 0 and 1, such as 0.1 for at most 10 % false finds")


def log_odds(probabilities: Floats32) -> Floats:
    """ITM log odds `[n]` of probabilities `[n]`, within 16.1 of 0, where float32 ends; -inf for NaN."""
    clipped = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    return np.where(np.isnan(probabilities), -np.inf, np.log(clipped) - np.log1p(-clipped))


def verdict(null: NullScores, score: float, cut: float) -> tuple[bool, str]:
    """Whether something was found at a promised rate of false finds, and a sentence that says what that is worth."""
    p = null.p_value(score)
    is_found = p <= cut
    missed = null.missed(cut)
    cost = (
        "how many real finds it refuses is unknown: the background texts have no images here"
        if missed is None
        else f"it refuses {100 * missed:.0f} % of texts whose image is there"
    )
    words = "p" if is_found else "nothing here shows that: p"
    return is_found, (
        f"{words} = {p:.3f} by {null.kind.upper()}; a cut of {cut:g} promises at most {100 * cut:g} % false finds for "
        f"queries like the {len(null.absent):,} background texts ({null.source}); {cost}"
    )
