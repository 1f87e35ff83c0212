"""Training images: a random crop, a flip, and RandAugment, as functions of (seed, epoch, key) and nothing else."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from sightloop.data.rng import generator
from sightloop.errors import UsageError
from sightloop.types import Box

# Texts with these words are about a side or about writing: a mirrored image makes them wrong.
GUARD_WORDS: tuple[str, ...] = tuple(
    "left right leftmost rightmost clockwise counterclockwise word words letter letters text written reads says".split()
)

_TRIES = 10
_STRONGEST = 10
_GREY = (128, 128, 128)
_LEAST_SEEN = 0.25  # of a thing, that it is still worth naming
_REDUCING_GAP = (
    3.0  # above it Pillow shrinks by whole factors first: several times faster, and the eye sees no change
)


@dataclass(frozen=True, slots=True)
class Augment:
    """What is done to a training image.

    scale: the smallest and largest part of the image's area that a crop keeps, 0 to 1. ratio: a crop's smallest and
    largest width / height, before it is made square. flip: the chance to be mirrored, 0 to 1. randaugment: how many
    operations are drawn and their magnitude, 0 to 10; None for none. guard_words: where a text about the image has
    one of these words, in any case, it is never mirrored.
    The defaults are BLIP's (Li et al. 2022), apart from the guard. Raises `UsageError` for values out of range.
    """

    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    randaugment: tuple[int, int] | None = (2, 5)
    guard_words: tuple[str, ...] = GUARD_WORDS

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UsageError(f"augment.scale={self.scale}: must be (low, high) with 0 < low <= high <= 1.")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise UsageError(f"augment.ratio={self.ratio}: must be (low, high) with 0 < low <= high.")
        if not 0 <= self.flip <= 1:
            raise UsageError(f"augment.flip={self.flip}: must be from 0 to 1.")
        if self.randaugment is not None and not (
            self.randaugment[0] >= 0 and 0 <= self.randaugment[1] <= _STRONGEST
        ):
            raise UsageError(
                f"augment.randaugment={self.randaugment}: must be (operations, magnitude): 0 or more, 0 to 10."
            )


def augment(
    picture: Image.Image | NDArray[np.uint8],
    size: int,
    options: Augment,
    *,
    seed: int,
    epoch: int,
    key: str,
    texts: Sequence[str] = (),
) -> NDArray[np.uint8]:
    """uint8 `[3, size, size]`: a random crop, resized (bicubic), perhaps mirrored, then RandAugment.

    image: upright, a PIL image or uint8 `[H, W, 3]`. texts: what is said and asked about it, for the guard.
    A function of its arguments: the same on every worker and rank, in every order.
    """
    random = generator("augment", seed, epoch, key)
    shape = (picture.height, picture.width) if isinstance(picture, Image.Image) else picture.shape[:2]
    view = _view(shape, options, random, texts)
    image = _cropped(picture, size, view.box)
    if view.flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if options.randaugment is not None:
        image = randaugment(image, *options.randaugment, random)
    return np.array(np.asarray(image).transpose(2, 0, 1), order="C")


@dataclass(frozen=True, slots=True)
class View:
    """What is shown of an image: a box of it, (left, top, right, bottom) in its whole pixels, perhaps mirrored."""

    box: tuple[int, int, int, int]
    flipped: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of what is shown, in the image's pixels."""
        return self.box[3] - self.box[1], self.box[2] - self.box[0]

    def map_box(self, box: Box) -> Box | None:
        """Where a box of the image is in what is shown, in the same pixels: moved, cut off at the edges, mirrored.
        None where less than a quarter of it is left."""
        (height, width), (x, y) = self.size, self.box[:2]
        left, right = (min(max(edge - x, 0.0), float(width)) for edge in (box[0], box[2]))
        top, bottom = (min(max(edge - y, 0.0), float(height)) for edge in (box[1], box[3]))
        area = (box[2] - box[0]) * (box[3] - box[1])
        if not 0 < area * _LEAST_SEEN <= (right - left) * (bottom - top):
            return None
        return (width - right, top, width - left, bottom) if self.flipped else (left, top, right, bottom)


def view_of(
    size: tuple[int, int], options: Augment, *, seed: int, epoch: int, key: str, texts: Sequence[str] = ()
) -> View:
    """What `augment` shows of an image of (height, width), before RandAugment, which may turn and shear it."""
    return _view(size, options, generator("augment", seed, epoch, key), texts)


def _view(size: tuple[int, int], options: Augment, random: np.random.Generator, texts: Sequence[str]) -> View:
    box = crop_box(size[1], size[0], options, random)
    # Drawn in any case: whether the guard holds must not change what comes after.
    mirrored = random.random() < options.flip
    return View(box, mirrored and not guarded(texts, options.guard_words))


