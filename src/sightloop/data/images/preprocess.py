"""RGB -> the tensor that a network sees: the one preprocessing of every model.

`prepare` decodes, resizes and crops to small uint8 pixels and can run anywhere (a thread, a process without torch);
`normalise` turns a batch of them into floats beside the model. Together they equal, bit for bit, the Pillow-backed
image processors of `transformers`. Imports torch only where a function needs it.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sightloop.data.images import decode, resample, tiles
from sightloop.errors import CheckpointError, ImageError, UsageError
from sightloop.types import ImageSource, ImageSpec, Interpolation, JsonDict, JsonMapping, Limits, Pixels

if TYPE_CHECKING:
    import torch

_CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)
_HALF: Final = (0.5, 0.5, 0.5)
_NO_LIMITS: Final = Limits()
# A whole resize beyond this many pixels is done for its crop alone: strips of 84:1 and more at 224.
_WINDOW_FROM: Final = 1 << 22
# Larger images are Pillow's: torch would take 16 bytes a pixel, four times as many.
_TORCH_UP_TO: Final = 1 << 22

_CLIP: Final[JsonDict] = {
    "square": False,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": 224,
    "image_mean": _CLIP_MEAN,
    "image_std": _CLIP_STD,
}
# What a processor config that leaves a key out means, per family; `square`: what a bare `size: 224` means.
_FAMILIES: Final[dict[str, JsonDict]] = {
    "clip": _CLIP,
    "blip": {"square": True, "size": 384, "resample": 3, "image_mean": _CLIP_MEAN, "image_std": _CLIP_STD},
    "siglip": {"square": False, "size": {"height": 224, "width": 224}, "resample": 3}
    | {"image_mean": _HALF, "image_std": _HALF},
    "siglip2": {"square": True, "size": None, "resample": 2, "patch_size": 16, "max_num_patches": 256}
    | {"image_mean": _HALF, "image_std": _HALF},
    "llava": _CLIP,
    "llavanext": {**_CLIP, "do_pad": None, "image_grid_pinpoints": tiles.GRIDS},
    "vit": {"square": True, "size": 224, "resample": 2, "image_mean": _HALF, "image_std": _HALF},
}


def spec_from_transformers(config: JsonMapping) -> ImageSpec:
    """The spec in a `preprocessor_config.json` of the CLIP, BLIP, SigLIP (NaFlex too) or ViT kind.

    Raises CheckpointError for a processor, or a form of size, crop or filter, that is not known.
    """
    inner = config.get("image_processor")
    config = cast("JsonMapping", inner) if isinstance(inner, Mapping) else config
    kind = str(
        config.get("image_processor_type") or config.get("feature_extractor_type") or "CLIPImageProcessor"
    )
    family = re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor|Processor)$", "", kind).lower()
    if family not in _FAMILIES:
        raise CheckpointError(
            f"preprocessor_config.json: image processor {kind!r} is not known; known: CLIP, Blip, "
            "Siglip, Siglip2, Llava, LlavaNext, ViT"
        )
    get = {**_FAMILIES[family], **{key: value for key, value in config.items() if value is not None}}.get
    tiled = family == "llavanext"  # whose do_pad is about batches
    if get("do_pad") and family not in ("llava", "llavanext"):
        raise CheckpointError("preprocessor_config.json: do_pad is not supported; set it to false")
    flexible = family == "siglip2"
    size = (
        _size("size", get("size"), bool(get("default_to_square", get("square"))))
        if get("do_resize", True) and not flexible
        else None
    )
    crop = _size("crop_size", get("crop_size"), True) if get("do_center_crop", False) else None
    if isinstance(crop, int):
        raise CheckpointError("preprocessor_config.json: crop_size must have a height and a width")
    normal = get("do_normalize", True)
    return ImageSpec(
        shortest_edge=size if isinstance(size, int) else None,
        resize=size if isinstance(size, tuple) else None,
        crop=crop,
        interpolation=_interpolation(get("resample")),
        scale=_number("rescale_factor", get("rescale_factor", 1 / 255)) if get("do_rescale", True) else 1.0,
        mean=_triple("image_mean", get("image_mean")) if normal else (0.0, 0.0, 0.0),
        std=_triple("image_std", get("image_std"), positive=True) if normal else (1.0, 1.0, 1.0),
        patches=_patches(get("patch_size"), get("max_num_patches")) if flexible else None,
        tiles=_tiles(get("image_grid_pinpoints"), size, crop) if tiled else (),
        square=_colour(get("image_mean")) if get("do_pad") and family == "llava" else None,
    )


def spec_to_transformers(spec: ImageSpec, processor: str) -> JsonDict:
    """A `preprocessor_config.json` that says `spec`, for a class such as "CLIPImageProcessor"; the inverse."""
    config: JsonDict = {
        "image_processor_type": processor,
        "do_convert_rgb": True,
        "do_resize": spec.shortest_edge is not None or spec.resize is not None,
        "resample": int(resample.FILTERS[spec.interpolation]),
        "do_center_crop": spec.crop is not None,
        "do_rescale": spec.scale != 1.0,
        "rescale_factor": spec.scale,
        "do_normalize": spec.mean != (0.0, 0.0, 0.0) or spec.std != (1.0, 1.0, 1.0),
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }
    if spec.patches is not None:
        sizes = {"patch_size": spec.patches[0], "max_num_patches": spec.patches[1]}
        config |= {"image_processor_type": "Siglip2ImageProcessor", "do_resize": True, **sizes}
    elif spec.shortest_edge is not None:
        config["size"] = {"shortest_edge": spec.shortest_edge}
    elif spec.resize is not None:
        config["size"] = {"height": spec.resize[0], "width": spec.resize[1]}
    if spec.tiles:
        config |= {"image_processor_type": "LlavaNextImageProcessor", "do_pad": True}
        config["image_grid_pinpoints"] = [list(grid) for grid in spec.tiles]
    if spec.square is not None:
        config |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    if spec.crop is not None:
        config["crop_size"] = {"height": spec.crop[0], "width": spec.crop[1]}
    return config


def spec_from_open_clip(preprocess_cfg: JsonMapping, image_size: int | Sequence[int]) -> ImageSpec:
    """The spec in the `preprocess_cfg` of an `open_clip_config.json`; `image_size` is the vision tower's.

    Raises CheckpointError for a resize mode or filter that is not known.
    """
    size = preprocess_cfg.get("size") or image_size
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    mode = preprocess_cfg.get("resize_mode") or "shortest"
    if mode not in ("shortest", "squash") or (mode == "shortest" and height != width):
        raise CheckpointError(
            f"open_clip_config.json: resize_mode {mode!r} at {height} x {width} is not supported; "
            "supported: 'squash', and 'shortest' where height and width are equal"
        )
    return ImageSpec(
        shortest_edge=height if mode == "shortest" else None,
        resize=(height, width) if mode == "squash" else None,
        crop=(height, width) if mode == "shortest" else None,
        interpolation=_interpolation(preprocess_cfg.get("interpolation") or "bicubic"),
        mean=_triple("mean", preprocess_cfg.get("mean") or _CLIP_MEAN),
        std=_triple("std", preprocess_cfg.get("std") or _CLIP_STD, positive=True),
    )


def preprocess(
    source: ImageSource,
    spec: ImageSpec,
    *,
    mode: Literal["exact", "fast"] = "exact",
    limits: Limits = _NO_LIMITS,
) -> Pixels:
    """Decode, turn upright, resize, crop: uint8 [3, H, W].

    "exact" equals Pillow's resize in every bit. "fast" may be off by 1 of 255, in few values (real photographs: under
    0.1 %; 1 % at most), and imports torch. A Pixels is returned as it is.

    Raises ImageError; beyond `limits.max_pixels` also for the resized image, unless a crop needs only a part of it.
    """
    if mode not in ("exact", "fast"):
        raise UsageError(f"mode={mode!r}: must be 'exact' or 'fast'")
    if isinstance(source, Pixels):
        return source
    name = decode.name_of(source)
    try:
        if spec.interpolation != "nearest" and _torch_helps(mode) and resample.order_is_known():
            array = decode.decode_packed(source, limits)
            size = (array.shape[0], array.shape[1])
            array = _squared(name, array, spec, limits)
            exact = mode == "exact"
            return Pixels(
                name, _each(size, spec, lambda part: _resize_words(name, array, part, limits, exact)), size
            )
        image = decode.decode(source, limits)
        size = (image.height, image.width)
        if spec.square is not None:
            image = Image.fromarray(_squared(name, np.asarray(image), spec, limits))
        return Pixels(name, _each(size, spec, lambda part: _resize(name, image, part, limits)), size)
    except MemoryError:
        raise ImageError(name, "needs too much memory") from None
    except RuntimeError as error:  # torch's way of running out of memory
        if "allocate memory" not in str(error):
            raise
        raise ImageError(name, "needs too much memory") from None


def _each(
    size: tuple[int, int], spec: ImageSpec, resize: Callable[[ImageSpec], NDArray[np.uint8]]
) -> NDArray[np.uint8]:
    """The image resized; with tiles the whole one, and its tiles below it."""
    if not spec.tiles or spec.crop is None:
        return resize(spec)
    grid, plain = tiles.best_grid(size, spec.tiles), replace(spec, tiles=(), shortest_edge=None, crop=None)
    large = resize(replace(plain, resize=tiles.fitted(size, grid)))
    return np.concatenate(
        [resize(replace(plain, resize=spec.crop)), tiles.cut(large, grid, spec.crop[0])], axis=1
    )


def _squared(name: str, array: NDArray[np.uint8], spec: ImageSpec, limits: Limits) -> NDArray[np.uint8]:
    """uint8 [H, W, C] in the middle of a square of the spec's colour; an odd row goes below, a column to the right."""
    height, width, channels = array.shape
    side = max(height, width)
    if spec.square is None or height == width:
        return array
    if side * side > limits.max_pixels:
        raise ImageError(name, f"{side} x {side} pixels as a square, over the limit of {limits.max_pixels}")
    whole = np.empty((side, side, channels), np.uint8)
    whole[:] = (*spec.square, 0)[:channels]
    top, left = (side - height) // 2, (side - width) // 2
    whole[top : top + height, left : left + width] = array
    return whole


