"""Augmentation of training images: random crop, horizontal flip and RandAugment, a function of (seed, epoch, key)."""

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
from sightloop.types import Box, Size

# Texts with these words name a side or quote writing, which a mirrored image would contradict.
GUARD_WORDS: tuple[str, ...] = tuple(
    "left right leftmost rightmost clockwise counterclockwise word words letter letters text written reads says".split()
)

_CROP_ATTEMPTS = 10
_MAX_MAGNITUDE = 10
_GRAY = (128, 128, 128)  # fills what a shear, shift or rotation uncovers
_MIN_VISIBLE = 0.25  # share of a box's area that a crop must keep for the box to be kept
# Above this ratio Pillow first shrinks by whole factors: several times faster, without a visible difference.
_REDUCING_GAP = 3.0
_SHIFT = 10 / 224  # of the side: 10 pixels at BLIP's training size


@dataclass(frozen=True, slots=True)
class Augment:
    """Augmentation options. The defaults are BLIP's (Li et al. 2022), apart from `guard_words`.

    Args:
        scale: Smallest and largest share of the image's area that a crop keeps, 0 to 1.
        ratio: Smallest and largest width / height of a crop, before it is resized to a square.
        flip: Probability of a horizontal flip, 0 to 1.
        randaugment: Number of operations and their magnitude, 0 to 10; None for none.
        guard_words: An image is never flipped if a text about it has one of these words, in upper or lower case.

    Raises:
        UsageError: A value out of range.
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
            self.randaugment[0] >= 0 and 0 <= self.randaugment[1] <= _MAX_MAGNITUDE
        ):
            raise UsageError(
                f"augment.randaugment={self.randaugment}: must be (operations, magnitude): 0 or more, 0 to 10."
            )


def augment(
    image: Image.Image | NDArray[np.uint8],
    size: int,
    options: Augment,
    *,
    seed: int,
    epoch: int,
    key: str,
    texts: Sequence[str] = (),
) -> NDArray[np.uint8]:
    """Random crop, resize (bicubic), horizontal flip, then RandAugment; the same on every worker and rank.

    Args:
        image: Upright image: PIL, or uint8 `[H, W, 3]`.
        size: Side of the result in pixels.
        options: Augmentation options.
        seed: Seed of the run.
        epoch: Epoch, from 0.
        key: Key of the sample.
        texts: Captions, questions and labels of the image, for `options.guard_words`.

    Returns:
        uint8 `[3, size, size]`, contiguous.
    """
    random = generator("augment", seed, epoch, key)
    shape = (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]
    view = _sample_view(shape, options, random, texts)
    crop = _crop_and_resize(image, size, view.box)
    if view.flipped:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if options.randaugment is not None:
        crop = randaugment(crop, *options.randaugment, random)
    return np.array(np.asarray(crop).transpose(2, 0, 1), order="C")  # [size, size, 3] -> [3, size, size]


@dataclass(frozen=True, slots=True)
class View:
    """Crop and flip of one image.

    Args:
        box: (left, top, right, bottom) in whole pixels of the image; right and bottom are exclusive.
        flipped: Whether the crop is mirrored left to right.
    """

    box: tuple[int, int, int, int]
    flipped: bool = False

    @property
    def size(self) -> Size:
        """(height, width) of the crop in pixels of the image."""
        return self.box[3] - self.box[1], self.box[2] - self.box[0]

    def map_box(self, box: Box) -> Box | None:
        """Box of the image in coordinates of the crop, in the same pixels: shifted, clipped, mirrored.

        None where less than a quarter of the box's area is inside the crop.
        """
        (height, width), (x, y) = self.size, self.box[:2]
        left, right = (min(max(edge - x, 0.0), float(width)) for edge in (box[0], box[2]))
        top, bottom = (min(max(edge - y, 0.0), float(height)) for edge in (box[1], box[3]))
        area = (box[2] - box[0]) * (box[3] - box[1])
        if not 0 < area * _MIN_VISIBLE <= (right - left) * (bottom - top):
            return None
        return (width - right, top, width - left, bottom) if self.flipped else (left, top, right, bottom)


def sample_view(
    size: Size, options: Augment, *, seed: int, epoch: int, key: str, texts: Sequence[str] = ()
) -> View:
    """Crop and flip that `augment` draws for an image of (height, width).

    RandAugment is not part of it; its rotation and shear move boxes further.
    """
    return _sample_view(size, options, generator("augment", seed, epoch, key), texts)


def _sample_view(size: Size, options: Augment, random: np.random.Generator, texts: Sequence[str]) -> View:
    box = sample_crop_box(size[1], size[0], options, random)
    # Drawn before the guard words are checked, so that they do not change the numbers drawn afterwards.
    flipped = random.random() < options.flip
    return View(box, flipped and not has_guard_word(texts, options.guard_words))


def sample_crop_box(
    width: int, height: int, options: Augment, random: np.random.Generator
) -> tuple[int, int, int, int]:
    """Box of a random crop (Szegedy et al. 2015): area uniform over `options.scale`, log aspect over `options.ratio`.

    If ten draws do not fit into the image, the largest centered crop with an allowed aspect.

    Returns:
        (left, top, right, bottom) in whole pixels, inside width x height.
    """
    low, high = math.log(options.ratio[0]), math.log(options.ratio[1])
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * random.uniform(*options.scale)
        aspect = math.exp(random.uniform(low, high))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(random.integers(width - crop_width + 1))
            top = int(random.integers(height - crop_height + 1))
            return (left, top, left + crop_width, top + crop_height)
    crop_width = max(1, min(width, round(height * options.ratio[1])))
    crop_height = max(1, min(height, round(width / options.ratio[0])))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return (left, top, left + crop_width, top + crop_height)


def has_guard_word(texts: Sequence[str], words: tuple[str, ...] = GUARD_WORDS) -> bool:
    """Whether any text has any of the words, as a whole word, in upper or lower case."""
    pattern = _word_pattern(words)
    return pattern is not None and any(pattern.search(text) for text in texts)


def randaugment(image: Image.Image, count: int, magnitude: int, random: np.random.Generator) -> Image.Image:
    """RandAugment (Cubuk et al. 2020, as in BLIP): operations drawn with replacement, each applied with chance 1/2.

    Args:
        image: RGB image.
        count: Number of operations drawn.
        magnitude: 0 to 10.
        random: Source of the draws.
    """
    names = list(OPERATIONS)
    for _ in range(count):
        name = names[random.integers(len(names))]
        sign = 1.0 if random.random() < 0.5 else -1.0
        if random.random() < 0.5:
            image = OPERATIONS[name](image, magnitude / _MAX_MAGNITUDE, sign)
    return image


def _crop_and_resize(
    image: Image.Image | NDArray[np.uint8], size: int, box: tuple[int, int, int, int]
) -> Image.Image:
    """RGB image of size x size from a box of an image or uint8 `[H, W, 3]`."""
    if isinstance(image, Image.Image):
        crop = image.crop(box).convert("RGB")
    else:  # cropped before the conversion: Image.fromarray copies the array
        left, top, right, bottom = box
        crop = Image.fromarray(np.ascontiguousarray(image[top:bottom, left:right]))
    return crop.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=_REDUCING_GAP)


@cache
def _word_pattern(words: tuple[str, ...]) -> re.Pattern[str] | None:
    if not words:
        return None
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b", re.IGNORECASE)


# An operation takes an RGB image, a strength from 0 to 1 and a direction, +1 or -1, which some of them ignore.
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
    return image.rotate(30 * strength * sign, Image.Resampling.BILINEAR, fillcolor=_GRAY)


def _factor(strength: float) -> float:
    """Enhancement factor of Pillow, 0.1 to 1.9; strength 0.5 gives 1, which changes nothing."""
    return 0.1 + 1.8 * strength


def _affine(image: Image.Image, matrix: tuple[float, float, float, float, float, float]) -> Image.Image:
    """Affine transform; `matrix` (a, b, c, d, e, f) maps output (x, y) to input (ax + by + c, dx + ey + f)."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=_GRAY
    )


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
