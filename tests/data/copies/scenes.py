"""Random images with the spectrum of photographs, and what is done to copies of images."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageEnhance, ImageOps


@cache
def scene(seed: int, side: int = 96) -> Image.Image:
    """Noise whose amplitude falls as 1 / frequency, RGB."""
    noise = np.random.default_rng(seed).normal(size=(3, side, side))
    y, x = np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)
    smooth = np.fft.ifft2(np.fft.fft2(noise) / (np.hypot(y, x) + 1 / side)).real
    low, high = smooth.min(), smooth.max()
    return Image.fromarray(((smooth - low) / (high - low) * 255).astype(np.uint8).transpose(1, 2, 0))


def encoded(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def cropped(image: Image.Image, share: float, left: float = 0.3, top: float = 0.8) -> Image.Image:
    """A crop of a share of both sides; left and top: where, 0 to 1."""
    w, h = image.size
    x, y = round(w * (1 - share) * left), round(h * (1 - share) * top)
    return image.crop((x, y, x + round(w * share), y + round(h * share)))


# Of the issue: what must be found.
COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG of quality 30": lambda im: encoded(im, "JPEG", quality=30),
    "half size": lambda im: encoded(im.resize((im.width // 2, im.height // 2))),
    "25 % brighter": lambda im: encoded(ImageEnhance.Brightness(im).enhance(1.25)),
    "gray": lambda im: encoded(im.convert("L")),
    "crop of 95 %": lambda im: encoded(cropped(im, 0.95)),
    "crop of 90 %": lambda im: encoded(cropped(im, 0.9, 0.0, 1.0)),
    "mirrored": lambda im: encoded(ImageOps.mirror(im)),
    "upside down": lambda im: encoded(ImageOps.flip(im)),
    "turned by 90": lambda im: encoded(im.transpose(Image.Transpose.ROTATE_90)),
    "turned by 180": lambda im: encoded(im.transpose(Image.Transpose.ROTATE_180)),
    "turned by 270": lambda im: encoded(im.transpose(Image.Transpose.ROTATE_270)),
    "mirrored, cropped, JPEG": lambda im: encoded(ImageOps.mirror(cropped(im, 0.95)), "JPEG", quality=50),
}
