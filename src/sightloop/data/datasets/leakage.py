"""Is the evaluation in the training data? Exact and near copies of images and captions, found in one pass.

Images are compared in two steps. Coarse: the 63 lowest frequencies of a 64 x 64 gray thumbnail, each weighted by its
frequency (so that all count alike), as a unit vector; a copy that was cropped is met by looking through 28 windows at
either side, a mirrored one by mirroring. Fine: for the few best, the window is fitted and 255 frequencies are compared
through it. Re-encoding, resizing, stretching, gray, brightness, thin borders and crops to 80 % are seen through; a
large logo is not.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice, pairwise
from typing import TypeAlias
from unicodedata import category, normalize

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sightloop.data.images import headers
from sightloop.data.images.decode import decode, read_file
from sightloop.errors import ImageError
from sightloop.types import Sample

SIDE = 64
PICTURE_THRESHOLD = 0.95
CAPTION_THRESHOLD = 0.75
FEWEST_WORDS = 5  # "a dog" says nothing about where it comes from

_COARSE, _FINE = 8, 16  # frequencies each way
_CANDIDATE = 0.7  # coarse similarity from which a pair is looked at closely
_TRIES = 4  # candidates for each evaluation image
_FLAT = 3.0  # standard deviation of gray below which an image has nothing to compare
_CHUNK = 512
_MOST_PIXELS = 1 << 26
_WHOLE = (0.0, 1.0, 0.0, 1.0)
_WINDOWS = [_WHOLE] + [
    (top, top + size, left, left + size)
    for size in (0.95, 0.9, 0.8)
    for top in (0.0, (1 - size) / 2, 1 - size)
    for left in (0.0, (1 - size) / 2, 1 - size)
]

_Gray: TypeAlias = "NDArray[np.uint8]"
_Floats: TypeAlias = "NDArray[np.float32]"
# Coarse similarity, window, mirrored, key and thumbnail of a training image.
_Try: TypeAlias = "tuple[float, int, bool, str, _Gray]"


@dataclass(frozen=True, slots=True)
class Leak:
    """An evaluation image, or one of its captions, that is in the training data: the most similar one.

    train, evaluation: keys of the samples. similarity: at most 1. exact: the same bytes, or the same words. text: the
    evaluation's caption, empty for images.
    """

    train: str
    evaluation: str
    similarity: float
    exact: bool
    text: str = ""


@dataclass(frozen=True, slots=True)
class Leaks:
    """What was found among `train_samples` and `evaluation_samples`. unreadable: keys of images that were no help."""

    pictures: tuple[Leak, ...]
    captions: tuple[Leak, ...]
    train_samples: int
    evaluation_samples: int
    unreadable: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.pictures or self.captions)

    def summary(self) -> str:
        """One paragraph: how much, an example of each, what it means. Empty where nothing was found."""
        said = [
            f"{_count(found, what)} in the training data ({exact:,} the same, {len(found) - exact:,} nearly), "
            f"such as {example.evaluation} = {example.train}"
            + (f': "{example.text}"' if example.text else "")
            for found, what in ((self.pictures, "image"), (self.captions, "caption"))
            if found
            for exact in [sum(leak.exact for leak in found)]
            for example in found[:1]
        ]
        if not said:
            return ""
        meaning = (
            "What is measured on these images is memory, not sight: take them out of one of the two."
            if self.pictures
            else "Equal captions of different images happen; many of them mean that texts were shared."
        )
        return f"{'; '.join(said)}. {meaning}"


def find_leaks(
    train: Iterable[Sample],
    evaluation: Iterable[Sample],
    *,
    picture_threshold: float = PICTURE_THRESHOLD,
    caption_threshold: float = CAPTION_THRESHOLD,
) -> Leaks:
    """The evaluation's images and captions that are in the training data, most similar first.

    Both are read once, the evaluation first: it is held in memory (24 kB an image), the training data is not. Captions
    of fewer than 5 words are not compared. Images that cannot be read are named, not raised.
    """
    pictures, captions = _Pictures(), _Captions(caption_threshold)
    unreadable: list[str] = []
    wanted = 0
    for sample, picture in _read(evaluation, unreadable):
        wanted += 1
        captions.want(sample)
        if picture is not None:
            pictures.want(sample.key, picture)
    captions.ready()
    seen = 0
    stream = _read(train, unreadable) if wanted else iter(())
    while chunk := list(islice(stream, _CHUNK)):
        seen += len(chunk)
        for sample, _ in chunk:
            captions.see(sample)
        pictures.see([(sample.key, picture) for sample, picture in chunk if picture is not None])
    return Leaks(pictures.leaks(picture_threshold), captions.leaks(), seen, wanted, tuple(unreadable))


def fingerprint_picture(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What near copies are told by: a gray thumbnail, uint8 `[64, 64]`, of an image uint8 `[H, W, 3]`."""
    return _thumbnail(Image.fromarray(rgb))