def _torch_helps(mode: str) -> bool:
    """torch resizes to the same bits sooner, but is not worth importing for that."""
    return mode == "fast" or "torch" in sys.modules


def normalize(
    batch: torch.Tensor | Sequence[Pixels],
    spec: ImageSpec,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """(v * scale - mean) / std of uint8 [B, 3, H, W], or of B equally large Pixels: float32 [B, 3, H, W].

    The bits are those of the reference: the product in float64, rounded to float32, the rest in float32. `dtype`
    converts at the end. A tensor stays on its device unless another is given; Pixels go to `device` or the CPU.

    Raises UsageError if shapes or dtypes do not fit.
    """
    import torch

    if not isinstance(batch, torch.Tensor):
        batch = _stack(batch)
    if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1] != 3:
        raise UsageError(f"batch: wanted uint8 [B, 3, H, W], got {batch.dtype} {list(batch.shape)}")
    batch = batch.to(batch.device if device is None else device, non_blocking=True)
    how, table, scale, mean, std = _arithmetic(spec, batch.device)
    out = torch.empty(batch.shape, dtype=torch.float32, device=batch.device)
    step = (
        1 if batch.device.type == "cpu" else max(1, len(batch))
    )  # one image at a time stays in the CPU's cache
    for start in range(0, len(batch), step):
        part, into = batch[start : start + step], out[start : start + step]
        if how == "table":
            for channel in range(3):
                into[:, channel] = table[channel][part[:, channel].long()]
        else:
            torch.mul(part, scale, out=into) if how == "multiply" else torch.div(part, scale, out=into)
            into.sub_(mean).div_(std)
    return out if dtype is None else out.to(dtype)


