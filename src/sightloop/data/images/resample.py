"""Resizing exactly as Pillow does, or nearly so and several times faster.

Pillow resizes in two passes, one per axis, each a weighted sum with 22-bit weights rounded to uint8. Where only a small
window of a huge result is wanted, the same sums are done for that window alone; and where torch is there anyway, its
kernels do the same sums sooner. Imports torch only in `through_torch`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sightloop.types import Interpolation

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
    """A part of a resized image: its whole (width, height), and rows top..bottom, columns left..right of it."""

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


@cache
def order_is_known() -> bool:
    """Whether the installed Pillow takes its passes as `vertical_first` says; tried once, on small images.

    In the other order a quarter of the values would be off by a few.
    """
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


def through_torch(
    array: NDArray[np.uint8], window: Window, interpolation: Interpolation, last_exact: bool
) -> NDArray[np.uint8] | None:
    """As `exact`, but uint8 [3, h, w], and two to three times sooner. Only if `order_is_known`.

    array: uint8 [H, W, 4], contiguous; the fourth channel is ignored. Without `last_exact` the second pass is torch's
    own resize for bicubic (plain float32 sums for others): one rounding in some 500 turns, so that a
    value is off by 1; never by more, as the first pass is exact. None if the image shrinks so much that sums would
    not be exact.

    A pass is a weighted sum of rows, which torch has as a kernel (`embedding_bag`); columns become rows by moving
    pixels as 32-bit words.
    """
    import torch

    height, width = array.shape[:2]
    across = _bags(width, window.width, window.left, window.right, interpolation)
    down = _bags(height, window.height, window.top, window.bottom, interpolation)
    if across is None or down is None:
        return None
    quick = not last_exact and interpolation == "bicubic"
    words = torch.from_numpy(array).view(torch.int32)[:, :, 0]  # [rows, columns]
    with torch.no_grad():
        if vertical_first((width, height), (window.width, window.height)):
            needed = words if quick else words[:, across.start : across.stop]
            words = _weigh_rows(needed[down.start : down.stop], down, True)
            if quick:
                words = _interpolate(words, (len(words), window.width), interpolation)[
                    :, window.left : window.right
                ]
            else:
                words = _weigh_rows(words.t().contiguous(), across, last_exact).t()
        else:
            needed = words if quick else words[down.start : down.stop]
            # torch transposes only wholes by blocks
            words = (
                _weigh_rows(needed.t().contiguous()[across.start : across.stop], across, True)
                .t()
                .contiguous()
            )
            if quick:
                words = _interpolate(words, (window.height, words.shape[1]), interpolation)[
                    window.top : window.bottom
                ]
            else:
                words = _weigh_rows(words, down, last_exact)
    pixels = _bytes(words).view(*words.shape, 4)
    return pixels[:, :, :3].permute(2, 0, 1).contiguous().numpy()


def _interpolate(words: torch.Tensor, size: tuple[int, int], interpolation: Interpolation) -> torch.Tensor:
    """One pass of torch's own antialiased resize on uint8; its 16-bit weights may turn one rounding, never two."""
    import torch

    channels_last = _bytes(words).view(1, *words.shape, 4).permute(0, 3, 1, 2)
    done = torch.nn.functional.interpolate(
        channels_last, size=size, mode=interpolation, antialias=True, align_corners=False
    )
    return done.permute(0, 2, 3, 1).contiguous().view(torch.int32)[0, :, :, 0]


@dataclass(frozen=True, slots=True)
class _Bags:
    """Taps as torch tensors: T (row, weight) pairs, and where the pairs of each of n outputs begin.

    A weight is high + low / 2**11: of 22 bits, half in each, so that a sum of up to 64 products with 8-bit pixels is
    exact in float32's 24 bits, in whatever order it is taken.
    """

    start: int
    stop: int
    rows: torch.Tensor  # int32 [T], counted from start
    begins: torch.Tensor  # int32 [n]
    whole: torch.Tensor  # float32 [T], the weight
    high: torch.Tensor  # float32 [T]
    low: torch.Tensor  # float32 [T]
    idle: bool  # nothing to weigh: outputs are inputs


def _weigh_rows(words: torch.Tensor, bags: _Bags, in_full: bool) -> torch.Tensor:
    """One pass over rows of pixels: int32 [N, M] to int32 [n, M], each word four uint8."""
    import torch

    if bags.idle:
        return words
    rows = _bytes(words).view(len(words), -1).float()  # [N, 4 M]

    def total(weights: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding_bag(
            bags.rows, rows, bags.begins, mode="sum", per_sample_weights=weights
        )

    if in_full:
        # Halves go up: floor((high + low / 2**11) + 1/2) is the same with low's own fraction cut off first.
        sums = total(bags.high).add_(total(bags.low).floor_(), alpha=2.0**-11)
    else:
        sums = total(bags.whole)
    # NumPy converts to uint8 four times sooner than torch; both cut off.
    done = sums.add_(0.5).clamp_(0, 255.5).numpy().astype(np.uint8)
    return torch.from_numpy(done).view(-1).view(torch.int32).view(len(sums), -1)


def _bytes(words: torch.Tensor) -> torch.Tensor:
    """int32 of any shape, as uint8 in one row."""
    import torch

    # as_strided: a side of 1 may carry any stride, at which `view` takes offence
    return words.contiguous().as_strided((words.numel(),), (1,)).view(torch.uint8)


@lru_cache(maxsize=256)
def _bags(size: int, new: int, start: int, stop: int, interpolation: Interpolation) -> _Bags | None:
    """The taps for torch; None if a sum of their low halves could pass 24 bits."""
    import torch

    plan = taps(size, new, start, stop, interpolation)
    place = np.arange(plan.weights.shape[1])
    used = place < plan.count[:, None]
    high = (plan.weights + 1024) >> 11
    low = plan.weights - (high << 11)
    if 255 * int(np.abs(low).sum(axis=1).max()) >= 1 << 24:
        return None
    begins = np.cumsum(plan.count) - plan.count
    rows = (plan.first[:, None] - plan.start + place)[used]
    return _Bags(
        plan.start,
        plan.stop,
        torch.from_numpy(rows.astype(np.int32)),
        torch.from_numpy(begins.astype(np.int32)),
        torch.from_numpy((plan.weights[used] / 2.0**22).astype(np.float32)),
        torch.from_numpy((high[used] / 2.0**11).astype(np.float32)),
        torch.from_numpy((low[used] / 2.0**11).astype(np.float32)),
        size == new,
    )
