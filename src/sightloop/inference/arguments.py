"""Arguments of the verbs: one image or many, one text or many, pairs of both."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Hashable, Iterable, Sequence
from os import PathLike
from typing import TypeAlias

import numpy as np
from PIL import Image

from sightloop.errors import UsageError, refuse_string
from sightloop.types import ImageSource, Pixels, Video

VisualSource: TypeAlias = "ImageSource | Video"
ImageInput: TypeAlias = "VisualSource | Iterable[VisualSource]"
TextInput: TypeAlias = "str | Sequence[str]"


def as_images(images: ImageInput) -> Iterable[VisualSource]:
    """One image or video as a list of one; many as they come (an array of four dimensions is many)."""
    one = isinstance(images, (str, bytes, PathLike, Image.Image, Pixels, Video))
    if one or (isinstance(images, np.ndarray) and images.ndim <= 3):
        return [images]  # pyright: ignore[reportReturnType]
    if not isinstance(images, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(f"images={images!r}: give a path, bytes, an array or a PIL image, or a list of them")
    return images  # pyright: ignore[reportReturnType]


def as_strings(texts: TextInput, what: str) -> list[str]:
    """One string as a list of one. UsageError, naming `what`, for none or for what is no string."""
    if not isinstance(texts, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(f"{what}={texts!r}: give a string, or a list of strings")
    out = [texts] if isinstance(texts, str) else list(texts)
    if not out:
        raise UsageError(f"{what}: none were given")
    for text in out:
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"{what}: {text!r} is no string")
    return out


def as_list(texts: Sequence[str], what: str) -> list[str]:
    """Texts that are a list by their meaning, such as labels: a single string is refused.

    Args:
        texts: The texts.
        what: Their name, for messages: "labels".

    Raises:
        UsageError: A string, no text, or something that is no string.
    """
    refuse_string(what, texts)
    return as_strings(texts, what)


def prompts_from(prompts: list[str], start: int, count: int) -> list[str]:
    """The prompts of the images from `start`; one prompt serves all, too few are noticed at the end."""
    if len(prompts) == 1:
        return prompts * count
    if start + count > len(prompts):
        raise UsageError(f"prompt: {len(prompts)} prompts for more images; give one, or one an image")
    return prompts[start : start + count]


def as_pairs(images: ImageInput, texts: list[str], what: str) -> tuple[list[VisualSource], list[str]]:
    """Images and texts as pairs; a single one of either goes with all of the other.

    Raises:
        UsageError: their numbers differ; it names `what`.
    """
    sources = list(as_images(images))
    if len(sources) == 1:
        return sources * len(texts), texts
    if len(texts) == 1:
        return sources, texts * len(sources)
    if len(sources) != len(texts):
        raise UsageError(f"{len(sources)} images and {len(texts)} {what}: give as many, or one of either")
    return sources, texts


def duplicate_groups(images: Sequence[VisualSource]) -> list[list[int]]:
    """Indices of each distinct image, by first occurrence; equal paths and the same object are one image."""
    groups: dict[Hashable, list[int]] = {}
    for i, image in enumerate(images):
        key = os.fspath(image) if isinstance(image, (str, PathLike)) else id(image)
        key = image if isinstance(image, Video) else key
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def digest(data: bytes) -> int:
    """64-bit digest of an image's content, the key of its random draws; batches do not change them."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