def crop_box(
    width: int, height: int, options: Augment, random: np.random.Generator
) -> tuple[int, int, int, int]:
    """The (left, top, right, bottom) of a random crop, in whole pixels inside an image of this size.

    Its part of the area is uniform over `options.scale` and the logarithm of its aspect over `options.ratio` (Szegedy
    et al. 2015). Where ten draws do not fit the image: the largest crop in its middle with an allowed aspect.
    """
    low, high = math.log(options.ratio[0]), math.log(options.ratio[1])
    for _ in range(_TRIES):
        area = width * height * random.uniform(*options.scale)
        aspect = math.exp(random.uniform(low, high))
        wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            left = int(random.integers(width - wide + 1))
            top = int(random.integers(height - tall + 1))
            return (left, top, left + wide, top + tall)
    wide = max(1, min(width, round(height * options.ratio[1])))
    tall = max(1, min(height, round(width / options.ratio[0])))
    left, top = (width - wide) // 2, (height - tall) // 2
    return (left, top, left + wide, top + tall)


def guarded(texts: Sequence[str], words: tuple[str, ...] = GUARD_WORDS) -> bool:
    """Whether any text has any of the words, as a whole word, in upper or lower case."""
    pattern = _pattern(words)
    return pattern is not None and any(pattern.search(text) for text in texts)


def randaugment(image: Image.Image, count: int, magnitude: int, random: np.random.Generator) -> Image.Image:
    """`count` operations, drawn with replacement, each done with a chance of 1/2 (Cubuk et al. 2020, as in BLIP).

    image: RGB. magnitude: 0 to 10. What a shear, shift or turn uncovers becomes grey.
    """
    names = list(OPERATIONS)
    for _ in range(count):
        name = names[random.integers(len(names))]
        sign = 1.0 if random.random() < 0.5 else -1.0
        if random.random() < 0.5:
            image = OPERATIONS[name](image, magnitude / _STRONGEST, sign)
    return image


def _cropped(
    picture: Image.Image | NDArray[np.uint8], size: int, box: tuple[int, int, int, int]
) -> Image.Image:
    """RGB, size x size. An array is cropped before it becomes an image: Pillow copies what it is given."""
    if isinstance(picture, Image.Image):
        image = picture.crop(box).convert("RGB")
    else:
        left, top, right, bottom = box
        image = Image.fromarray(np.ascontiguousarray(picture[top:bottom, left:right]))
    return image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=_REDUCING_GAP)


@cache
def _pattern(words: tuple[str, ...]) -> re.Pattern[str] | None:
    if not words:
        return None
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b", re.IGNORECASE)


# The operations: an image, a strength from 0 to 1, and a sign, +1 or -1, for those that have a direction.
_Operation: TypeAlias = Callable[[Image.Image, float, float], Image.Image]


def _identity(image: Image.Image, strength: float, sign: float) -> Image.Image:
    return image


def _autocontrast(image: Image.Image, strength: float, sign: float) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, strength: float, sign: float) -> Image.Image:
    return ImageOps.equalize(image)


def _brightness(image: Image.Image, strength: float, sign: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(_factor(strength))


def _sharpness(image: Image.Image, strength: float, sign: float) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(_factor(strength))


def _shear_x(image: Image.Image, strength: float, sign: float) -> Image.Image:
    return _affine(image, (1, -0.3 * strength * sign, 0, 0, 1, 0))


def _shear_y(image: Image.Image, strength: float, sign: float) -> Image.Image:
    return _affine(image, (1, 0, 0, -0.3 * strength * sign, 1, 0))


def _translate_x(image: Image.Image, strength: float, sign: float) -> Image.Image:
    return _affine(image, (1, 0, -_SHIFT * image.width * strength * sign, 0, 1, 0))


def _translate_y(image: Image.Image, strength: float, sign: float) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, -_SHIFT * image.height * strength * sign))


def _rotate(image: Image.Image, strength: float, sign: float) -> Image.Image:
    return image.rotate(30 * strength * sign, Image.Resampling.BILINEAR, fillcolor=_GREY)


def _factor(strength: float) -> float:
    """0.1 to 1.9; 1, which changes nothing, in the middle."""
    return 0.1 + 1.8 * strength


def _affine(image: Image.Image, matrix: tuple[float, float, float, float, float, float]) -> Image.Image:
    """matrix: from a place in the result to the place in the image that it shows."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=_GREY
    )


_SHIFT = 10 / 224  # of the side: 10 pixels at BLIP's training size
OPERATIONS: dict[str, _Operation] = {
    "identity": _identity,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "rotate": _rotate,
}
