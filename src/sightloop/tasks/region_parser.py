"""Parsers of the regions in a generated text: location tokens -> boxes, polygons and quads in pixels.

Florence-2 writes `cat<loc_52><loc_332><loc_932><loc_774>`: a label and four bins, 0..999, of left, top, right and
bottom. Malformed regions are left out exactly as in `transformers` (`Florence2Processor.post_process_generation`).
PaliGemma's form is in `location_tokens`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from sightloop.tasks import location_tokens
from sightloop.types import Box, Size

Span: TypeAlias = tuple[int, int]  # from, to: characters of a text

BINS, _FAR = 1000, 10**6
_LOC, _PART = r"<loc_(\d+)>", r"(?:<loc_\d+>|<sep>|<poly>|</poly>)"
_BOX = re.compile(_LOC * 4)
_BOXES, _BARE_BOXES = re.compile(r"[^<]+(?:<loc_\d+>){4,}"), re.compile(r"(?:<loc_\d+>){4,}")
_CORNERS = re.compile(f"(?={_LOC * 8})")
_OUTLINES, _BARE_OUTLINES = re.compile(rf"[^<]+{_PART}{{4,}}"), re.compile(rf"{_PART}{{4,}}")
_OUTLINE, _ENCLOSED = re.compile(r"((?:<loc_\d+>)+)(?:<sep>|$)"), re.compile("<poly>(.*?)</poly>")
_ENDS = "<od>|</od>|<box>|</box>|<bbox>|</bbox>|<loc_"
_LABEL, _OUTLINE_LABEL = re.compile(rf"^\s*(.*?)(?={_ENDS})"), re.compile(rf"^\s*(.*?)(?={_ENDS}|<poly>)")

# Phrases that name no object: their boxes are left out (processor files of `transformers`).
IGNORED_PHRASES = frozenset(
    "it I me mine you your yours he him his she her hers they them their theirs one oneself we us our ours its myself "
    "yourself himself herself itself ourselves yourselves themselves this that these those who whom whose which what "
    "all another any anybody anyone anything each everybody everyone everything few many nobody none several some "
    "somebody someone something image images the a an lots".split()
) | {"each other", "one another", "the image", "a group", "other objects", "a set"}


class ParsedRegion(NamedTuple):
    """One region of a text.

    Args:
        label: "" if it has none.
        box: in pixels.
        polygons: in pixels, x and y in turn.
        spans: characters of its label and of its location tokens in the text.
        segments: codes of its mask, for a mask decoder (PaliGemma), or ().
    """

    label: str
    box: Box
    polygons: tuple[tuple[float, ...], ...] = ()
    spans: tuple[Span, ...] = ()
    segments: tuple[int, ...] = ()


def parse_boxes(text: str, size: Size) -> list[ParsedRegion]:
    """Labels, each with one or more boxes: `cat<loc_..>x4<loc_..>x4dog<loc_..>x4`."""
    return list(_labelled_boxes(text, size, _BOXES))


def parse_proposals(text: str, size: Size) -> list[ParsedRegion]:
    """Boxes alone; their label is ""."""
    return list(_labelled_boxes(text, size, _BARE_BOXES))


def parse_phrases(
    text: str, size: Size, ignored_phrases: frozenset[str] = IGNORED_PHRASES
) -> list[ParsedRegion]:
    """Phrases of a caption with their boxes, without `ignored_phrases`."""
    return list(_labelled_boxes(text, size, _BOXES, ignored_phrases))


def parse_quads(text: str, size: Size) -> list[ParsedRegion]:
    """Texts with four corners each, clockwise from the top left of the text, and their bounding box."""
    text = strip_special_tokens(text)
    out: list[ParsedRegion] = []
    position = 0
    # Each match of "(.+?)" and eight locations, in linear time: the text of a quad is what precedes it in its line.
    for match in _CORNERS.finditer(text):
        start = max(position, text.rfind("\n", position, match.start()) + 1)
        if start < match.start():
            position = match.end(8) + 1
            corners = _pixels([*map(_bin, match.groups())], size)
            label = text[start : match.start()].strip()
            spans = ((start, match.start()), (match.start(), position))
            out.append(ParsedRegion(label, bounding_box([corners]), (corners,), spans))
    return out


def parse_outlines(text: str, size: Size) -> list[ParsedRegion]:
    """Polygons without labels; `<sep>` separates the polygons of one object."""
    return list(_labelled_outlines(text, size, _BARE_OUTLINES))


def parse_boxes_or_outlines(text: str, size: Size) -> list[ParsedRegion]:
    """Labels with polygons if the text has a `<poly>`, else labels with boxes."""
    if "<poly>" in text:
        return list(_labelled_outlines(text, size, _OUTLINES))
    return parse_boxes(text, size)


def parse_location_tokens(text: str, size: Size) -> list[ParsedRegion]:
    """PaliGemma's boxes with labels, and segmentation tokens if there are any."""
    return [
        ParsedRegion(each.label, location_tokens.box_from_bins(each, size), (), (each.span,), each.segments)
        for each in location_tokens.parse_locations(text)
    ]


def parse_region_text(text: str, size: Size) -> list[ParsedRegion]:
    """Description of a box that was asked about, without the location tokens that the network may repeat after it.

    One region, the whole image; none if there are no words.
    """
    text = strip_special_tokens(text)
    words = re.sub(_LOC, "", text).strip()
    end = text.find("<loc_", 1)
    spans = ((0, end if end > 0 else len(text)),)
    return [ParsedRegion(words, (0.0, 0.0, float(size[1]), float(size[0])), spans=spans)] if words else []