def _stack(batch: Sequence[Pixels]) -> torch.Tensor:
    import torch

    if not batch:
        raise UsageError("batch: empty; at least one image is needed")
    shapes = {pixels.values.shape for pixels in batch}
    if len(shapes) > 1:
        raise UsageError(f"batch: images of different shapes {sorted(shapes)}; crop or stretch them to one")
    return torch.from_numpy(np.stack([pixels.values for pixels in batch]))


@lru_cache(maxsize=64)
def _arithmetic(spec: ImageSpec, device: torch.device) -> tuple[str, Any, Any, Any, Any]:
    """The quickest way to the reference's bits, tried on all 256 values x 3 channels on the device itself.

    Returns "multiply", "divide" (by 1 / scale) or "table"; the table [3, 256]; the factor; mean and std [3, 1, 1].
    """
    import torch

    mean, std = (np.asarray(values, np.float32)[:, None] for values in (spec.mean, spec.std))
    table = ((np.arange(256, dtype=np.float64) * spec.scale).astype(np.float32) - mean) / std
    wanted = torch.from_numpy(table).to(device)
    mean_tensor, std_tensor = (torch.from_numpy(values)[:, :, None].to(device) for values in (mean, std))
    every = torch.arange(256, dtype=torch.uint8, device=device).expand(3, 1, 256)
    # Tensors, not numbers: dividing by a number multiplies by its inverse on some devices.
    scale = torch.tensor(spec.scale, dtype=torch.float32, device=device)
    inverse = torch.tensor(1 / spec.scale if spec.scale else math.nan, dtype=torch.float32, device=device)
    for how, factor, first in (("multiply", scale, torch.mul), ("divide", inverse, torch.div)):
        tried = first(every, factor).sub_(mean_tensor).div_(std_tensor)
        if tried.dtype == torch.float32 and torch.equal(tried.view(3, 256), wanted):
            return how, wanted, factor, mean_tensor, std_tensor
    return "table", wanted, scale, mean_tensor, std_tensor


