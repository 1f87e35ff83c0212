"""Image resizing with the bits of Pillow, also for a window of the result, and faster with torch.

Pillow resizes in two passes, one per axis. Each output value of a pass is a weighted sum of neighboring input values,
rounded to uint8. The inputs of one output and their weights are its taps. Bilinear, 4 inputs to 2 outputs:

    scale 4 / 2 = 2, so the triangle kernel is stretched to 2 pixels on each side
    output 0 has its center at 1.0; inputs 0, 1, 2 have theirs at 0.5, 1.5, 2.5
    kernel values 0.75, 0.75, 0.25; divided by their sum:

    output 0 = 3/7 input 0 + 3/7 input 1 + 1/7 input 2
    output 1 =               1/7 input 1 + 3/7 input 2 + 3/7 input 3

    as integers of 22 fractional bits: 1797559, 1797559, 599186

Only the window that a crop keeps is computed where the whole result would be huge, and where torch is imported, its
kernels compute the same sums faster. Imports torch in `resize_torch` only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sightloop.types import Floats, Integers, Interpolation

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
# Radius of each kernel: in input pixels where the image grows, in output pixels where it shrinks.
_SUPPORT: Final[dict[Interpolation, float]] = {
    "box": 0.5,
    "bilinear": 1.0,
    "hamming": 1.0,
    "bicubic": 2.0,
    "lanczos": 3.0,
}
_BITS: Final = 22  # fractional bits of Pillow's integer weights for 8-bit pixels
_TILE: Final = 128  # pixels
_SCALE_AND_OFFSET: Final = (1.0, 0.0)  # of a row of bytes: a value is scale * byte + offset


@dataclass(frozen=True, slots=True)
class Window:
    """Part of a resized image, in pixels of the result.

    Args:
        width: Of the whole result.
        height: Of the whole result.
        left: First column of the part.
        top: First row of the part.
        right: One past its last column.
        bottom: One past its last row.
    """

    width: int
    height: int
    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True, slots=True)
class Taps:
    """Weights of one pass: output i = sum over k of weights[i, k] * input[first[i] + k] / 2**22.

    Args:
        first: `[n]`, index of the first input of each of n outputs.
        count: `[n]`, number of inputs of each output.
        weights: `[n, K]`, integers; 0 at k >= count.
    """

    first: Integers
    count: Integers
    weights: Integers

    @property
    def start(self) -> int:
        """First input that any output needs."""
        return int(self.first.min())

    @property
    def stop(self) -> int:
        """One past the last input that any output needs."""
        return int((self.first + self.count).max())


def resize_pillow(image: Image.Image, window: Window, interpolation: Interpolation) -> NDArray[np.uint8]:
    """Resize with Pillow and crop to the window: uint8 `[h, w, 3]`."""
    resized = image.resize((window.width, window.height), FILTERS[interpolation])
    box = (window.left, window.top, window.right, window.bottom)
    return np.asarray(resized if box == (0, 0, *resized.size) else resized.crop(box))


def resize_window(
    array: NDArray[np.uint8], window: Window, interpolation: Interpolation
) -> NDArray[np.uint8]:
    """Result of `resize_pillow`, bit for bit, without computing the rest of the resized image.

    Args:
        array: uint8 `[H, W, 3]`.
        window: Part of the result.
        interpolation: Any but "nearest".

    Returns:
        uint8 `[h, w, 3]`.
    """
    height, width = array.shape[:2]
    column_taps = taps(width, window.width, window.left, window.right, interpolation)
    row_taps = taps(height, window.height, window.top, window.bottom, interpolation)
    # Crop to the inputs that the window needs, and count the taps from there.
    array = array[row_taps.start : row_taps.stop, column_taps.start : column_taps.stop]
    row_taps, column_taps = _rebase(row_taps), _rebase(column_taps)
    rows_first = vertical_first((width, height), (window.width, window.height))
    for axis in (0, 1) if rows_first else (1, 0):
        array = _apply_taps(array, row_taps if axis == 0 else column_taps, axis)
    return array


def vertical_first(size: tuple[int, int], new_size: tuple[int, int]) -> bool:
    """Whether Pillow 13 resizes rows before columns; sizes are (width, height).

    The order changes bits, because the first pass rounds to uint8.
    """
    return size[1] > new_size[1] and size[1] - new_size[1] > 2 * (size[0] - new_size[0])


@lru_cache(maxsize=512)
def taps(size: int, new_size: int, start: int, stop: int, interpolation: Interpolation) -> Taps:
    """Taps of the outputs start..stop-1 when `size` inputs become `new_size`, in Pillow's arithmetic and rounding.

    The example of the module is `taps(4, 2, 0, 2, "bilinear")`:
    first [0, 1], count [3, 3], weights [[1797559, 1797559, 599186], [599186, 1797559, 1797559]].
    """
    index = np.arange(start, stop)  # [n]
    if size == new_size:  # Pillow leaves the pass out: one tap of weight 1
        ones = np.ones_like(index)
        return Taps(index, ones, ones[:, None] << _BITS)
    # 1. Which inputs: those whose centers are within the kernel, stretched where the image shrinks.
    scale = size / new_size
    stretch = max(scale, 1.0)
    support = _SUPPORT[interpolation] * stretch
    center = (index + 0.5) * scale  # [n], in input pixels
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    count = np.minimum((center + support + 0.5).astype(np.int64), size) - first
    # 2. Kernel values at the distance of each input from the center of its output.
    k = np.arange(int(count.max()))  # [K]
    weights = _kernel((k + first[:, None] - center[:, None] + 0.5) * (1.0 / stretch), interpolation)  # [n, K]
    weights = np.where(k < count[:, None], weights, 0.0)
    # 3. Normalize. cumsum, not sum: Pillow adds from left to right, and np.sum adds pairwise with other rounding.
    total = np.cumsum(weights, axis=1)[:, -1:]  # [n, 1]
    weights = np.divide(weights, total, out=weights, where=total != 0)
    # 4. Round to integers, halves away from zero.
    rounded = np.trunc(weights * (1 << _BITS) + np.where(weights < 0, -0.5, 0.5))
    return Taps(first, count, rounded.astype(np.int64))


def _kernel(x: Floats, interpolation: Interpolation) -> Floats:
    """Kernel values at distances `[n, K]`, by Pillow's formulas: cubic with a = -0.5 (Keys 1981), 3-lobed Lanczos."""
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
        # Pillow's constants are float32.
        hamming = np.float64(np.float32(0.54)) + np.float64(np.float32(0.46)) * np.cos(x * math.pi)
        return np.where(x < 1, _sinc(x) * hamming, 0.0)
    return np.where(x < 3, _sinc(x) * _sinc(x / 3), 0.0)