PARSERS: dict[str, Callable[[str, Size], list[ParsedRegion]]] = {
    "boxes": parse_boxes,
    "proposals": parse_proposals,
    "phrases": parse_phrases,
    "quads": parse_quads,
    "outlines": parse_outlines,
    "anything": parse_boxes_or_outlines,
    "said": parse_region_text,
    "located": parse_location_tokens,
    "segments": parse_location_tokens,
}


def strip_special_tokens(text: str) -> str:
    """A text without BOS, EOS and padding."""
    return text.replace("<s>", "").replace("</s>", "").replace("<pad>", "")


def box_tokens(box: Box, size: Size) -> str:
    """Location tokens of a box in pixels: four of `<loc_0>` to `<loc_999>`."""
    height, width = size
    per_bin = np.array([width / BINS, height / BINS] * 2, dtype=np.float32)
    bins = np.floor(np.array(box, dtype=np.float32) / per_bin).clip(0, BINS - 1).astype(int)
    return "".join(f"<loc_{place}>" for place in bins.tolist())


def format_boxes(objects: Sequence[tuple[str, Box]], size: Size) -> list[str]:
    """Text of objects, one piece an object, which `parse_boxes` reads back.

    Args:
        objects: label and box in pixels.
        size: of the image.

    Returns:
        A piece for each object; joined they are the text. Objects of one label follow each other and share it.
    """
    pieces: list[str] = []
    for label in dict.fromkeys(label for label, _ in objects):
        boxes = [box_tokens(box, size) for name, box in objects if name == label]
        pieces += [label + boxes[0], *boxes[1:]]
    return pieces


# Formats of PARSERS that can be written, for training.
FORMATTERS: dict[str, Callable[[Sequence[tuple[str, Box]], Size], list[str]]] = {
    "boxes": format_boxes,
    "located": location_tokens.format_locations,
}


def plain_label(label: str) -> str:
    """A label without what would end it or split the text: angle brackets, semicolons, ends of lines."""
    return " ".join(re.sub("[<>;]", " ", label).split())


def bounding_box(polygons: Sequence[Sequence[float]]) -> Box:
    """Bounding box of all points; zeros if there are none."""
    across = [x for polygon in polygons for x in polygon[0::2]] or [0.0]
    down = [y for polygon in polygons for y in polygon[1::2]] or [0.0]
    return (min(across), min(down), max(across), max(down))


def confidence(spans: Sequence[Span], tokens: Sequence[Span], log_probs: Sequence[float]) -> float | None:
    """Score of a region, 0..1: geometric mean of the probabilities of its tokens; None if it has none.

    Args:
        spans: characters of its label and location tokens.
        tokens: characters of each token of the text.
        log_probs: log-probability of each token.
    """
    own = [
        value
        for (start, end), value in zip(tokens, log_probs, strict=True)
        if any(start < stop and begin < end for begin, stop in spans)
    ]
    return math.exp(sum(own) / len(own)) if own else None


def _labelled_boxes(
    text: str, size: Size, pattern: re.Pattern[str], ignored_phrases: frozenset[str] = frozenset()
) -> Iterator[ParsedRegion]:
    for match in pattern.finditer(strip_special_tokens(text)):
        label = _LABEL.search(match.group())
        if label is None or label.group().strip() in ignored_phrases:
            continue
        start = match.start()
        # As in `transformers`, characters that are not ASCII are dropped from labels of boxes.
        name = label.group().strip().encode("ascii", "ignore").decode("ascii")
        for box in _BOX.finditer(match.group()):
            left, top, right, bottom = _pixels([*map(_bin, box.groups())], size)
            spans = ((start, start + label.end()), (start + box.start(), start + box.end()))
            yield ParsedRegion(name, (left, top, right, bottom), spans=spans)


def _labelled_outlines(text: str, size: Size, pattern: re.Pattern[str]) -> Iterator[ParsedRegion]:
    for match in pattern.finditer(strip_special_tokens(text)):
        whole, start = match.group(), match.start()
        label = _OUTLINE_LABEL.search(re.sub(r"^<loc_\d+>", "", whole, count=1))
        if label is None:
            continue
        named = (start, start + label.end())
        things = [(0, whole)]
        if "<poly>" in whole and "</poly>" in whole:
            things = [(thing.start(1), thing.group(1)) for thing in _ENCLOSED.finditer(whole)]
        for at, thing in things:
            polygons: list[tuple[float, ...]] = []
            for outline in _OUTLINE.finditer(thing):
                bins = [*map(_bin, re.findall(_LOC, outline.group(1)))]
                polygons.append(_pixels(bins[: len(bins) // 2 * 2], size))
            if polygons:
                spans = (named, (start + at, start + at + len(thing)))
                yield ParsedRegion(label.group().strip(), bounding_box(polygons), tuple(polygons), spans)


def _bin(digits: str) -> int:
    """Number of a bin; a huge one, spelt by ordinary words, becomes `_FAR`."""
    return int(digits) if len(digits) < 7 else _FAR


def _pixels(bins: Sequence[int], size: Size) -> tuple[float, ...]:
    """Center of each bin in whole pixels, x and y in turn; in float32, as `transformers` rounds."""
    height, width = size
    per_bin = np.array([width / BINS, height / BINS] * (len(bins) // 2), dtype=np.float32)
    middles = np.array(bins, dtype=np.int64).astype(np.float32) + np.float32(0.5)
    return tuple((middles * per_bin).astype(np.int32).astype(float).tolist())
