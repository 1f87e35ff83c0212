"""Resizing exactly as Pillow does, or nearly so and several times faster.

Pillow resizes in two passes, one per axis, each a weighted sum with 22-bit weights rounded to uint8. Where only a small
window of a huge result is wanted, the same sums are done for that window alone; where speed matters, they are done in
float32 by torch. Imports torch only in `fast`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sightread.types import Interpolation

if TYPE_CHECKING:
    import torch

FILTERS: Final[dict[Interpolation, Image.Resampling]] = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_SUPPORT: Final[dict[Interpolation, float]] = {
    "box": 0.5,
    "bilinear": 1.0,
    "hamming": 1.0,
    "bicubic": 2.0,
    "lanczos": 3.0,
}
_BITS: Final = 22  # of Pillow's fixed-point weights for 8-bit pixels


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a resized picture: its whole (width, height), and rows top..bottom, columns left..right of it."""

    width: int
    height: int
    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True, slots=True)
class Taps:
    """One axis of a resize: output i is the sum over k of weights[i, k] * input[first[i] + k] / 2**22."""

    first: NDArray[np.int64]  # [n]
    count: NDArray[np.int64]  # [n], taps in use
    weights: NDArray[np.int64]  # [n, K], zero beyond count

    @property
    def start(self) -> int:
        """The first input that any output needs."""
        return int(self.first.min())

    @property
    def stop(self) -> int:
        """One past the last input that any output needs."""
        return int((self.first + self.count).max())


def exact(image: Image.Image, window: Window, interpolation: Interpolation) -> NDArray[np.uint8]:
    """uint8 [h, w, 3]: the window of `image.resize((window.width, window.height))`, bit for bit."""
    whole = image.resize((window.width, window.height), FILTERS[interpolation])
    box = (window.left, window.top, window.right, window.bottom)
    return np.asarray(whole if box == (0, 0, *whole.size) else whole.crop(box))


def exact_window(array: NDArray[np.uint8], window: Window, interpolation: Interpolation) -> NDArray[np.uint8]:
    """As `exact`, without ever making the whole: for a window of a result too large to hold.

    array: uint8 [H, W, 3]. Not for "nearest".
    """
    height, width = array.shape[:2]
    across = taps(width, window.width, window.left, window.right, interpolation)
    down = taps(height, window.height, window.top, window.bottom, interpolation)
    array = array[down.start : down.stop, across.start : across.stop]
    down = _shifted(down)
    across = _shifted(across)
    for axis in (0, 1) if vertical_first((width, height), (window.width, window.height)) else (1, 0):
        array = _weigh(array, down if axis == 0 else across, axis)
    return array


def vertical_first(size: tuple[int, int], new: tuple[int, int]) -> bool:
    """Whether Pillow 13 shrinks the rows before the columns; sizes are (width, height)."""
    return size[1] > new[1] and size[1] - new[1] > 2 * (size[0] - new[0])


@lru_cache(maxsize=512)
def taps(size: int, new: int, start: int, stop: int, interpolation: Interpolation) -> Taps:
    """Weights of outputs start..stop when `size` inputs become `new`, in Pillow's double arithmetic and rounding."""
    index = np.arange(start, stop)
    if size == new:  # Pillow leaves the pass out
        ones = np.ones_like(index)
        return Taps(index, ones, ones[:, None] << _BITS)
    scale = size / new
    stretch = max(scale, 1.0)
    support = _SUPPORT[interpolation] * stretch
    centre = (index + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    count = np.minimum((centre + support + 0.5).astype(np.int64), size) - first
    place = np.arange(int(count.max()))
    weights = _filter((place + first[:, None] - centre[:, None] + 0.5) * (1.0 / stretch), interpolation)
    weights = np.where(place < count[:, None], weights, 0.0)
    # cumsum, not sum: Pillow adds from left to right, and the last bit counts.
    total = np.cumsum(weights, axis=1)[:, -1:]
    weights = np.divide(weights, total, out=weights, where=total != 0)
    rounded = np.trunc(weights * (1 << _BITS) + np.where(weights < 0, -0.5, 0.5))
    return Taps(first, count, rounded.astype(np.int64))


def _filter(x: NDArray[np.float64], interpolation: Interpolation) -> NDArray[np.float64]:
    """The kernels as Pillow has them: cubic with a = -0.5 (Keys 1981), 3-lobed Lanczos, ..."""
    if interpolation == "box":
        return np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)
    x = np.abs(x)
    if interpolation == "bilinear":
        return np.where(x < 1, 1 - x, 0.0)
    if interpolation == "bicubic":
        near = (1.5 * x - 2.5) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * -0.5
        return np.where(x < 1, near, np.where(x < 2, far, 0.0))
    if interpolation == "hamming":
        hamming = np.float64(np.float32(0.54)) + np.float64(np.float32(0.46)) * np.cos(x * math.pi)
        return np.where(x < 1, _sinc(x) * hamming, 0.0)
    return np.where(x < 3, _sinc(x) * _sinc(x / 3), 0.0)


def _sinc(x: NDArray[np.float64]) -> NDArray[np.float64]:
    angle = x * math.pi
    return np.divide(np.sin(angle), angle, out=np.ones_like(x), where=x != 0)