def same_picture(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """How alike two fingerprints are, at most 1; from 0.95 on they are near copies. Crops and mirrors are tried."""
    tries = _scores(np.stack([one, one[:, ::-1]]), other[None])
    best = [_fit(one[:, :: 1 - 2 * row], other, int(tries[1][row, 0])) for row in range(2)]
    return max(best)


def normal_caption(caption: str) -> str:
    """A caption as it is compared: case folded, without punctuation, single spaces between words."""
    folded = normalize("NFKC", caption).casefold()
    return " ".join("".join(c if category(c)[0] not in "PSC" else " " for c in folded).split())


@dataclass(frozen=True, slots=True)
class _Picture:
    digest: bytes
    gray: _Gray


def _read(samples: Iterable[Sample], unreadable: list[str]) -> Iterator[tuple[Sample, _Picture | None]]:
    for sample in samples:
        try:
            data = sample.image if isinstance(sample.image, bytes) else read_file(str(sample.image))
            yield sample, _Picture(blake2b(data, digest_size=16).digest(), _gray(data))
        except ImageError:
            unreadable.append(sample.key)
            yield sample, None


def _gray(data: bytes) -> _Gray:
    """The thumbnail of an encoded image; of an ordinary JPEG only as many pixels are decoded as it needs."""
    try:
        jpeg = headers.check_header(data, _MOST_PIXELS)
        if jpeg is not None and jpeg.is_standard and jpeg.width * jpeg.height <= _MOST_PIXELS:
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
                image.draft("L", (SIDE, SIDE))
                return _thumbnail(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError):
        pass  # the one decoder says what is wrong, or reads it nevertheless
    return _thumbnail(decode(data))


def _thumbnail(image: Image.Image) -> _Gray:
    return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR))


@dataclass
class _Pictures:
    """Evaluation images, and the training images that look most like each."""

    keys: list[str] = field(default_factory=list[str])
    grays: list[_Gray] = field(default_factory=list[_Gray])
    by_digest: dict[bytes, list[int]] = field(default_factory=dict[bytes, "list[int]"])
    exact: dict[int, str] = field(default_factory=dict[int, str])
    near: dict[int, list[_Try]] = field(default_factory=dict[int, "list[_Try]"])
    _views: list[_Floats] = field(default_factory=list["_Floats"])

    def want(self, key: str, picture: _Picture) -> None:
        self.by_digest.setdefault(picture.digest, []).append(len(self.keys))
        self.keys.append(key)
        self.grays.append(picture.gray)

    def see(self, chunk: Sequence[tuple[str, _Picture]]) -> None:
        if not self.keys or not chunk:
            return
        for key, picture in chunk:
            for row in self.by_digest.get(picture.digest, ()):
                self.exact.setdefault(row, key)
        if not self._views:
            both = np.stack([*self.grays, *(gray[:, ::-1] for gray in self.grays)])
            self._views = [_descriptors(both, window) for window in _WINDOWS]
        theirs = np.stack([picture.gray for _, picture in chunk])
        scores, windows = _scores(self._views, theirs)
        for row, column in np.argwhere(scores > _CANDIDATE):
            mirrored, index = divmod(int(row), len(self.keys))
            key, picture = chunk[column]
            tries = self.near.setdefault(index, [])
            tries.append(
                (float(scores[row, column]), int(windows[row, column]), bool(mirrored), key, picture.gray)
            )
            if len(tries) > _TRIES:
                tries.remove(min(tries, key=lambda one: one[0]))

    def leaks(self, threshold: float) -> tuple[Leak, ...]:
        found = [Leak(key, self.keys[row], 1.0, True) for row, key in self.exact.items()]
        for row, tries in self.near.items():
            if row in self.exact:
                continue
            gray = self.grays[row]
            fitted = [
                (_fit(gray[:, ::-1] if mirrored else gray, other, window), key)
                for _, window, mirrored, key, other in tries
            ]
            similarity, key = max(fitted)
            if similarity >= threshold:
                found.append(Leak(key, self.keys[row], similarity, False))
        return tuple(sorted(found, key=lambda leak: (-leak.similarity, leak.evaluation)))


