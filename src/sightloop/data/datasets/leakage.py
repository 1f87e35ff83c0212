"""Search for evaluation data in the training data: exact and near copies of images and captions, in one pass.

Images are compared in two stages:

1. Coarse, all pairs. The 63 lowest frequencies of a 64 x 64 gray thumbnail (discrete cosine transform), each weighted
   by its frequency so that all have a similar share, as a unit vector; similarity is the cosine. Either image is also
   cut to 27 crop windows, and the evaluation image is also mirrored.
2. Fine, the 4 best training images of each evaluation image. The crop window is fitted, then 255 frequencies are
   compared through it.

Copies that were re-encoded, resized, stretched, turned gray, brightened, framed by a thin border or cropped down to
80 % are found; a copy under a large logo is not.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice, pairwise
from typing import NamedTuple
from unicodedata import category, normalize

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sightloop.data.images import headers
from sightloop.data.images.decode import decode, read_file
from sightloop.errors import ImageError
from sightloop.types import Floats, Floats32, Sample

IMAGE_THRESHOLD = 0.95
CAPTION_THRESHOLD = 0.75

_SIDE = 64  # pixels, of a thumbnail
_MIN_CAPTION_WORDS = 5  # many unrelated images share captions such as "a dog"
_COARSE, _FINE = 8, 16  # frequencies in each direction
_COARSE_THRESHOLD = 0.7  # similarity from which a pair is a candidate for the fine stage
_MAX_CANDIDATES = 4  # of each evaluation image
_MIN_CONTRAST = 3.0  # standard deviation of gray (0..255); flatter images have nothing to compare
_CHUNK = 512  # training images compared at a time
_MAX_DRAFT_PIXELS = 1 << 26
# Crop windows as shares of the side: top, bottom, left, right. 1 + 3 sizes x 3 x 3 positions = 28.
_FULL_WINDOW = (0.0, 1.0, 0.0, 1.0)
_WINDOWS = [_FULL_WINDOW] + [
    (top, top + size, left, left + size)
    for size in (0.95, 0.9, 0.8)
    for top in (0.0, (1 - size) / 2, 1 - size)
    for left in (0.0, (1 - size) / 2, 1 - size)
]
_MIN_WINDOW = 0.6  # shortest side of a fitted window


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

    Each set is read once, the evaluation set first. The evaluation set stays in memory (24 kB an image), the training
    set does not. Images that cannot be read are listed in `Leaks.unreadable`.

    Args:
        train: training samples; may be a stream of any length.
        evaluation: evaluation samples.
        image_threshold: fine similarity (at most 1) from which images are near copies.
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
            [(sample.key, fingerprint) for sample, fingerprint in chunk if fingerprint is not None]
        )
    return Leaks(
        images.leaks(image_threshold), captions.leaks(), train_samples, evaluation_samples, tuple(unreadable)
    )


class _ImageFingerprint(NamedTuple):
    digest: bytes  # of the encoded image
    thumbnail: NDArray[np.uint8]  # gray [64, 64]


class _Candidate(NamedTuple):
    """A training image that resembles an evaluation image. window: as `_fit_window` takes it."""

    similarity: float
    window: int
    is_mirrored: bool
    key: str
    thumbnail: NDArray[np.uint8]  # [64, 64]


def _read_fingerprints(
    samples: Iterable[Sample], unreadable: list[str]
) -> Iterator[tuple[Sample, _ImageFingerprint | None]]:
    """Each sample and its fingerprint; None for an image that cannot be read, whose key goes to `unreadable`."""
    for sample in samples:
        try:
            data = sample.image if isinstance(sample.image, bytes) else read_file(str(sample.image))
            yield sample, _ImageFingerprint(blake2b(data, digest_size=16).digest(), _decode_thumbnail(data))
        except ImageError:
            unreadable.append(sample.key)
            yield sample, None


def _decode_thumbnail(data: bytes) -> NDArray[np.uint8]:
    """Gray thumbnail `[64, 64]` of an encoded image. A baseline JPEG is decoded at reduced size."""
    try:
        jpeg = headers.check_header(data, _MAX_DRAFT_PIXELS)
        if jpeg is not None and jpeg.is_standard and jpeg.width * jpeg.height <= _MAX_DRAFT_PIXELS:
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
                image.draft("L", (_SIDE, _SIDE))
                return _thumbnail(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError):
        pass  # `decode` reads it nevertheless, or raises ImageError
    return _thumbnail(decode(data))


def _thumbnail(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))


@dataclass
class _ImageMatcher:
    """Evaluation images, and for each the training images most similar to it. Rows are evaluation images, 0..E-1."""

    keys: list[str] = field(default_factory=list[str])
    thumbnails: list[NDArray[np.uint8]] = field(default_factory=list[NDArray[np.uint8]])
    rows_by_digest: dict[bytes, list[int]] = field(default_factory=dict[bytes, "list[int]"])
    exact: dict[int, str] = field(default_factory=dict[int, str])  # row -> key of the training image
    candidates: dict[int, list[_Candidate]] = field(default_factory=dict[int, "list[_Candidate]"])
    _descriptors: list[Floats32] = field(default_factory=list[Floats32])  # a window each: [2E, 63]

    def add_evaluation(self, key: str, fingerprint: _ImageFingerprint) -> None:
        self.rows_by_digest.setdefault(fingerprint.digest, []).append(len(self.keys))
        self.keys.append(key)
        self.thumbnails.append(fingerprint.thumbnail)

    def compare(self, train: Sequence[tuple[str, _ImageFingerprint]]) -> None:
        """Notes exact copies and candidates among T training images."""
        if not self.keys or not train:
            return
        for key, fingerprint in train:
            for row in self.rows_by_digest.get(fingerprint.digest, ()):
                self.exact.setdefault(row, key)
        if not self._descriptors:  # rows 0..E-1 as they are, E..2E-1 mirrored
            mirrored = (thumbnail[:, ::-1] for thumbnail in self.thumbnails)
            both = np.stack([*self.thumbnails, *mirrored])  # [2E, 64, 64]
            self._descriptors = [_coarse_vectors(both, window) for window in _WINDOWS]
        thumbnails = np.stack([fingerprint.thumbnail for _, fingerprint in train])  # [T, 64, 64]
        similarities, windows = _coarse_similarities(self._descriptors, thumbnails)  # [2E, T] each
        for line, column in np.argwhere(similarities > _COARSE_THRESHOLD):
            is_mirrored, row = divmod(int(line), len(self.keys))
            key, fingerprint = train[column]
            similarity, window = float(similarities[line, column]), int(windows[line, column])
            candidates = self.candidates.setdefault(row, [])
            candidates.append(_Candidate(similarity, window, bool(is_mirrored), key, fingerprint.thumbnail))
            if len(candidates) > _MAX_CANDIDATES:
                weakest = min(range(len(candidates)), key=lambda i: candidates[i].similarity)
                del candidates[weakest]

    def leaks(self, threshold: float) -> tuple[Leak, ...]:
        """Exact copies, and the best fitted candidate of the other rows where it reaches the threshold."""
        leaks = [Leak(key, self.keys[row], 1.0, True) for row, key in self.exact.items()]
        for row, candidates in self.candidates.items():
            if row in self.exact:
                continue
            image = self.thumbnails[row]
            similarity, key = max(
                (_fit_window(image[:, ::-1] if c.is_mirrored else image, c.thumbnail, c.window), c.key)
                for c in candidates
            )
            if similarity >= threshold:
                leaks.append(Leak(key, self.keys[row], similarity, False))
        return tuple(sorted(leaks, key=lambda leak: (-leak.similarity, leak.evaluation)))


def _coarse_similarities(
    descriptors: Sequence[Floats32], train: NDArray[np.uint8]
) -> tuple[Floats32, NDArray[np.int8]]:
    """Best cosine over all windows, and the window that gives it.

    Args:
        descriptors: of the evaluation images, `[A, 63]` for each window of `_WINDOWS`.
        train: thumbnails of the training images `[B, 64, 64]`.

    Returns:
        Similarities `[A, B]` and windows `[A, B]`: w + 1 where window w crops the evaluation image, -(w + 1) where it
        crops the training image, 1 where neither is cropped.
    """
    full = _coarse_vectors(train, _FULL_WINDOW).T  # [63, B]
    best = descriptors[0] @ full  # [A, B]
    windows = np.ones(best.shape, np.int8)
    for number, window in enumerate(_WINDOWS[1:], 2):
        evaluation_cropped = descriptors[number - 1] @ full
        train_cropped = descriptors[0] @ _coarse_vectors(train, window).T
        for sign, similarities in ((1, evaluation_cropped), (-1, train_cropped)):
            is_better = similarities > best
            best[is_better], windows[is_better] = similarities[is_better], sign * number
    return best, windows


def _coarse_vectors(thumbnails: NDArray[np.uint8], window: tuple[float, float, float, float]) -> Floats32:
    """Coarse unit vectors `[B, 63]` of thumbnails `[B, 64, 64]` cut to a window; zeros where an image is flat."""
    pixels = thumbnails.astype(np.float32)
    vectors = _frequencies(pixels, np.array([window]), _COARSE)
    vectors[pixels.std((1, 2)) < _MIN_CONTRAST] = 0
    return vectors


def _frequencies(pixels: Floats32, windows: Floats, count: int) -> Floats32:
    """Weighted frequencies of thumbnails cut to windows, without the constant one, as unit vectors.

    Args:
        pixels: `[n, 64, 64]`, or `[1, 64, 64]` for one thumbnail through n windows.
        windows: `[n, 4]`, or `[1, 4]` for n thumbnails through one window; top, bottom, left, right.
        count: frequencies in each direction.

    Returns:
        `[n, count^2 - 1]`
    """
    rows, columns = _window_transform(windows[:, :2], count), _window_transform(windows[:, 2:], count)
    spectrum = rows @ pixels @ columns.transpose(0, 2, 1)  # [n, count, count]
    # Amplitudes of photographs fall as 1 / frequency; the weight makes up for that.
    order = np.arange(count, dtype=np.float32)
    spectrum *= np.hypot(order[:, None], order)
    vectors = spectrum.reshape(len(spectrum), -1)[:, 1:]  # the first is the mean brightness
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)


def _window_transform(spans: Floats, count: int) -> Floats32:
    """Matrices `[n, count, 64]` that cut 64 samples to a span, resample them to 64 and transform (DCT-II).

    Args:
        spans: `[n, 2]`, first and last end as shares of the side. The span (0.25, 0.75) is 32 samples wide; its output
            sample 0 is at 0.25 * 64 + 0.25 - 0.5 = 15.75, so it is 0.25 of sample 15 and 0.75 of sample 16.
        count: number of frequencies.
    """
    centers = (np.arange(_SIDE) + 0.5) / _SIDE
    positions = (spans[:, :1] + (spans[:, 1:] - spans[:, :1]) * centers) * _SIDE - 0.5  # [n, 64]
    below = np.clip(np.floor(positions).astype(int), 0, _SIDE - 2)
    weight = np.clip(positions - below, 0, 1).astype(np.float32)  # of the sample above
    resample = np.zeros((len(spans), _SIDE, _SIDE), np.float32)  # [n, output, input]
    span, output = np.ogrid[: len(spans), :_SIDE]
    resample[span, output, below] = 1 - weight
    resample[span, output, below + 1] = weight
    cosines = np.cos(np.pi * np.arange(count)[:, None] * centers).astype(np.float32)  # [count, 64]
    cosines[0] *= math.sqrt(0.5)
    return cosines @ resample


# Steps of the search for a window: each edge out or in, then both rows or both columns together (a shift).
_MOVES = np.array([*np.eye(4), *-np.eye(4), (1, 1, 0, 0), (-1, -1, 0, 0), (0, 0, 1, 1), (0, 0, -1, -1)])


def _fit_window(evaluation: NDArray[np.uint8], train: NDArray[np.uint8], window: int) -> float:
    """Fine similarity of two thumbnails uint8 `[64, 64]` through the best crop window near a coarse one.

    Args:
        evaluation: the evaluation image, mirrored where the candidate is.
        train: the training image.
        window: w + 1 where window w of `_WINDOWS` crops the evaluation image, -(w + 1) where it crops the other.
    """
    cropped, full = (evaluation, train) if window > 0 else (train, evaluation)
    pixels, full_pixels = cropped.astype(np.float32)[None], full.astype(np.float32)[None]  # [1, 64, 64]
    target = _frequencies(full_pixels, np.array([_FULL_WINDOW]), _COARSE)[0]  # [63]
    fitted = np.array([_WINDOWS[abs(window) - 1]])  # [1, 4]
    # Hill climbing: the best of 12 neighbors; where none is better, half the step.
    best, step = float((_frequencies(pixels, fitted, _COARSE) @ target)[0]), 0.04
    while step > 0.004:
        neighbors = fitted + step * _MOVES  # [12, 4]
        sides = neighbors[:, 1::2] - neighbors[:, ::2]
        is_valid = (neighbors.min(1) >= 0) & (neighbors.max(1) <= 1) & (sides.min(1) >= _MIN_WINDOW)
        neighbors = neighbors[is_valid]
        similarities = _frequencies(pixels, neighbors, _COARSE) @ target if len(neighbors) else np.zeros(1)
        if similarities.max() > best + 1e-5:
            best, fitted = float(similarities.max()), neighbors[[similarities.argmax()]]
        else:
            step /= 2
    fine, full_fine = (
        _frequencies(image, crop, _FINE)[0]  # [255]
        for image, crop in ((pixels, fitted), (full_pixels, np.array([_FULL_WINDOW])))
    )
    return float(fine @ full_fine)


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
