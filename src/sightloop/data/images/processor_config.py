"""Image preprocessing configs: `preprocessor_config.json` of transformers and open_clip's, to and from ImageSpec."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Final, cast

from sightloop.data.images import resample, tiles
from sightloop.errors import CheckpointError
from sightloop.types import ImageSpec, Interpolation, JsonDict, JsonMapping, Size

_CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)
_HALF: Final = (0.5, 0.5, 0.5)

_CLIP: Final[JsonDict] = {
    "square": False,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": 224,
    "image_mean": _CLIP_MEAN,
    "image_std": _CLIP_STD,
}
# Defaults of each image processor for keys that its config leaves out. `square`: whether a bare `size: 224` is the
# height and width, or else the shortest edge.
_DEFAULTS: Final[dict[str, JsonDict]] = {
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


def spec_from_transformers(config: JsonMapping, processor: str = "CLIPImageProcessor") -> ImageSpec:
    """Preprocessing of a `preprocessor_config.json` of CLIP, BLIP, SigLIP, SigLIP 2 (NaFlex), LLaVA or ViT.

    Settings that the reference's processor ignores are ignored.

    Args:
        config: Contents of the file.
        processor: Class of the processor if the file names none.

    Raises:
        CheckpointError: An unknown processor, or an unsupported size, crop, filter or padding.
    """
    inner = config.get("image_processor")
    config = cast("JsonMapping", inner) if isinstance(inner, Mapping) else config
    class_name = str(config.get("image_processor_type") or config.get("feature_extractor_type") or processor)
    family = re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor|Processor)$", "", class_name).lower()
    if family not in _DEFAULTS:
        raise CheckpointError(
            f"preprocessor_config.json: image processor {class_name!r} is not known; known: CLIP, Blip, "
            "Siglip, Siglip2, Llava, LlavaNext, ViT"
        )
    get = {**_DEFAULTS[family], **{key: value for key, value in config.items() if value is not None}}.get
    naflex = family == "siglip2"
    size = (
        _parse_size("size", get("size"), bool(get("default_to_square", get("square"))))
        if get("do_resize", True) and not naflex
        else None
    )
    crop = _parse_size("crop_size", get("crop_size"), True) if get("do_center_crop", False) else None
    if isinstance(crop, int):
        raise CheckpointError("preprocessor_config.json: crop_size must have a height and a width")
    _check_padding(get("do_pad"), get("pad_size"), crop or size, family)
    do_normalize = get("do_normalize", True)
    return ImageSpec(
        shortest_edge=size if isinstance(size, int) else None,
        resize=size if isinstance(size, tuple) else None,
        crop=crop,
        interpolation=_parse_interpolation(get("resample")),
        scale=_parse_number("rescale_factor", get("rescale_factor", 1 / 255))
        if get("do_rescale", True)
        else 1.0,
        mean=_parse_channels("image_mean", get("image_mean")) if do_normalize else (0.0, 0.0, 0.0),
        std=_parse_channels("image_std", get("image_std"), positive=True)
        if do_normalize
        else (1.0, 1.0, 1.0),
        patches=_parse_patches(get("patch_size"), get("max_num_patches")) if naflex else None,
        tiles=_parse_grids(get("image_grid_pinpoints"), size, crop) if family == "llavanext" else (),
        square=_padding_color(get("image_mean")) if get("do_pad") and family == "llava" else None,
    )


def spec_to_transformers(spec: ImageSpec, processor: str) -> JsonDict:
    """`preprocessor_config.json` of a spec, the inverse of `spec_from_transformers`.

    Args:
        spec: Preprocessing.
        processor: Class of the processor, such as "CLIPImageProcessor"; tiles, padding to squares and NaFlex imply
            their own.
    """
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
    """Preprocessing of an `open_clip_config.json`.

    Args:
        preprocess_cfg: The file's `preprocess_cfg`.
        image_size: Image size of the vision tower, for files without `size`.

    Raises:
        CheckpointError: An unsupported resize mode or an unknown filter.
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
        interpolation=_parse_interpolation(preprocess_cfg.get("interpolation") or "bicubic"),
        mean=_parse_channels("mean", preprocess_cfg.get("mean") or _CLIP_MEAN),
        std=_parse_channels("std", preprocess_cfg.get("std") or _CLIP_STD, positive=True),
    )