def _scores(ours: Sequence[_Floats] | _Gray, theirs: _Gray) -> tuple[_Floats, NDArray[np.int8]]:
    """Coarse similarities `[A, B]` and through which window: w + 1 at our side, -(w + 1) at theirs.

    ours: thumbnails `[A, 64, 64]`, or their descriptors for each window; theirs: thumbnails `[B, 64, 64]`.
    """
    views = [_descriptors(ours, window) for window in _WINDOWS] if isinstance(ours, np.ndarray) else ours
    whole = _descriptors(theirs, _WHOLE).T
    best = views[0] @ whole
    through = np.ones(best.shape, np.int8)
    for number, window in enumerate(_WINDOWS[1:], 2):
        for sign, scores in ((1, views[number - 1] @ whole), (-1, views[0] @ _descriptors(theirs, window).T)):
            better = scores > best
            best[better], through[better] = scores[better], sign * number
    return best, through


def _descriptors(grays: _Gray, window: tuple[float, float, float, float]) -> _Floats:
    """Unit vectors `[B, 63]` of thumbnails `[B, 64, 64]` seen through a window; zeros where an image is flat."""
    x = grays.astype(np.float32)
    found = _frequencies(x, np.array([window]), _COARSE)
    found[x.std((1, 2)) < _FLAT] = 0
    return found


def _frequencies(x: _Floats, windows: NDArray[np.float64], count: int) -> _Floats:
    """Weighted frequencies as unit vectors `[n, count^2 - 1]`: of thumbnails `[n | 1, 64, 64]` through `[n | 1, 4]`."""
    rows, columns = _transform(windows[:, :2], count), _transform(windows[:, 2:], count)
    found = rows @ x @ columns.transpose(0, 2, 1)
    order = np.arange(count, dtype=np.float32)
    found *= np.hypot(order[:, None], order)
    flat = found.reshape(len(found), -1)[:, 1:]
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


def _transform(spans: NDArray[np.float64], count: int) -> _Floats:
    """Cosine transforms `[n, count, 64]` of what lies between the ends `[n, 2]` (shares of the side)."""
    middles = (np.arange(SIDE) + 0.5) / SIDE
    place = (spans[:, :1] + (spans[:, 1:] - spans[:, :1]) * middles) * SIDE - 0.5  # [n, 64]
    below = np.clip(np.floor(place).astype(int), 0, SIDE - 2)
    share = np.clip(place - below, 0, 1).astype(np.float32)
    resample = np.zeros((len(spans), SIDE, SIDE), np.float32)
    which, sample = np.ogrid[: len(spans), :SIDE]
    resample[which, sample, below] = 1 - share
    resample[which, sample, below + 1] = share
    waves = np.cos(np.pi * np.arange(count)[:, None] * middles).astype(np.float32)
    waves[0] *= math.sqrt(0.5)
    return waves @ resample


# Each side of the window moves, and the window as a whole.
_MOVES = np.array([*np.eye(4), *-np.eye(4), (1, 1, 0, 0), (-1, -1, 0, 0), (0, 0, 1, 1), (0, 0, -1, -1)])