def _resize(name: str, image: Image.Image, spec: ImageSpec, limits: Limits) -> NDArray[np.uint8]:
    """uint8 [3, H, W], by Pillow."""
    window = _window(image.size, spec)
    if _is_strip(window, spec):
        values = resample.exact_window(np.asarray(image), window, spec.interpolation)
    else:
        _check_resized(name, window, limits)
        values = resample.exact(image, window, spec.interpolation)
    # a copy, always: [H, W, 3] from Pillow is read-only
    return _pad(np.array(values.transpose(2, 0, 1), order="C"), spec)


def _resize_words(
    name: str, array: NDArray[np.uint8], spec: ImageSpec, limits: Limits, last_exact: bool
) -> NDArray[np.uint8]:
    """uint8 [H, W, 4] to uint8 [3, H, W], by torch where it can."""
    window = _window((array.shape[1], array.shape[0]), spec)
    values = None
    if not _is_strip(window, spec):
        _check_resized(name, window, limits)
        if array.shape[0] * array.shape[1] <= _TORCH_UP_TO:
            values = resample.through_torch(array, window, spec.interpolation, last_exact)
    if values is None:
        return _resize(name, Image.fromarray(np.ascontiguousarray(array[:, :, :3])), spec, limits)
    return _pad(values, spec)


def _is_strip(window: resample.Window, spec: ImageSpec) -> bool:
    """Whether the whole resized image is too large to make for the crop that is wanted of it."""
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


def _window(size: tuple[int, int], spec: ImageSpec) -> resample.Window:
    """The part of the resized image that the crop keeps; size is (width, height)."""
    width, height = size
    if spec.resize is not None:
        height, width = spec.resize
    elif spec.patches is not None:
        height, width = _whole_patches(height, width, *spec.patches)
    elif spec.shortest_edge is not None:
        edge = spec.shortest_edge
        # float arithmetic and truncation as the reference has them
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


