"""Image preprocessing of every model: decode, resize and crop to uint8, then normalize to float32.

`preprocess` yields small uint8 pixels and can run anywhere: on a thread, or in a process without torch. `normalize`
converts a batch of them beside the model. Together they equal, bit for bit, the Pillow-backed image processors of
`transformers`. Imports torch only inside functions.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sightloop.data.images import decode, resample, tiles
from sightloop.errors import ImageError, UsageError
from sightloop.types import Box, ImageSource, ImageSpec, Limits, Pixels, Size

if TYPE_CHECKING:
    import torch

# Where the resized image would have more pixels than this, only the window of the crop is computed: for strips of
# 84:1 and more at 224.
_WINDOW_FROM: Final = 1 << 22


def preprocess(
    source: ImageSource,
    spec: ImageSpec,
    *,
    mode: Literal["exact", "fast"] = "exact",
    limits: Limits = decode.DEFAULT_LIMITS,
) -> Pixels:
    """Decode, rotate upright, resize and crop.

    Args:
        source: Image; a Pixels is returned as it is.
        spec: Preprocessing.
        mode: "exact" has the bits of Pillow's resize. "fast" may differ by 1 of 255 in few values (photographs: under
            0.1 %; 1 % at most), and imports torch.
        limits: `max_pixels` also holds for the resized image, unless a crop needs only a part of it.

    Returns:
        uint8 `[3, H, W]` with the image's name and original size; tiles are below one another, see `ImageSpec`.

    Raises:
        ImageError: The image cannot be read, or is beyond `limits`.
    """
    if mode not in ("exact", "fast"):
        raise UsageError(f"mode={mode!r}: must be 'exact' or 'fast'")
    if isinstance(source, Pixels):
        return source
    name = decode.source_name(source)
    with _memory_errors(name):
        # Torch resizes to the same bits faster, but importing it takes longer than that saves.
        if (mode == "fast" or "torch" in sys.modules) and _is_packed_kind(spec):
            return _preprocess_array(name, decode.decode_packed(source, limits), spec, mode, limits)
        image = decode.decode(source, limits)
        size = (image.height, image.width)
        if spec.square is not None:
            image = Image.fromarray(_pad_to_square(name, np.asarray(image), spec, limits))
        return Pixels(name, _resize_all(size, spec, lambda part: _resize(name, image, part, limits)), size)


def resizes_packed(spec: ImageSpec) -> bool:
    """Whether `preprocess_packed` is the quickest way: torch is imported, and resizes to the bits of Pillow."""
    return "torch" in sys.modules and _is_packed_kind(spec)


def preprocess_packed(
    name: str, array: NDArray[np.uint8], spec: ImageSpec, mode: Literal["exact", "fast"], limits: Limits
) -> Pixels:
    """`preprocess` of an image that is decoded, for a spec of `resizes_packed`.

    Args:
        name: Name of the image.
        array: uint8 `[H, W, 4]`, upright; the fourth channel is ignored.
        spec: Preprocessing.
        mode: As in `preprocess`.
        limits: As in `preprocess`.
    """
    with _memory_errors(name):
        return _preprocess_array(name, array, spec, mode, limits)


def _is_packed_kind(spec: ImageSpec) -> bool:
    return spec.interpolation != "nearest" and resample.pass_order_is_known()


def _preprocess_array(
    name: str, array: NDArray[np.uint8], spec: ImageSpec, mode: Literal["exact", "fast"], limits: Limits
) -> Pixels:
    size, exact = (array.shape[0], array.shape[1]), mode == "exact"
    array = _pad_to_square(name, array, spec, limits)
    return Pixels(
        name, _resize_all(size, spec, lambda part: _resize_packed(name, array, part, limits, exact)), size
    )


@contextmanager
def _memory_errors(name: str) -> Generator[None]:
    """Turn a lack of memory into the ImageError of this image."""
    try:
        yield
    except MemoryError:
        raise ImageError(name, decode.OUT_OF_MEMORY) from None
    except RuntimeError as error:  # torch raises RuntimeError where it is out of memory
        if "allocate memory" not in str(error):
            raise
        raise ImageError(name, decode.OUT_OF_MEMORY) from None


def normalize(
    batch: torch.Tensor | Sequence[Pixels],
    spec: ImageSpec,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Scale and normalize: (v * scale - mean) / std.

    The bits are those of the reference: the product in float64, rounded to float32, the rest in float32.

    Args:
        batch: uint8 `[B, 3, H, W]`, or B Pixels of one size.
        spec: Preprocessing.
        device: Device of the result; by default that of a tensor, and the CPU for Pixels.
        dtype: Type that the float32 result is converted to.

    Returns:
        float32, or `dtype`, `[B, 3, H, W]`.

    Raises:
        UsageError: Wrong or unequal shapes, or a dtype other than uint8.
    """
    import torch

    if not isinstance(batch, torch.Tensor):
        batch = _stack(batch)
    if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1] != 3:
        raise UsageError(f"batch: wanted uint8 [B, 3, H, W], got {batch.dtype} {list(batch.shape)}")
    batch = batch.to(batch.device if device is None else device, non_blocking=True)
    plan = _normalize_plan(spec, batch.device)
    out = torch.empty(batch.shape, dtype=torch.float32, device=batch.device)
    # One image at a time stays in the cache of a CPU.
    step = 1 if batch.device.type == "cpu" else max(1, len(batch))
    for start in range(0, len(batch), step):
        part, result = batch[start : start + step], out[start : start + step]
        if plan.method == "table":
            for channel in range(3):
                result[:, channel] = plan.table[channel][part[:, channel].long()]
        else:
            if plan.method == "multiply":
                torch.mul(part, plan.factor, out=result)
            else:
                torch.div(part, plan.factor, out=result)
            result.sub_(plan.mean).div_(plan.std)
    return out if dtype is None else out.to(dtype)