def _parse_grids(grids: object, size: int | Size | None, crop: Size | None) -> tuple[Size, ...]:
    """Resolutions that images are cut into tiles at; tiles are squares of the size `crop`."""
    side = crop[0] if crop is not None else 0
    try:
        pairs = tuple((int(height), int(width)) for height, width in cast("Sequence[Sequence[int]]", grids))
    except (TypeError, ValueError):
        pairs = ()
    divisible = side > 0 and all(length > 0 and length % side == 0 for pair in pairs for length in pair)
    if not pairs or not divisible or crop != (side, side) or size not in (side, (side, side)):
        raise CheckpointError(
            f"preprocessor_config.json: image_grid_pinpoints = {grids!r} with size {size} and crop_size {crop} is not "
            "supported; wanted resolutions in whole squares of one size"
        )
    return pairs


def _check_padding(do_pad: object, pad_size: object, size: int | Size | None, family: str) -> None:
    """Raises CheckpointError if padding changes the pixels.

    LLaVA pads images to squares before all else. LlavaNext's do_pad is about batches of unequal numbers of tiles. The
    other processors pad the images of a batch to the largest, or to pad_size: nothing to do where all have one size,
    as BLIP's published files have it (do_pad: true, size_divisor: 32, which no BLIP processor reads).
    """
    if not do_pad or family in ("llava", "llavanext", "siglip2"):
        return
    if not isinstance(size, tuple):
        raise CheckpointError("preprocessor_config.json: do_pad needs images of one size; set it to false")
    if pad_size is not None and _parse_size("pad_size", pad_size, True) != size:
        raise CheckpointError(
            f"preprocessor_config.json: pad_size = {pad_size!r} for images of {size}; remove it"
        )


def _parse_size(key: str, value: object, square: bool) -> int | Size:
    """A shortest edge, or (height, width).

    `224`: shortest edge, or (224, 224) if `square`. `{"shortest_edge": 224}`: 224. `{"height": 9, "width": 8}` and
    `[9, 8]`: (9, 8).
    """
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


def _parse_patches(side: object, max_patches: object) -> tuple[int, int]:
    if not isinstance(side, int) or not isinstance(max_patches, int) or min(side, max_patches) < 1:
        raise CheckpointError(
            f"preprocessor_config.json: patch_size = {side!r}, max_num_patches = {max_patches!r}; wanted two numbers "
            "above 0"
        )
    return side, max_patches


def _parse_interpolation(value: object) -> Interpolation:
    """A filter by its name or by Pillow's number."""
    for name, code in resample.FILTERS.items():
        if value == name or (isinstance(value, int) and value == int(code)):
            return name
    known = ", ".join(f"{int(code)} ({name})" for name, code in resample.FILTERS.items())
    raise CheckpointError(f"preprocessing: resample filter {value!r} is not known; known: {known}")


def _parse_number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"preprocessing: {key} = {value!r}; wanted a finite number")
    return float(value)


def _parse_channels(key: str, value: object, positive: bool = False) -> tuple[float, float, float]:
    """One number per channel, from three numbers or one."""
    values: list[object] = list(value) if isinstance(value, list | tuple) else [value] * 3
    if len(values) != 3:
        raise CheckpointError(f"preprocessing: {key} = {value!r}; wanted three numbers, one per channel")
    red, green, blue = (_parse_number(key, item) for item in values)
    if positive and min(red, green, blue) <= 0:
        raise CheckpointError(f"preprocessing: {key} = {value!r}; wanted numbers above 0")
    return red, green, blue


def _padding_color(mean: object) -> tuple[int, int, int]:
    """Color that LLaVA pads images to squares with: the processor's mean, in 0..255."""
    red, green, blue = (int(255 * value) for value in _parse_channels("image_mean", mean))
    if min(red, green, blue) < 0 or max(red, green, blue) > 255:
        raise CheckpointError(f"preprocessor_config.json: image_mean = {mean!r} with do_pad; wanted 0 to 1")
    return red, green, blue
