"""Boxes and masks as PaliGemma writes them: `<loc0123><loc0045><loc0900><loc1000> cat ; <loc0001>...`.

Four places, top, left, bottom and right, each in 1/1024 of the image's height or width; for a segment sixteen words
of its mask (`<seg012>`...) after them; then the label, up to a `;`. What is malformed is stepped over as the published
reader does (Beyer et al. 2024, arXiv 2407.07726, section 3.2.4; big_vision's demonstration).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

BINS, WORDS = 1024, 16
_OBJECT = re.compile(rf"((?:<loc\d{{4}}>){{4}})\s*((?:<seg\d{{3}}>){{{WORDS}}})?\s*([^;<>]*)")
_NUMBER = re.compile(r"\d+")


class LocationSpan(NamedTuple):
    """One object of a text. bins: top, left, bottom, right, as they stand there; segments: of its mask, or ().

    span: the characters of the text, from and to, that say it.
    """

    label: str
    bins: tuple[int, int, int, int]
    segments: tuple[int, ...]
    span: tuple[int, int]


def parse_locations(text: str) -> list[LocationSpan]:
    """The objects of a text, in its order. A line's end outside of an object ends the reading."""
    found: list[LocationSpan] = []
    at = 0
    while (match := _OBJECT.search(text, at)) and "\n" not in text[at : match.start()]:
        top, left, bottom, right = map(int, _NUMBER.findall(match[1]))
        segments = tuple(map(int, _NUMBER.findall(match[2] or "")))
        found.append(LocationSpan(match[3].strip(), (top, left, bottom, right), segments, match.span()))
        at = match.end()
    return found


def box_from_bins(place: LocationSpan, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) in pixels of an image of (height, width); corners that are crossed are put in order,
    what lies outside is cut off."""
    height, width = size
    top, left, bottom, right = (min(place, BINS) / BINS for place in place.bins)
    across, down = sorted((left * width, right * width)), sorted((top * height, bottom * height))
    return (across[0], down[0], across[1], down[1])


def format_locations(
    things: Sequence[tuple[str, tuple[float, float, float, float]]], size: tuple[int, int]
) -> list[str]:
    """What `places` and `box_of` read back: a piece for each thing, a label and a box in pixels of an image of
    (height, width); joined they are the text. Edges go to the nearest place, the last one short of the far side."""
    height, width = size
    found: list[str] = []
    for label, (left, top, right, bottom) in things:
        shares = (top / height, left / width, bottom / height, right / width)
        words = "".join(f"<loc{min(max(round(share * BINS), 0), BINS - 1):04d}>" for share in shares)
        found.append(f"{' ; ' if found else ''}{words} {label}")
    return found