def _whole_patches(height: int, width: int, side: int, most: int) -> tuple[int, int]:
    """The largest size in whole patches, each side rounded up, that has `most` patches at most.

    By halving, 24 times, the interval of scales, as the reference does: its last bits decide ties.
    """

    def scaled(length: int, scale: float) -> int:
        return max(side, math.ceil(length * scale / side) * side)

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        fits = (scaled(height, middle) / side) * (scaled(width, middle) / side) <= most
        low, high = (middle, high) if fits else (low, middle)
    return scaled(height, low), scaled(width, low)


def _pad(values: NDArray[np.uint8], spec: ImageSpec) -> NDArray[np.uint8]:
    """Black around an image [3, H, W] smaller than the crop; an odd row or column goes above or to the left."""
    if spec.crop is None or values.shape[1:] == spec.crop:
        return values
    high, wide = (wanted - there for wanted, there in zip(spec.crop, values.shape[1:], strict=True))
    return np.pad(values, ((0, 0), (high - high // 2, high // 2), (wide - wide // 2, wide // 2)))


def _tiles(
    grids: Any, size: int | tuple[int, int] | None, crop: tuple[int, int] | None
) -> tuple[tuple[int, int], ...]:
    """The resolutions at which images are cut into tiles of `crop`."""
    side = crop[0] if crop is not None else 0
    try:
        found = tuple((int(height), int(width)) for height, width in grids)
    except (TypeError, ValueError):
        found = ()
    fits = all(length > 0 and length % side == 0 for grid in found for length in grid) if side else False
    if not found or not fits or crop != (side, side) or size not in (side, (side, side)):
        raise CheckpointError(
            f"preprocessor_config.json: image_grid_pinpoints = {grids!r} with size {size} and crop_size {crop} is not "
            "supported; wanted resolutions in whole squares of one size"
        )
    return found


def _size(key: str, value: Any, square: bool) -> int | tuple[int, int]:
    """A shortest edge, or (height, width)."""
    match value:
        case int() if not isinstance(value, bool) and value > 0:
            return (value, value) if square else value
        case {"shortest_edge": int(edge), **rest} if edge > 0 and not any(rest.values()):
            return edge
        case {"height": int(height), "width": int(width), **rest} if height > 0 < width and not any(
            rest.values()
        ):
            return height, width
        case [int(height), int(width)] if height > 0 < width:
            return height, width
        case _:
            raise CheckpointError(
                f"preprocessor_config.json: {key} = {value!r} is not known; "
                'known: a number, {"shortest_edge"}, {"height", "width"}'
            )


def _patches(side: Any, most: Any) -> tuple[int, int]:
    if not isinstance(side, int) or not isinstance(most, int) or min(side, most) < 1:
        raise CheckpointError(
            f"preprocessor_config.json: patch_size = {side!r}, max_num_patches = {most!r}; wanted two numbers above 0"
        )
    return side, most


def _interpolation(value: Any) -> Interpolation:
    for name, code in resample.FILTERS.items():
        if value == name or (isinstance(value, int) and value == int(code)):
            return name
    known = ", ".join(f"{int(code)} ({name})" for name, code in resample.FILTERS.items())
    raise CheckpointError(f"preprocessing: resample filter {value!r} is not known; known: {known}")


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"preprocessing: {key} = {value!r}; wanted a finite number")
    return float(value)


def _colour(mean: Any) -> tuple[int, int, int]:
    """The colour that an image is made square with: its processor's mean."""
    red, green, blue = (int(255 * value) for value in _triple("image_mean", mean))
    if min(red, green, blue) < 0 or max(red, green, blue) > 255:
        raise CheckpointError(f"preprocessor_config.json: image_mean = {mean!r} with do_pad; wanted 0 to 1")
    return red, green, blue


def _triple(key: str, value: Any, positive: bool = False) -> tuple[float, float, float]:
    values = cast("Sequence[Any]", value) if isinstance(value, list | tuple) else [value] * 3
    if len(values) != 3:
        raise CheckpointError(f"preprocessing: {key} = {value!r}; wanted three numbers, one per channel")
    red, green, blue = (_number(key, item) for item in values)
    if positive and min(red, green, blue) <= 0:
        raise CheckpointError(f"preprocessing: {key} = {value!r}; wanted numbers above 0")
    return red, green, blue