def _shifted(plan: Taps) -> Taps:
    return Taps(plan.first - plan.start, plan.count, plan.weights)


def _weigh(array: NDArray[np.uint8], plan: Taps, axis: int) -> NDArray[np.uint8]:
    """One pass of Pillow's integer arithmetic along an axis of [H, W, 3]."""
    lines = np.moveaxis(array, axis, 0)  # [N, M, 3]
    out = np.empty((len(plan.first), *lines.shape[1:]), np.uint8)
    for row, (first, count, weights) in enumerate(zip(plan.first, plan.count, plan.weights, strict=True)):
        total = np.tensordot(weights[:count], lines[first : first + count].astype(np.int64), 1)
        out[row] = np.clip((total + (1 << _BITS - 1)) >> _BITS, 0, 255)
    return np.moveaxis(out, 0, axis)


def can_be_fast(interpolation: Interpolation) -> bool:
    """Whether `fast` does this kernel, with the installed Pillow taking its passes in the order known here."""
    return interpolation != "nearest" and _order_holds()


@cache
def _order_holds() -> bool:
    """Looks once at small pictures: in the other order a quarter of the values would be off."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    for width, height, new_width, new_height in (
        (40, 20, 9, 9),
        (20, 40, 9, 9),
        (30, 40, 20, 21),
        (30, 40, 24, 23),
    ):
        array = np.ascontiguousarray(noise[:height, :width])
        window = Window(new_width, new_height, 0, 0, new_width, new_height)
        wanted = exact(Image.fromarray(array), window, "bicubic")
        if not np.array_equal(exact_window(array, window, "bicubic"), wanted):
            return False
    return True


def fast(array: NDArray[np.uint8], window: Window, interpolation: Interpolation) -> NDArray[np.uint8]:
    """As `exact`, but uint8 [3, h, w], and off by 1 in a few values of 10,000. Only if `can_be_fast`.

    array: uint8 [H, W, 4], contiguous; the fourth channel is ignored.

    The same two rounded passes with the same weights, summed in float32: off where a sum is within about 1e-4 of a
    half. A pass is a weighted sum of rows, which torch has as a kernel (`embedding_bag`); columns become rows by
    moving pixels as 32-bit words.
    """
    import torch

    height, width = array.shape[:2]
    across = _bags(width, window.width, window.left, window.right, interpolation)
    down = _bags(height, window.height, window.top, window.bottom, interpolation)
    array = array[down.start : down.stop, across.start : across.stop]
    words = torch.from_numpy(array).view(torch.int32)[:, :, 0]  # [rows, columns], one pixel each
    if vertical_first((width, height), (window.width, window.height)):
        words = _weigh_rows(_weigh_rows(words, down).t().contiguous(), across).t()
    else:
        words = _weigh_rows(_weigh_rows(words.t().contiguous(), across).t().contiguous(), down)
    pixels = _bytes(words).view(*words.shape, 4)
    return pixels[:, :, :3].permute(2, 0, 1).contiguous().numpy()


@dataclass(frozen=True, slots=True)
class _Bags:
    """Taps as torch tensors: T (row, weight) pairs, and where the pairs of each of n outputs begin."""

    start: int
    stop: int
    rows: torch.Tensor | None  # int32 [T], counted from start; None: nothing to weigh, outputs are inputs
    begins: torch.Tensor | None  # int32 [n]
    weights: torch.Tensor | None  # float32 [T]


def _weigh_rows(words: torch.Tensor, bags: _Bags) -> torch.Tensor:
    """One pass over rows of pixels: int32 [N, M] to int32 [n, M], each word four uint8."""
    import torch

    if bags.rows is None:
        return words
    rows = _bytes(words).view(len(words), -1).float()  # [N, 4 M]
    sums = torch.nn.functional.embedding_bag(
        bags.rows, rows, bags.begins, mode="sum", per_sample_weights=bags.weights
    )
    # The conversion cuts off, so halves go up, as in Pillow.
    return sums.add_(0.5).clamp_(0, 255.5).to(torch.uint8).view(-1).view(torch.int32).view(len(sums), -1)


def _bytes(words: torch.Tensor) -> torch.Tensor:
    """int32 of any shape, as uint8 in one row; flat first, because a side of 1 may have any stride."""
    import torch

    return words.reshape(-1).contiguous().view(torch.uint8)


@lru_cache(maxsize=256)
def _bags(size: int, new: int, start: int, stop: int, interpolation: Interpolation) -> _Bags:
    import torch

    if size == new:
        return _Bags(start, stop, None, None, None)
    plan = taps(size, new, start, stop, interpolation)
    place = np.arange(plan.weights.shape[1])
    used = place < plan.count[:, None]
    rows = (plan.first[:, None] - plan.start + place)[used]
    weights = plan.weights[used] / (1 << _BITS)  # 22 bits fit float32: nothing is rounded
    return _Bags(
        plan.start,
        plan.stop,
        torch.from_numpy(rows.astype(np.int32)),
        torch.from_numpy((np.cumsum(plan.count) - plan.count).astype(np.int32)),
        torch.from_numpy(weights.astype(np.float32)),
    )
