"""Search for evaluation data in the training data: exact and near copies of images and captions, in one pass.

Images are compared as `sightloop duplicates` does (`data.copies`): copies that were re-encoded, resized, stretched,
turned gray, brightened, framed by a thin border, mirrored, turned, or cropped down to 80 % of the side are found; a
copy under a large logo is not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice, pairwise
from typing import NamedTuple
from unicodedata import category, normalize

import numpy as np
from numpy.typing import NDArray

from sightloop.data.copies.copies import COPY_THRESHOLD, CopySet
from sightloop.data.copies.image_hash import draft_hashes
from sightloop.data.images.decode import read_file
from sightloop.errors import ImageError
from sightloop.types import Sample

IMAGE_THRESHOLD = COPY_THRESHOLD
CAPTION_THRESHOLD = 0.75

_MIN_CAPTION_WORDS = 5  # many unrelated images share captions such as "a dog"
_CHUNK = 4096  # training images compared at a time


@dataclass(frozen=True, slots=True)
class Leak:
    """An evaluation image or caption and the most similar one of the training data.

    Attributes:
        train: key of the training sample.
        evaluation: key of the evaluation sample.
        similarity: at most 1.
        exact: whether the bytes of the images, or the words of the captions, are equal.
        text: the caption of the evaluation sample; empty for images.
    """

    train: str
    evaluation: str
    similarity: float
    exact: bool
    text: str = ""


@dataclass(frozen=True, slots=True)
class Leaks:
    """Leaks between a training and an evaluation set; false where there are none.

    Attributes:
        images: leaked images, most similar first.
        captions: leaked captions, most similar first.
        train_samples: number of training samples compared.
        evaluation_samples: number of evaluation samples compared.
        unreadable: keys of samples whose image could not be read, of either set.
    """

    images: tuple[Leak, ...]
    captions: tuple[Leak, ...]
    train_samples: int
    evaluation_samples: int
    unreadable: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.images or self.captions)

    def summary(self) -> str:
        """One paragraph: counts, an example of each kind, and the consequence. Empty without leaks."""
        if not self:
            return ""
        counts = [
            _summarize(leaks, kind)
            for leaks, kind in ((self.images, "image"), (self.captions, "caption"))
            if leaks
        ]
        consequence = (
            "Scores on these images measure memorization: remove them from one of the two sets."
            if self.images
            else "A few equal captions of different images are normal; many mean that the texts were copied."
        )
        return f"{'; '.join(counts)}. {consequence}"


def _summarize(leaks: Sequence[Leak], kind: str) -> str:
    exact = sum(leak.exact for leak in leaks)
    example = leaks[0]
    subject = (
        f"{len(leaks):,} evaluation {kind} is"
        if len(leaks) == 1
        else f"{len(leaks):,} evaluation {kind}s are"
    )
    text = f': "{example.text}"' if example.text else ""
    return (
        f"{subject} in the training data ({exact:,} exact, {len(leaks) - exact:,} near), "
        f"for example {example.evaluation} = {example.train}{text}"
    )


def find_leaks(
    train: Iterable[Sample],
    evaluation: Iterable[Sample],
    *,
    image_threshold: float = IMAGE_THRESHOLD,
    caption_threshold: float = CAPTION_THRESHOLD,
) -> Leaks:
    """Evaluation images and captions that are in the training data.

    Each set is read once, the evaluation set first. The evaluation set stays in memory (3 kB an image), the training
    set does not. Images that cannot be read are listed in `Leaks.unreadable`.

    Args:
        train: training samples; may be a stream of any length.
        evaluation: evaluation samples.
        image_threshold: similarity of the frequencies (at most 1) from which images are near copies.
        caption_threshold: Jaccard similarity (0..1) from which captions of 5 words or more are near copies.
    """
    images, captions = _ImageMatcher(), _CaptionMatcher(caption_threshold)
    unreadable: list[str] = []
    evaluation_samples = 0
    for sample, fingerprint in _read_fingerprints(evaluation, unreadable):
        evaluation_samples += 1
        captions.add_evaluation(sample)
        if fingerprint is not None:
            images.add_evaluation(sample.key, fingerprint)
    captions.build_index()
    train_samples = 0
    stream = _read_fingerprints(train, unreadable) if evaluation_samples else iter(())
    while chunk := list(islice(stream, _CHUNK)):
        train_samples += len(chunk)
        for sample, _ in chunk:
            captions.compare(sample)
        images.compare(
            [(sample.key, fingerprint) for sample, fingerprint in chunk if fingerprint is not None],
            image_threshold,
        )
    return Leaks(images.leaks(), captions.leaks(), train_samples, evaluation_samples, tuple(unreadable))


class _ImageFingerprint(NamedTuple):
    digest: bytes  # of the encoded image
    spectrum: NDArray[np.int8]  # [16, 16]
    colors: NDArray[np.int8]  # [4, 4, 2]


def _read_fingerprints(
    samples: Iterable[Sample], unreadable: list[str]
) -> Iterator[tuple[Sample, _ImageFingerprint | None]]:
    """Each sample and its fingerprint; None for an image that cannot be read, whose key goes to `unreadable`."""
    for sample in samples:
        try:
            data = sample.image if isinstance(sample.image, bytes) else read_file(str(sample.image))
            yield sample, _ImageFingerprint(sha256(data).digest(), *draft_hashes(data))
        except ImageError:
            unreadable.append(sample.key)
            yield sample, None


@dataclass
class _ImageMatcher:
    """Evaluation images, and for each the training image most similar to it. Rows are evaluation images, 0..E-1."""

    keys: list[str] = field(default_factory=list[str])
    _spectra: list[NDArray[np.int8]] = field(default_factory=list[NDArray[np.int8]])
    _colors: list[NDArray[np.int8]] = field(default_factory=list[NDArray[np.int8]])
    _rows_by_digest: dict[bytes, list[int]] = field(default_factory=dict[bytes, "list[int]"])
    _exact: dict[int, str] = field(default_factory=dict[int, str])  # row -> key of the training image
    _best: dict[int, tuple[float, str]] = field(default_factory=dict[int, "tuple[float, str]"])
    _set: CopySet | None = None

    def add_evaluation(self, key: str, fingerprint: _ImageFingerprint) -> None:
        self._rows_by_digest.setdefault(fingerprint.digest, []).append(len(self.keys))
        self.keys.append(key)
        self._spectra.append(fingerprint.spectrum)
        self._colors.append(fingerprint.colors)

    def compare(self, train: Sequence[tuple[str, _ImageFingerprint]], threshold: float) -> None:
        """Notes exact copies and the most similar ones among some training images."""
        if not self.keys or not train:
            return
        for key, fingerprint in train:
            for row in self._rows_by_digest.get(fingerprint.digest, ()):
                self._exact.setdefault(row, key)
        if self._set is None:
            self._set = CopySet(np.stack(self._spectra), np.stack(self._colors))
        others = CopySet(
            np.stack([fingerprint.spectrum for _, fingerprint in train]),
            np.stack([fingerprint.colors for _, fingerprint in train]),
        )
        for copies in self._set.copies_in(others, threshold):
            pairs = zip(
                copies.first.tolist(), copies.second.tolist(), copies.similarity.tolist(), strict=True
            )
            for row, column, similarity in pairs:
                self._best[row] = max(self._best.get(row, (0.0, "")), (similarity, train[column][0]))

    def leaks(self) -> tuple[Leak, ...]:
        """Exact copies, and the most similar training image of the other rows that have a copy."""
        best = dict(self._best)
        for rows in () if self._set is None else self._set.same:  # of which the first row alone was compared
            if rows[0] in best:
                best |= dict.fromkeys(rows.tolist(), best[int(rows[0])])
        leaks = [Leak(key, self.keys[row], 1.0, True) for row, key in self._exact.items()]
        leaks += [
            Leak(key, self.keys[row], similarity, False)
            for row, (similarity, key) in best.items()
            if row not in self._exact
        ]
        return tuple(sorted(leaks, key=lambda leak: (-leak.similarity, leak.evaluation)))


class _CaptionMatcher:
    """Similarity join of captions that misses no pair: a prefix filter (Chaudhuri et al. 2006).

    The features of a caption are its words and its pairs of neighboring words, counted; similarity is Jaccard's:
    common features / all features. Captions that reach a threshold of 0.75 share most features, so it suffices to
    compare those that share one of their rarest:

        "a dog runs over grass" has 9 features; a caption as similar as 0.75 contains at least ceil(6.75) = 7 of them,
        so it contains at least one of any 9 - 7 + 1 = 3: the 3 rarest are looked up.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        # Rows are evaluation captions: key, caption, features.
        self._captions: list[tuple[str, str, frozenset[str]]] = []
        self._rows_by_text: dict[str, list[int]] = {}
        self._rows_by_feature: dict[str, list[int]] = {}
        self._frequency: Counter[str] = Counter()
        self._best: dict[int, tuple[float, str]] = {}  # row -> similarity, key of the training sample

    def add_evaluation(self, sample: Sample) -> None:
        for caption in dict.fromkeys(sample.captions):
            text = _normalize_caption(caption)
            features = _caption_features(text)
            if features:
                self._rows_by_text.setdefault(text, []).append(len(self._captions))
                self._captions.append((sample.key, caption, features))
                self._frequency.update(features)

    def build_index(self) -> None:
        """Indexes the rarest features, once all evaluation captions are counted."""
        for row, (_, _, features) in enumerate(self._captions):
            for feature in self._rarest(features):
                self._rows_by_feature.setdefault(feature, []).append(row)

    def compare(self, sample: Sample) -> None:
        """Notes for each evaluation caption the most similar training caption so far."""
        for caption in sample.captions:
            text = _normalize_caption(caption)
            exact_rows = self._rows_by_text.get(text, ())
            for row in exact_rows:
                self._best[row] = max(self._best.get(row, (0.0, "")), (1.0, sample.key))
            features = _caption_features(text)
            rows = {
                row for feature in self._rarest(features) for row in self._rows_by_feature.get(feature, ())
            }
            for row in rows.difference(exact_rows):
                other = self._captions[row][2]
                common = len(features & other)
                similarity = common / (len(features) + len(other) - common)
                similarity = min(similarity, 0.999)  # equal features in another order are not equal words
                if similarity >= self._threshold and similarity > self._best.get(row, (0.0, ""))[0]:
                    self._best[row] = (similarity, sample.key)

    def leaks(self) -> tuple[Leak, ...]:
        """Evaluation captions that reached the threshold, most similar first."""
        leaks: list[Leak] = []
        for row, (similarity, train_key) in self._best.items():
            key, caption, _ = self._captions[row]
            leaks.append(Leak(train_key, key, similarity, similarity == 1, caption))
        return tuple(sorted(leaks, key=lambda leak: (-leak.similarity, leak.evaluation, leak.text)))

    def _rarest(self, features: frozenset[str]) -> list[str]:
        """The rarest features, as many as needed for captions over the threshold to share at least one of them."""
        count = len(features) - math.ceil(self._threshold * len(features)) + 1
        return sorted(features, key=lambda feature: (self._frequency[feature], feature))[:count]


def _normalize_caption(caption: str) -> str:
    """Case-folded, without punctuation, words separated by single spaces."""
    folded = normalize("NFKC", caption).casefold()
    return " ".join("".join(c if category(c)[0] not in "PSC" else " " for c in folded).split())


def _caption_features(text: str) -> frozenset[str]:
    """Words and pairs of neighboring words, numbered where they repeat; empty for a short caption.

    "a dog and a dog" -> a, dog, and, a 2, dog 2, a dog, dog and, and a, a dog 2
    """
    words = text.split()
    if len(words) < _MIN_CAPTION_WORDS:
        return frozenset()
    counts: Counter[str] = Counter()
    features: list[str] = []
    for feature in (*words, *(f"{first} {second}" for first, second in pairwise(words))):
        counts[feature] += 1
        features.append(f"{feature} {counts[feature]}" if counts[feature] > 1 else feature)
    return frozenset(features)