def _fit(ours: _Gray, theirs: _Gray, through: int) -> float:
    """The fine similarity of two thumbnails, through the window that fits best in the neighbourhood of `through`."""
    seen, whole = (ours, theirs) if through > 0 else (theirs, ours)
    x, y = seen.astype(np.float32)[None], whole.astype(np.float32)[None]
    target = _frequencies(y, np.array([_WHOLE]), _COARSE)[0]
    window = np.array([_WINDOWS[abs(through) - 1]])
    best, move = float((_frequencies(x, window, _COARSE) @ target)[0]), 0.04
    while move > 0.004:
        tried = window + move * _MOVES
        sides = tried[:, 1::2] - tried[:, ::2]
        tried = tried[(tried.min(1) >= 0) & (tried.max(1) <= 1) & (sides.min(1) >= 0.6)]
        scores = _frequencies(x, tried, _COARSE) @ target if len(tried) else np.zeros(1)
        if scores.max() > best + 1e-5:
            best, window = float(scores.max()), tried[[scores.argmax()]]
        else:
            move /= 2
    return float(_frequencies(x, window, _FINE)[0] @ _frequencies(y, np.array([_WHOLE]), _FINE)[0])


class _Captions:
    """Evaluation captions by their rarest features: a join that misses no pair (prefix filter, Chaudhuri et al. 2006).

    A caption's features are its words and pairs of neighbouring words, counted; similarity is Jaccard's.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._wanted: list[tuple[str, str, frozenset[str]]] = []  # key, caption, features
        self._by_text: dict[str, list[int]] = {}
        self._by_feature: dict[str, list[int]] = {}
        self._frequency: Counter[str] = Counter()
        self._best: dict[int, tuple[float, str]] = {}

    def want(self, sample: Sample) -> None:
        for caption in dict.fromkeys(sample.captions):
            text = normal_caption(caption)
            features = _features(text)
            if features:
                self._by_text.setdefault(text, []).append(len(self._wanted))
                self._wanted.append((sample.key, caption, features))
                self._frequency.update(features)

    def ready(self) -> None:
        for row, (_, _, features) in enumerate(self._wanted):
            for feature in self._rarest(features):
                self._by_feature.setdefault(feature, []).append(row)

    def see(self, sample: Sample) -> None:
        for caption in sample.captions:
            text = normal_caption(caption)
            for row in self._by_text.get(text, ()):
                self._best[row] = max(self._best.get(row, (0.0, "")), (1.0, sample.key))
            features = _features(text)
            rows = {row for feature in self._rarest(features) for row in self._by_feature.get(feature, ())}
            for row in rows.difference(self._by_text.get(text, ())):
                other = self._wanted[row][2]
                common = len(features & other)
                similarity = common / (len(features) + len(other) - common)
                # Equal features in another order are not the same words.
                similarity = min(similarity, 0.999)
                if similarity >= self._threshold and similarity > self._best.get(row, (0.0, ""))[0]:
                    self._best[row] = (similarity, sample.key)

    def leaks(self) -> tuple[Leak, ...]:
        found = [
            Leak(train, self._wanted[row][0], similarity, similarity == 1, self._wanted[row][1])
            for row, (similarity, train) in self._best.items()
        ]
        return tuple(sorted(found, key=lambda leak: (-leak.similarity, leak.evaluation, leak.text)))

    def _rarest(self, features: frozenset[str]) -> list[str]:
        """So many of the rarest features that two captions over the threshold share at least one of theirs."""
        count = len(features) - math.ceil(self._threshold * len(features)) + 1
        return sorted(features, key=lambda feature: (self._frequency[feature], feature))[:count]


def _features(text: str) -> frozenset[str]:
    words = text.split()
    if len(words) < FEWEST_WORDS:
        return frozenset()
    counts: Counter[str] = Counter()
    found: list[str] = []
    for feature in (*words, *(f"{a} {b}" for a, b in pairwise(words))):
        counts[feature] += 1
        found.append(f"{feature} {counts[feature]}" if counts[feature] > 1 else feature)
    return frozenset(found)


def _count(found: Sequence[Leak], what: str) -> str:
    one = len(found) == 1
    return f"{len(found):,} {what}{'' if one else 's'} of the evaluation {'is' if one else 'are'}"