def _sinc(x: Floats) -> Floats:
    angle = x * math.pi
    return np.divide(np.sin(angle), angle, out=np.ones_like(x), where=x != 0)


def _rebase(plan: Taps) -> Taps:
    """Taps for an input that begins at `plan.start`."""
    return Taps(plan.first - plan.start, plan.count, plan.weights)


def _apply_taps(array: NDArray[np.uint8], plan: Taps, axis: int) -> NDArray[np.uint8]:
    """One pass along an axis of `[H, W, 3]`, in Pillow's integer arithmetic."""
    lines = np.moveaxis(array, axis, 0)  # [N, M, 3]
    out = np.empty((len(plan.first), *lines.shape[1:]), np.uint8)  # [n, M, 3]
    for row, (first, count, weights) in enumerate(zip(plan.first, plan.count, plan.weights, strict=True)):
        total = np.tensordot(weights[:count], lines[first : first + count].astype(np.int64), 1)  # [M, 3]
        # Adding half of 2**22 before the shift rounds to nearest. Bicubic and Lanczos go below 0 and above 255.
        out[row] = np.clip((total + (1 << _BITS - 1)) >> _BITS, 0, 255)
    return np.moveaxis(out, 0, axis)


@cache
def pass_order_is_known() -> bool:
    """Whether the installed Pillow orders its passes like `vertical_first`; tested once, on small images.

    In the other order a quarter of the values would differ by a few.
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
        expected = resize_pillow(Image.fromarray(array), window, "bicubic")
        if not np.array_equal(resize_window(array, window, "bicubic"), expected):
            return False
    return True


def resize_torch(
    array: NDArray[np.uint8], window: Window, interpolation: Interpolation, last_exact: bool
) -> NDArray[np.uint8] | None:
    """Result of `resize_pillow`, several times faster. Valid where `pass_order_is_known`.

    A pass over rows is a weighted sum of rows, which torch has as a kernel: `embedding_bag`. A pass over columns is a
    pass over rows of the transposed image; pixels are moved as 32-bit words, which is why there are four channels.
    Where torch can, it sums the bytes themselves (`sums_bytes`), else float32 copies of them.

    Args:
        array: uint8 `[H, W, 4]`, contiguous; the fourth channel is ignored.
        window: Part of the result.
        interpolation: Any but "nearest".
        last_exact: False computes the second pass by torch's own resize (bicubic) or by float32 sums (others). One
            rounding in some 500 differs, so that a value is off by 1, never by more, as the first pass is exact.

    Returns:
        uint8 `[3, h, w]`; None if the image shrinks so much that float32 sums would not be exact.
    """
    import torch

    height, width = array.shape[:2]
    column_taps = _torch_taps(width, window.width, window.left, window.right, interpolation)
    row_taps = _torch_taps(height, window.height, window.top, window.bottom, interpolation)
    if column_taps is None or row_taps is None:
        return None
    use_interpolate = not last_exact and interpolation == "bicubic"
    words = torch.from_numpy(array).view(torch.int32)[:, :, 0]  # [H, W]
    with torch.no_grad():
        if vertical_first((width, height), (window.width, window.height)):
            # torch's resize needs all columns; the taps need those of the window.
            needed = words if use_interpolate else words[:, column_taps.start : column_taps.stop]
            words = _apply_torch_taps(needed[row_taps.start : row_taps.stop], row_taps, True)  # [h, W']
            if use_interpolate:
                words = _interpolate(words, (len(words), window.width), interpolation)
                words = words[:, window.left : window.right]
            else:
                words = _apply_torch_taps(words.t(), column_taps, last_exact).t()
        else:
            needed = words if use_interpolate else words[row_taps.start : row_taps.stop]
            columns = needed[:, column_taps.start : column_taps.stop].t()
            words = _apply_torch_taps(columns, column_taps, True).t()  # [H', w]
            if use_interpolate:
                words = _interpolate(words, (window.height, words.shape[1]), interpolation)
                words = words[window.top : window.bottom]
            else:
                words = _apply_torch_taps(words, row_taps, last_exact)
    pixels = _as_bytes(words).view(*words.shape, 4)  # [h, w, 4]
    return pixels[:, :, :3].permute(2, 0, 1).contiguous().numpy()


def _interpolate(words: torch.Tensor, size: tuple[int, int], interpolation: Interpolation) -> torch.Tensor:
    """One pass by torch's antialiased uint8 resize, int32 `[H, W]` to `[h, w]`.

    Its weights have 16 bits, so that a value may be off by 1, never by more.
    """
    import torch

    channels_last = _as_bytes(words).view(1, *words.shape, 4).permute(0, 3, 1, 2)  # [1, 4, H, W]
    resized = torch.nn.functional.interpolate(
        channels_last, size=size, mode=interpolation, antialias=True, align_corners=False
    )
    return resized.permute(0, 2, 3, 1).contiguous().view(torch.int32)[0, :, :, 0]


@dataclass(frozen=True, slots=True)
class _TorchTaps:
    """Taps as arguments of `embedding_bag`: T taps in one list, and where the taps of each of n outputs begin.

    The weights of the example, 1797559, 1797559, 599186 and 599186, ..., as T = 6, n = 2:

        rows = [0, 1, 2, 1, 2, 3], begins = [0, 3]

    A weight w of 22 bits is split: w = high * 2**11 + low. Sums of either half times 8-bit pixels are exact in the 24
    bits of float32, in any order: |low| <= 2**10, so 64 products stay below 2**24, and all |high| add up to 2**11 or
    little more.

    Args:
        start: First input that any output needs.
        stop: One past the last one.
        rows: int32 `[T]`, input of each tap, counted from `start`.
        begins: int32 `[n]`, first tap of each output.
        weights: float32 `[T]`, w / 2**22.
        high: float32 `[T]`, high / 2**11.
        low: float32 `[T]`, low / 2**11.
        identity: Whether outputs are inputs, so that there is nothing to compute.
    """

    start: int
    stop: int
    rows: torch.Tensor
    begins: torch.Tensor
    weights: torch.Tensor
    high: torch.Tensor
    low: torch.Tensor
    identity: bool


def _apply_torch_taps(words: torch.Tensor, plan: _TorchTaps, exact: bool) -> torch.Tensor:
    """One pass over rows of pixels, int32 `[N, M]` of any strides to `[n, M]`, each word four uint8.

    The rows are cut into tiles of up to `_TILE` pixels, whose sums stay in the cache of a core.

    exact: With the bits of Pillow, from two sums of half weights; else from one sum of float32 weights.
    """
    import torch

    if plan.identity:
        return words
    count, width = words.shape
    # Tiles of one width, in steps of 8 pixels: torch compiles a kernel for each width and keeps it.
    tile = -(-width // -(-width // _TILE) // 8) * 8
    rows = torch.empty(count, tile + 2, dtype=torch.int32)  # [N, tile + 2]
    rows[:, tile:] = torch.tensor(_SCALE_AND_OFFSET, dtype=torch.float32).view(torch.int32)
    out = np.empty((len(plan.begins), 4 * width), np.uint8)  # [n, 4 * M]
    for start in range(0, width, tile):
        used = min(tile, width - start)
        rows[:, :used] = words[:, start : start + used]
        if exact:
            # Pillow computes floor(H + L + 1/2), with H the sum of high * pixel / 2**11, L of low * pixel / 2**22.
            # H + 1/2 is a multiple of 2**-11, so the part of L below 2**-11 cannot change the result: floor_ drops it.
            low = _weighted_sum(rows, plan, plan.low).floor_()
            sums = _weighted_sum(rows, plan, plan.high).add_(low, alpha=2.0**-11)
        else:
            sums = _weighted_sum(rows, plan, plan.weights)
        values = sums.add_(0.5).clamp_(0, 255.5).numpy()[:, : 4 * used]
        # NumPy converts to uint8 four times faster than torch; both truncate.
        np.copyto(out[:, 4 * start : 4 * (start + used)], values, casting="unsafe")
    return torch.from_numpy(out).view(-1).view(torch.int32).view(len(out), -1)


def _weighted_sum(rows: torch.Tensor, plan: _TorchTaps, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sums of rows of bytes: int32 `[N, m + 2]`, the last two words 1.0 and 0.0, to float32 `[n, 4 * m]`."""
    import torch

    values = rows.view(torch.uint8)  # [N, 4 * m + 8]
    if sums_bytes():
        return _sum_bytes(values, plan.rows, plan.begins, weights)
    return torch.nn.functional.embedding_bag(
        plan.rows, values[:, :-8].float(), plan.begins, mode="sum", per_sample_weights=weights
    )


