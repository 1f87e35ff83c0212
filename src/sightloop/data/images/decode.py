"""Image decoder: bytes, files, PIL images and arrays to RGB, safe for untrusted input.

`decode` returns an RGB image or raises one `ImageError` with a one-line reason. Pixels equal
`PIL.ImageOps.exif_transpose(image).convert("RGB")` over a white background, except for 16-bit, 32-bit and float gray:
`convert` clips those to white, here they are scaled. Imports no torch.
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
from typing import Final

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
from sightloop.types import ImageSource, Limits, Pixels, Size

DEFAULT_LIMITS: Final = Limits()
OUT_OF_MEMORY: Final = "needs too much memory"
# Importing a plugin registers it with Pillow. `Image.open(formats=...)` tries no other plugin (EPS, PSD, ...).
# JpegImagePlugin reads MPO as well.
_PLUGINS: Final = {
    "JPEG": JpegImagePlugin,
    "PNG": PngImagePlugin,
    "WEBP": WebPImagePlugin,
    "GIF": GifImagePlugin,
    "BMP": BmpImagePlugin,
    "TIFF": TiffImagePlugin,
    "AVIF": AvifImagePlugin,
}
# EXIF orientation -> transpose that makes the image upright; 5 to 8 swap width and height.
_TRANSPOSES: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(source: ImageSource, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
    """Decode an image to mode RGB, upright by its EXIF orientation, transparency over white.

    Args:
        source: Path of a regular file, encoded bytes, PIL image, or array `[H, W]`, `[H, W, 1]`, `[H, W, 3]` or
            `[H, W, 4]` of uint8, uint16, bool or floats in 0..1.
        limits: `max_pixels` and `max_file_bytes` are enforced; time and memory are not.

    Raises:
        ImageError: Unreadable, damaged, truncated, not an image, or beyond `limits`.
    """
    image = _decode(source, limits)
    return image if isinstance(image, Image.Image) else Image.fromarray(image)


def decode_packed(source: ImageSource, limits: Limits = DEFAULT_LIMITS) -> NDArray[np.uint8]:
    """`decode` to uint8 `[H, W, 4]`: red, green, blue and an unused byte, so that a pixel is one 32-bit word."""
    image = _decode(source, limits, "RGBX")
    if not isinstance(image, Image.Image):
        if image.shape[2] == 4:
            return image
        image = Image.fromarray(image)
    values = np.frombuffer(bytearray(image.tobytes("raw", "RGBX")), np.uint8)
    return values.reshape(image.height, image.width, 4)


def upright_size(source: str | os.PathLike[str] | bytes, name: str = "") -> Size:
    """(height, width) of an image after EXIF rotation, from its header alone.

    Args:
        source: Path or encoded bytes.
        name: Name for the error message; by default the path or `<bytes>`.

    Raises:
        ImageError: The header cannot be read.
    """
    formats = (*_PLUGINS, "HEIF") if _heif_available() else tuple(_PLUGINS)
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with _silence_pillow(), Image.open(file, formats=formats) as image:
            width, height = image.size
            return (width, height) if _orientation(image) >= 5 else (height, width)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(name or source_name(source), f"its size cannot be read: {error}") from error


def source_name(source: ImageSource) -> str:
    """Name of an image source in messages: its path, or `<bytes>`, `<array>`, `<image>`."""
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
    name = source_name(source)
    data = b""
    try:
        match source:
            case Image.Image():
                _check_size(name, source.size, limits)
                with _silence_pillow():
                    return _upright_rgb(source)
            case np.ndarray():
                return _rgb_from_array(name, source, limits)
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
        return _decode_bytes(name, data, limits, layout)
    except ImageError:
        raise
    except Exception as error:  # decoders raise nearly any exception on hostile bytes
        raise ImageError(name, _failure_reason(error, data)) from error


def read_file(path: str, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """Bytes of a regular file; never blocks on a pipe or device.

    Raises:
        ImageError: Not a regular file, unreadable, or larger than `limits.max_file_bytes`.
    """
    try:
        _check_file(path, os.stat(path), limits)
        # Open without blocking and check again: the path may point to another file since the first check.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(path, flags), "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            _check_file(path, status, limits)
            data = file.read(min(status.st_size, limits.max_file_bytes) + 1)
            while data and (more := file.read(1 << 20)) and len(data) <= limits.max_file_bytes:
                data += more  # a file that grew, or a read that returned less than requested
    except FileNotFoundError:
        reason = "a broken symbolic link" if os.path.islink(path) else "no such file"
        if "://" in str(path):
            reason = "a URL is not read: download the image first, and name the file"
        raise ImageError(path, reason) from None
    except PermissionError:
        raise ImageError(path, "no permission to read it") from None
    except OSError as error:
        raise ImageError(path, f"cannot be read: {error.strerror or 'input/output error'}") from None
    except ValueError:
        raise ImageError(
            path, "not a file name: it has a zero byte or characters that a name cannot have"
        ) from None
    if len(data or b"") > limits.max_file_bytes:
        raise ImageError(path, f"larger than the limit of {limits.max_file_bytes} bytes")
    return data


def _check_file(path: str, status: os.stat_result, limits: Limits) -> None:
    mode = status.st_mode
    if stat.S_ISDIR(mode):
        raise ImageError(path, "a folder, not an image")
    if not stat.S_ISREG(mode):
        file_type = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise ImageError(path, f"{file_type}, not a regular file")
    if status.st_size > limits.max_file_bytes:
        raise ImageError(path, f"{status.st_size} bytes, over the limit of {limits.max_file_bytes}")


def _decode_bytes(name: str, data: bytes, limits: Limits, layout: str) -> Image.Image | NDArray[np.uint8]:
    if not data:
        raise ImageError(name, "an empty file")
    jpeg = headers.check_header(data, limits.max_pixels)
    if jpeg is not None:
        _check_size(name, (jpeg.width, jpeg.height), limits)
        array = _decode_jpeg_fast(data, jpeg, layout)
        if array is not None:
            return array
    formats = tuple(_PLUGINS)
    if headers.image_format(data) == "HEIF":
        if not _heif_available():
            raise ImageError(name, 'HEIC needs one more package: pip install "sightloop[heif]"')
        formats = (*formats, "HEIF")
    with _silence_pillow(), Image.open(io.BytesIO(data), formats=formats) as image:
        _check_size(name, image.size, limits)
        image.load()
        _check_size(name, image.size, limits)
        return _upright_rgb(image)


def _decode_jpeg_fast(data: bytes, jpeg: headers.JpegHeader, layout: str) -> NDArray[np.uint8] | None:
    """Decode a standard JPEG with libjpeg-turbo: uint8 `[H, W, 3 or 4]`, the bits of Pillow; None leaves it to Pillow.

    Args:
        data: The file.
        jpeg: Its header.
        layout: "RGB" or "RGBX".
    """
    if not jpeg.is_standard or jpeg.components not in (1, 3) or jpeg.orientation is None:
        return None
    try:
        array: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, layout, strict=True)
    except ValueError:  # strict: any warning of the decoder, also of truncation, leaves the file to Pillow
        return None
    if array.shape[:2] != (jpeg.height, jpeg.width):
        return None
    transpose = _TRANSPOSES.get(jpeg.orientation)
    if transpose is None:
        return array
    return np.array(Image.fromarray(array[:, :, :3]).transpose(transpose))


@cache
def _heif_available() -> bool:
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
    transpose = _TRANSPOSES.get(_orientation(image))
    if transpose is not None:
        image = image.transpose(transpose)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_scale_gray(np.asarray(image)))
    elif image.mode in ("La", "RGBa"):  # premultiplied: there is no direct way to RGB
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        # Over white, like the reference processors.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises many types on damaged EXIF; the image is then not rotated
        return 1


def _scale_gray(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Scale gray `[H, W]` of more than 8 bits to uint8.

    16-bit: 0..65535. 32-bit integer: 0..255 or 0..65535, whichever holds all values. Float: 0..1 or 0..255 likewise.
    With values outside those ranges: the range from smallest to largest value.
    """
    if values.dtype.itemsize == 2:
        return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    gray = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(gray.min()), float(gray.max())
    if low < 0 or high > 65535 or (high > 255 and values.dtype.kind == "f"):
        gray, high = gray - low, high - low
    elif values.dtype.kind == "f":
        high = 1.0 if high <= 1.0 else 255.0
    else:
        high = 255.0 if high <= 255.0 else 65535.0
    return np.floor(gray * (255.0 / (high or 1.0)) + 0.5).astype(np.uint8)


