"""Location and segmentation tokens of PaliGemma: `<loc0123><loc0045><loc0900><loc1000> cat ; <loc0001>...`.

Four location tokens (top, left, bottom, right, in 1/1024 of the image's height or width); for a segment sixteen
segmentation tokens of its mask (`<seg012>`...); then the label, up to a `;`. Malformed objects are skipped as the
published reader does (Beyer et al. 2024, arXiv 2407.07726, section 3.2.4; big_vision's demo).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from sightloop.types import Box, Size

BINS, WORDS = 1024, 16
_OBJECT = re.compile(rf"((?:<loc\d{{4}}>){{4}})\s*((?:<seg\d{{3}}>){{{WORDS}}})?\s*([^;<>]*)")
_NUMBER = re.compile(r"\d+")


class LocationSpan(NamedTuple):
    """One object of a text.

    Args:
        label: the object's name.
        bins: top, left, bottom, right as written, 0..9999.
        segments: codes of its mask, 16 or none.
        span: first and last character (exclusive) of the object in the text.
    """

    label: str
    bins: tuple[int, int, int, int]
    segments: tuple[int, ...]
    span: tuple[int, int]


def parse_locations(text: str) -> list[LocationSpan]:
    """Objects of a text in order; reading stops at a line break between objects."""
    objects: list[LocationSpan] = []
    position = 0
    while (match := _OBJECT.search(text, position)) and "\n" not in text[position : match.start()]:
        top, left, bottom, right = map(int, _NUMBER.findall(match[1]))
        segments = tuple(map(int, _NUMBER.findall(match[2] or "")))
        objects.append(LocationSpan(match[3].strip(), (top, left, bottom, right), segments, match.span()))
        position = match.end()
    return objects


def box_from_bins(location: LocationSpan, size: Size) -> Box:
    """Box in pixels of an image of `size`; crossed corners are swapped, parts outside are cut off."""
    height, width = size
    top, left, bottom, right = (min(index, BINS) / BINS for index in location.bins)
    x, y = sorted((left * width, right * width)), sorted((top * height, bottom * height))
    return (x[0], y[0], x[1], y[1])


def format_locations(objects: Sequence[tuple[str, Box]], size: Size) -> list[str]:
    """Text of objects, one piece an object, which `parse_locations` and `box_from_bins` read back.

    Args:
        objects: label and box in pixels.
        size: of the image.

    Returns:
        A piece for each object; joined they are the text. Edges are rounded to the nearest bin, at most 1023.
    """
    height, width = size
    pieces: list[str] = []
    for label, (left, top, right, bottom) in objects:
        shares = (top / height, left / width, bottom / height, right / width)
        tokens = "".join(f"<loc{min(max(round(share * BINS), 0), BINS - 1):04d}>" for share in shares)
        pieces.append(f"{' ; ' if pieces else ''}{tokens} {label}")
    return pieces