def _sum_bytes(
    values: torch.Tensor, rows: torch.Tensor, begins: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """`embedding_bag` of uint8 rows `[N, 4 * m + 8]`, which end in their scale and offset: float32 `[n, 4 * m]`.

    A quarter of the memory traffic of float32 rows, which is most of the time.
    """
    import torch

    operator: Callable[..., torch.Tensor] = torch.ops.quantized.embedding_bag_byte_rowwise_offsets
    return operator(values, rows, begins, False, 0, False, weights, None, False)


@cache
def sums_bytes() -> bool:
    """Whether this build of torch sums rows of bytes, with the sums of float32 rows; tested once, on a small table."""
    import torch

    rows = torch.arange(0, 40, dtype=torch.uint8).repeat(8, 1) * 5  # [8, 40]
    rows[:, -8:] = torch.tensor(_SCALE_AND_OFFSET, dtype=torch.float32).view(torch.uint8)
    index, begins = torch.arange(8, dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    weights = torch.tensor([1024, -37, 2048, 5, 1, -1023, 77, 512], dtype=torch.float32) / 2048
    try:
        sums = _sum_bytes(rows, index, begins, weights)
    except (
        AttributeError,
        RuntimeError,
        TypeError,
    ):  # an operator that is absent, not built, or has other arguments
        return False
    expected = torch.nn.functional.embedding_bag(
        index, rows[:, :-8].float(), begins, mode="sum", per_sample_weights=weights
    )
    return torch.equal(sums, expected)


def _as_bytes(words: torch.Tensor) -> torch.Tensor:
    """int32 of any shape as a flat uint8 `[4 * M]`."""
    import torch

    # as_strided: a dimension of size 1 may have any stride, which `view` rejects.
    return words.contiguous().as_strided((words.numel(),), (1,)).view(torch.uint8)


@lru_cache(maxsize=256)
def _torch_taps(
    size: int, new_size: int, start: int, stop: int, interpolation: Interpolation
) -> _TorchTaps | None:
    """The taps for torch; None if a sum of low halves could exceed 24 bits."""
    import torch

    plan = taps(size, new_size, start, stop, interpolation)
    k = np.arange(plan.weights.shape[1])  # [K]
    used = k < plan.count[:, None]  # [n, K]
    high = (plan.weights + 1024) >> 11
    low = plan.weights - (high << 11)  # -1024..1023
    if 255 * int(np.abs(low).sum(axis=1).max()) >= 1 << 24:
        return None
    begins = np.cumsum(plan.count) - plan.count
    rows = (plan.first[:, None] - plan.start + k)[used]  # [T]
    return _TorchTaps(
        plan.start,
        plan.stop,
        torch.from_numpy(rows.astype(np.int32)),
        torch.from_numpy(begins.astype(np.int32)),
        torch.from_numpy((plan.weights[used] / 2.0**22).astype(np.float32)),
        torch.from_numpy((high[used] / 2.0**11).astype(np.float32)),
        torch.from_numpy((low[used] / 2.0**11).astype(np.float32)),
        size == new_size,
    )
