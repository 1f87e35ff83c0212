"""Bytes -> RGB: the one safe decoder.

Untrusted files may be anything: `decode` returns an RGB image or raises one `ImageError` with a one-line reason.
Pixels equal `PIL.ImageOps.exif_transpose(image).convert("RGB")`; only 16-bit, 32-bit and float grays differ, which that
would clip to white: they are scaled. Imports no torch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Generator
from functools import cache
from typing import Any, Final, cast

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from sightloop.data.images import headers
from sightloop.errors import ImageError
from sightloop.types import ImageSource, Limits, Pixels

EXTENSIONS: frozenset[str] = frozenset(
    (
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".gif",
        ".bmp",
        ".tif",
        ".tiff",
        ".avif",
        ".heic",
        ".heif",
    )
)
"""File endings of the images that `decode` reads (lower case, with the dot)."""

# Importing a plugin registers it with Pillow; no other plugin (EPS, PSD, ...) is ever asked. JPEG reads MPO as well.
_PLUGINS: Final = {
    "JPEG": JpegImagePlugin,
    "PNG": PngImagePlugin,
    "WEBP": WebPImagePlugin,
    "GIF": GifImagePlugin,
    "BMP": BmpImagePlugin,
    "TIFF": TiffImagePlugin,
    "AVIF": AvifImagePlugin,
}
_NO_LIMITS: Final = Limits()
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(source: ImageSource, limits: Limits = _NO_LIMITS) -> Image.Image:
    """The image in mode RGB, turned upright as its EXIF orientation says.

    Paths must be regular files. Arrays are [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of uint8, uint16, bool or floats
    in 0..1. Transparency is dropped as `convert("RGB")` does, not painted over.

    Raises ImageError: unreadable, damaged, cut short, not an image, or beyond `limits`.
    """
    found = _decode(source, limits)
    return found if isinstance(found, Image.Image) else Image.fromarray(found)


def decode_packed(source: ImageSource, limits: Limits = _NO_LIMITS) -> NDArray[np.uint8]:
    """As `decode`, but uint8 `[H, W, 4]`: red, green, blue and a byte to ignore, so that a pixel is a 32-bit word."""
    found = _decode(source, limits, "RGBX")
    if not isinstance(found, Image.Image):
        if found.shape[2] == 4:
            return found
        found = Image.fromarray(found)
    return np.frombuffer(bytearray(found.tobytes("raw", "RGBX")), np.uint8).reshape(
        found.height, found.width, 4
    )


def upright_size(source: str | os.PathLike[str] | bytes, name: str = "") -> tuple[int, int]:
    """(height, width) after the EXIF turn, from the header alone. name: for the message. Raises ImageError."""
    formats = (*_PLUGINS, "HEIF") if _heif_is_here() else tuple(_PLUGINS)
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with _quiet(), Image.open(file, formats=formats) as image:
            width, height = image.size
            return (width, height) if _orientation(image) >= 5 else (height, width)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(name or name_of(source), f"its size cannot be read: {error}") from error


def name_of(source: ImageSource) -> str:
    """What messages call a source: its path as given, or `<bytes>`, `<array>`, `<image>`."""
    match source:
        case str():
            return source
        case bytes():
            return "<bytes>"
        case Image.Image():
            return "<image>"
        case Pixels():
            return source.name
        case os.PathLike():
            return os.fsdecode(source)
        case np.ndarray():
            return "<array>"
        case _:
            return f"<{type(source).__name__}>"


def _decode(source: ImageSource, limits: Limits, layout: str = "RGB") -> Image.Image | NDArray[np.uint8]:
    name = name_of(source)
    data = b""
    try:
        match source:
            case Image.Image():
                _check_size(name, source.size, limits)
                with _quiet():
                    return _upright_rgb(source)
            case np.ndarray():
                return _from_array(name, source, limits)
            case Pixels():
                raise ImageError(name, "already prepared: a Pixels cannot be decoded again")
            case bytes():
                data = source
                if len(data) > limits.max_file_bytes:
                    raise ImageError(name, f"larger than the limit of {limits.max_file_bytes} bytes")
            case str() | os.PathLike():
                data = read_file(os.fspath(source), limits)
            case _:
                raise ImageError(name, "not an image: give a path, bytes, a PIL image or a NumPy array")
        return _from_bytes(name, data, limits, layout)
    except ImageError:
        raise
    except Exception as error:  # decoders throw nearly everything on hostile bytes; the caller gets one kind
        raise ImageError(name, _reason(error, data)) from error


def read_file(path: str, limits: Limits = _NO_LIMITS) -> bytes:
    """The bytes of a regular file; never blocks on a pipe or device. Raises ImageError."""
    try:
        _check_file(path, os.stat(path), limits)
        # Non-blocking, and looked at once more: the name may point elsewhere by now.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(path, flags), "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            _check_file(path, status, limits)
            data = file.read(min(status.st_size, limits.max_file_bytes) + 1)
            while data and (more := file.read(1 << 20)) and len(data) <= limits.max_file_bytes:
                data += more  # a file that grew, or that gives less than asked for
    except FileNotFoundError:
        reason = "a link to nothing" if os.path.islink(path) else "no such file"
        raise ImageError(path, reason) from None
    except PermissionError:
        raise ImageError(path, "no permission to read it") from None
    except OSError as error:
        raise ImageError(path, f"cannot be read: {error.strerror or 'input/output error'}") from None
    except ValueError:
        raise ImageError(
            path, "not a file name: it holds a zero byte or characters that no name can"
        ) from None
    if len(data or b"") > limits.max_file_bytes:
        raise ImageError(path, f"larger than the limit of {limits.max_file_bytes} bytes")
    return data


def _check_file(path: str, status: os.stat_result, limits: Limits) -> None:
    mode = status.st_mode
    if stat.S_ISDIR(mode):
        raise ImageError(path, "a folder, not an image")
    if not stat.S_ISREG(mode):
        what = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise ImageError(path, f"{what}, not a regular file")
    if status.st_size > limits.max_file_bytes:
        raise ImageError(path, f"{status.st_size} bytes, over the limit of {limits.max_file_bytes}")


def _from_bytes(name: str, data: bytes, limits: Limits, layout: str) -> Image.Image | NDArray[np.uint8]:
    if not data:
        raise ImageError(name, "an empty file")
    jpeg = headers.check(data, limits.max_pixels)
    if jpeg is not None:
        _check_size(name, (jpeg.width, jpeg.height), limits)
        array = _fast_jpeg(data, jpeg, layout)
        if array is not None:
            return array
    formats = tuple(_PLUGINS)
    if headers.kind(data) == "HEIF":
        if not _heif_is_here():
            raise ImageError(name, 'HEIC needs one more package: pip install "sightloop[heif]"')
        formats = (*formats, "HEIF")
    with _quiet(), Image.open(io.BytesIO(data), formats=formats) as image:
        _check_size(name, image.size, limits)
        image.load()
        _check_size(name, image.size, limits)
        return _upright_rgb(image)


def _fast_jpeg(data: bytes, jpeg: headers.Jpeg, layout: str) -> NDArray[np.uint8] | None:
    """uint8 [H, W, 3 or 4] of an ordinary JPEG, the same bits as Pillow's and sooner; None leaves it to Pillow."""
    if not jpeg.plain or jpeg.components not in (1, 3) or jpeg.orientation is None:
        return None
    try:
        array = cast("NDArray[np.uint8]", simplejpeg.decode_jpeg(data, layout, strict=True))
    except ValueError:  # strict: any warning of the decoder, truncation too, is for Pillow to judge
        return None
    if array.shape[:2] != (jpeg.height, jpeg.width):
        return None
    turn = _TURNS.get(jpeg.orientation)
    if turn is None:
        return array
    return np.array(Image.fromarray(array[:, :, :3]).transpose(turn))


@cache
def _heif_is_here() -> bool:
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    import pillow_heif  # the optional extra

    pillow_heif.register_heif_opener()
    return True


def _check_size(name: str, size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(name, f"an image of {width} x {height} pixels")
    if width * height > limits.max_pixels:
        raise ImageError(name, f"{width} x {height} pixels, over the limit of {limits.max_pixels}")


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_scale_gray(np.asarray(image)))
    elif image.mode in ("La", "RGBa"):  # premultiplied: there is no direct way to RGB
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        # What shines through is white, as on paper and as the reference processors have it.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF, in any of the ways it can be, leaves a good image as it lies
        return 1


def _scale_gray(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Deep gray [H, W] to uint8: 16-bit by its full range; 32-bit and float by the range that the values suggest."""
    if values.dtype.itemsize == 2:
        return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    deep = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(deep.min()), float(deep.max())
    if low < 0 or high > 65535 or (high > 255 and values.dtype.kind == "f"):
        deep, high = deep - low, high - low
    elif values.dtype.kind == "f":
        high = 1.0 if high <= 1.0 else 255.0
    else:
        high = 255.0 if high <= 255.0 else 65535.0
    return np.floor(deep * (255.0 / (high or 1.0)) + 0.5).astype(np.uint8)


def _from_array(name: str, array: NDArray[Any], limits: Limits) -> NDArray[np.uint8]:
    shape = "x".join(map(str, array.shape))
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ImageError(name, f"an array of shape {shape}; wanted [H, W] or [H, W, 1|3|4], channels last")
    _check_size(name, (array.shape[1], array.shape[0]), limits)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype == np.uint16:
        array = _scale_gray(array)
    elif array.dtype.kind == "f":
        array = array.astype(np.float32)
        if not (array.min() >= 0 and array.max() <= 1):  # NaN fails too
            raise ImageError(name, "a float array must hold values in 0..1, without NaN")
        array = np.floor(array * np.float32(255) + np.float32(0.5)).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ImageError(name, f"an array of {array.dtype}; wanted uint8, uint16, bool or float in 0..1")
    if array.shape[2] == 4:  # over white, in the reference's arithmetic
        alpha = array[:, :, 3:] / 255
        array = np.round(alpha * array[:, :, :3] + (1 - alpha) * 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def _reason(error: Exception, data: bytes) -> str:
    """One plain line, without paths or object addresses, for whatever a decoder threw."""
    text = str(error)
    if isinstance(error, headers.HeaderError):
        return text
    if isinstance(error, MemoryError):
        return "needs too much memory"
    if isinstance(error, RecursionError):
        return "damaged: nested too deeply"
    if isinstance(error, Image.DecompressionBombError):
        pixels = re.search(r"\d+", text)  # Pillow's own limit, which stands above the default of max_pixels
        count = pixels.group() if pixels else "too many"
        return f"{count} pixels, over the limit (and over PIL.Image.MAX_IMAGE_PIXELS)"
    kind = headers.kind(data)
    if data and not kind:
        return headers.describe_unknown(data)
    if isinstance(error, EOFError) or "truncated" in text.lower() or headers.cut_short(data):
        return "cut short: the file ends before the image does"
    if not text or isinstance(error, Image.UnidentifiedImageError):
        return f"damaged: it starts like {kind}, but its header cannot be read"
    line = re.sub(r"[^\x21-\x7e]+", " ", re.sub(r"<[^>]*>|(?<!\S)/\S+", "", text)).strip()
    return f"damaged {kind or 'image'}: {line[:120]}"


# Pillow warns about odd metadata and large images. `warnings.catch_warnings` is not safe beside other threads, so one
# filter that silences Pillow's own modules stands in the list while any thread decodes.
_FILTER: Final = ("ignore", None, Warning, re.compile(r"PIL\.|pillow_heif"), 0)
_quiet_lock = threading.Lock()
_quiet_depth = 0


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    global _quiet_depth
    filters = cast("list[Any]", warnings.filters)
    with _quiet_lock:
        _quiet_depth += 1
        if _FILTER not in filters:
            filters.insert(0, _FILTER)
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
            filters = cast("list[Any]", warnings.filters)
            if _quiet_depth == 0 and _FILTER in filters:
                filters.remove(_FILTER)