def _stack(batch: Sequence[Pixels]) -> torch.Tensor:
    import torch

    if not batch:
        raise UsageError("batch: empty; at least one image is needed")
    shapes = {pixels.values.shape for pixels in batch}
    if len(shapes) > 1:
        raise UsageError(f"batch: images of different shapes {sorted(shapes)}; crop or stretch them to one")
    return torch.from_numpy(np.stack([pixels.values for pixels in batch]))


def input_box(size: Size, spec: ImageSpec) -> Box:
    """Where a model's input lies in the image: left, top, right, bottom in pixels of the upright image.

    The box is smaller than the image where the input is a crop of it, and goes beyond the image where it is padded.

    Args:
        size: (height, width) of the image.
        spec: Preprocessing, without tiles.
    """
    height, width = size
    x, y = 0.0, 0.0
    if spec.square is not None:
        side = max(height, width)
        x, y, height, width = -((side - width) // 2), -((side - height) // 2), side, side
    window = _crop_window((width, height), spec)
    across, down = width / window.width, height / window.height  # image pixels in a pixel of the input
    rows, columns = window.bottom - window.top, window.right - window.left
    if spec.crop is None:
        left, top = window.left, window.top
    else:  # an odd row of padding is above, a column to the left
        left, top = (
            window.left - (spec.crop[1] - columns + 1) // 2,
            window.top - (spec.crop[0] - rows + 1) // 2,
        )
        rows, columns = spec.crop
    return (x + left * across, y + top * down, x + (left + columns) * across, y + (top + rows) * down)


class _NormalizePlan(NamedTuple):
    """Fastest arithmetic that has the bits of the reference.

    Attributes:
        method: "multiply" by `factor`, "divide" by it, or look up in `table`.
        table: float32 `[3, 256]`, the result for each channel and value.
        factor: Scale, or 1 / scale for "divide".
        mean: float32 `[3, 1, 1]`.
        std: float32 `[3, 1, 1]`.
    """

    method: Literal["multiply", "divide", "table"]
    table: torch.Tensor
    factor: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor


@lru_cache(maxsize=64)
def _normalize_plan(spec: ImageSpec, device: torch.device) -> _NormalizePlan:
    """Try each method on all 256 values x 3 channels, on the device itself."""
    import torch

    mean, std = (np.asarray(values, np.float32)[:, None] for values in (spec.mean, spec.std))  # [3, 1]
    reference = ((np.arange(256, dtype=np.float64) * spec.scale).astype(np.float32) - mean) / std  # [3, 256]
    table = torch.from_numpy(reference).to(device)
    mean_tensor, std_tensor = (torch.from_numpy(values)[:, :, None].to(device) for values in (mean, std))
    values = torch.arange(256, dtype=torch.uint8, device=device).expand(3, 1, 256)
    # Tensors, not numbers: dividing by a number multiplies by its inverse on some devices.
    scale = torch.tensor(spec.scale, dtype=torch.float32, device=device)
    inverse = torch.tensor(1 / spec.scale if spec.scale else math.nan, dtype=torch.float32, device=device)
    candidates: tuple[tuple[Literal["multiply", "divide"], torch.Tensor, torch.Tensor], ...] = (
        ("multiply", scale, torch.mul(values, scale)),
        ("divide", inverse, torch.div(values, inverse)),
    )
    for method, factor, scaled in candidates:
        result = scaled.sub_(mean_tensor).div_(std_tensor)
        if result.dtype == torch.float32 and torch.equal(result.view(3, 256), table):
            return _NormalizePlan(method, table, factor, mean_tensor, std_tensor)
    return _NormalizePlan("table", table, scale, mean_tensor, std_tensor)


def _resize_all(
    size: Size, spec: ImageSpec, resize: Callable[[ImageSpec], NDArray[np.uint8]]
) -> NDArray[np.uint8]:
    """uint8 `[3, H, W]` by `resize`; with tiles `[3, (1 + T) * side, side]`, the whole image above its tiles."""
    if not spec.tiles or spec.crop is None:
        return resize(spec)
    grid, plain = tiles.best_grid(size, spec.tiles), replace(spec, tiles=(), shortest_edge=None, crop=None)
    large = resize(replace(plain, resize=tiles.fit_within(size, grid)))
    overview = resize(replace(plain, resize=spec.crop))
    return np.concatenate([overview, tiles.cut_tiles(large, grid, spec.crop[0])], axis=1)


def _pad_to_square(name: str, array: NDArray[np.uint8], spec: ImageSpec, limits: Limits) -> NDArray[np.uint8]:
    """Center uint8 `[H, W, C]` in a square of the spec's color; an odd row is added below, a column to the right."""
    height, width, channels = array.shape
    side = max(height, width)
    if spec.square is None or height == width:
        return array
    if side * side > limits.max_pixels:
        raise ImageError(name, f"{side} x {side} pixels as a square, over the limit of {limits.max_pixels}")
    canvas = np.empty((side, side, channels), np.uint8)
    canvas[:] = (*spec.square, 0)[:channels]
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = array
    return canvas


def _resize(name: str, image: Image.Image, spec: ImageSpec, limits: Limits) -> NDArray[np.uint8]:
    """Resize and crop by Pillow: uint8 `[3, H, W]`."""
    window = _crop_window(image.size, spec)
    if _is_window_only(window, spec):
        values = resample.resize_window(np.asarray(image), window, spec.interpolation)
    else:
        _check_resized(name, window, limits)
        values = resample.resize_pillow(image, window, spec.interpolation)
    # Always a copy: [H, W, 3] from Pillow is read-only.
    return _pad_to_crop(np.array(values.transpose(2, 0, 1), order="C"), spec)


def _resize_packed(
    name: str, array: NDArray[np.uint8], spec: ImageSpec, limits: Limits, last_exact: bool
) -> NDArray[np.uint8]:
    """Resize and crop by torch where possible: uint8 `[H, W, 4]` to `[3, H, W]`."""
    window = _crop_window((array.shape[1], array.shape[0]), spec)
    values = None
    if not _is_window_only(window, spec):
        _check_resized(name, window, limits)
        values = resample.resize_torch(array, window, spec.interpolation, last_exact)
    if values is None:
        return _resize(name, Image.fromarray(np.ascontiguousarray(array[:, :, :3])), spec, limits)
    return _pad_to_crop(values, spec)


def _is_window_only(window: resample.Window, spec: ImageSpec) -> bool:
    """Whether the resized image is too large to compute more of it than the crop."""
    return (
        spec.crop is not None
        and spec.interpolation != "nearest"
        and window.width * window.height > _WINDOW_FROM
    )


def _check_resized(name: str, window: resample.Window, limits: Limits) -> None:
    if window.width * window.height > limits.max_pixels:
        raise ImageError(
            name,
            f"{window.width} x {window.height} pixels after resizing, over the limit of {limits.max_pixels}",
        )


def _crop_window(size: tuple[int, int], spec: ImageSpec) -> resample.Window:
    """Part of the resized image that the center crop keeps; `size` is (width, height)."""
    width, height = size
    if spec.resize is not None:
        height, width = spec.resize
    elif spec.patches is not None:
        height, width = _naflex_size(height, width, *spec.patches)
    elif spec.shortest_edge is not None:
        edge = spec.shortest_edge
        # Float arithmetic and truncation as in the reference.
        if width <= height:
            width, height = edge, int(edge * height / width)
        else:
            width, height = int(edge * width / height), edge
    if spec.crop is None:
        return resample.Window(width, height, 0, 0, width, height)
    crop_height, crop_width = spec.crop
    top, left = max(0, (height - crop_height) // 2), max(0, (width - crop_width) // 2)
    right, bottom = min(width, left + crop_width), min(height, top + crop_height)
    return resample.Window(width, height, left, top, right, bottom)


def _naflex_size(height: int, width: int, patch: int, max_patches: int) -> Size:
    """Largest (height, width) in whole patches with at most `max_patches` (SigLIP 2, NaFlex).

    Each side is the image's times one scale, rounded up to patches: 480 x 640 with 256 patches of 16 pixels becomes
    224 x 288, 14 x 18 = 252 patches. The scale is found by bisection as in the reference, whose last bits decide ties.
    """

    def scaled(length: int, scale: float) -> int:
        return max(patch, math.ceil(length * scale / patch) * patch)

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        fits = (scaled(height, middle) / patch) * (scaled(width, middle) / patch) <= max_patches
        low, high = (middle, high) if fits else (low, middle)
    return scaled(height, low), scaled(width, low)


def _pad_to_crop(values: NDArray[np.uint8], spec: ImageSpec) -> NDArray[np.uint8]:
    """Center `[3, H, W]` on black of the crop's size; an odd row is added above, a column to the left."""
    if spec.crop is None or values.shape[1:] == spec.crop:
        return values
    rows, columns = (crop - length for crop, length in zip(spec.crop, values.shape[1:], strict=True))
    return np.pad(values, ((0, 0), (rows - rows // 2, rows // 2), (columns - columns // 2, columns // 2)))


def encode_thumbnail(pixels: Pixels, side: int) -> bytes:
    """A JPEG of an image, with quality 82.

    Args:
        pixels: values uint8 `[3, H, W]`.
        side: a square image (H = W) that is larger is made that small, in pixels; others keep their size.
    """
    values = np.ascontiguousarray(pixels.values.transpose(1, 2, 0))  # [H, W, 3]
    image = Image.fromarray(values)
    if image.width == image.height > side:
        image = image.resize((side, side), Image.Resampling.BILINEAR)
    target = io.BytesIO()
    image.save(target, "JPEG", quality=82)
    return target.getvalue()