def _rgb_from_array(name: str, array: NDArray[np.generic], limits: Limits) -> NDArray[np.uint8]:
    """uint8 `[H, W, 3]` of an array `[H, W]` or `[H, W, 1 | 3 | 4]`."""
    shape = "x".join(map(str, array.shape))
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ImageError(name, f"an array of shape {shape}; wanted [H, W] or [H, W, 1|3|4], channels last")
    _check_size(name, (array.shape[1], array.shape[0]), limits)
    if array.dtype == np.bool_:
        pixels = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype == np.uint16:
        pixels = _scale_gray(array)
    elif array.dtype.kind == "f":
        floats = array.astype(np.float32)
        if not (floats.min() >= 0 and floats.max() <= 1):  # NaN fails too
            raise ImageError(name, "a float array must hold values in 0..1, without NaN")
        pixels = np.floor(floats * np.float32(255) + np.float32(0.5)).astype(np.uint8)
    elif array.dtype == np.uint8:
        pixels = array.astype(np.uint8, copy=False)
    else:
        raise ImageError(name, f"an array of {array.dtype}; wanted uint8, uint16, bool or float in 0..1")
    if pixels.shape[2] == 4:  # over white, in the arithmetic of the reference
        alpha = pixels[:, :, 3:] / 255
        pixels = np.round(alpha * pixels[:, :, :3] + (1 - alpha) * 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _failure_reason(error: Exception, data: bytes) -> str:
    """One-line reason for an exception of a decoder, without paths and object addresses."""
    text = str(error)
    if isinstance(error, headers.HeaderError):
        return text
    if isinstance(error, MemoryError):
        return OUT_OF_MEMORY
    if isinstance(error, RecursionError):
        return "damaged: nested too deeply"
    if isinstance(error, Image.DecompressionBombError):
        pixels = re.search(r"\d+", text)  # Pillow's own limit is higher than the default of max_pixels
        count = pixels.group() if pixels else "too many"
        return f"{count} pixels, over the limit (and over PIL.Image.MAX_IMAGE_PIXELS)"
    file_format = headers.image_format(data)
    if data and not file_format:
        return headers.unknown_format_reason(data)
    if isinstance(error, EOFError) or "truncated" in text.lower() or headers.is_truncated(data):
        return "cut short: the file ends before the image does"
    if not text or isinstance(error, Image.UnidentifiedImageError):
        return f"damaged: it starts like {file_format}, but its header cannot be read"
    line = re.sub(r"[^\x21-\x7e]+", " ", re.sub(r"<[^>]*>|(?<!\S)/\S+", "", text)).strip()
    return f"damaged {file_format or 'image'}: {line[:120]}"


# Pillow warns about odd metadata and large images. `warnings.catch_warnings` is not thread-safe, so one filter for
# Pillow's modules is in the list of filters while any thread decodes.
_PILLOW_FILTER: Final = ("ignore", None, Warning, re.compile(r"PIL\.|pillow_heif"), 0)
_filter_lock = threading.Lock()
_filter_users = 0


@contextlib.contextmanager
def _silence_pillow() -> Generator[None]:
    global _filter_users
    with _filter_lock:
        _filter_users += 1
        if isinstance(warnings.filters, list) and _PILLOW_FILTER not in warnings.filters:
            warnings.filters.insert(0, _PILLOW_FILTER)
    try:
        yield
    finally:
        with _filter_lock:
            _filter_users -= 1
            filters = warnings.filters
            if isinstance(filters, list) and _filter_users == 0 and _PILLOW_FILTER in filters:
                filters.remove(_PILLOW_FILTER)
