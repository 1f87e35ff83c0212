"""Regions in what a network writes: words of places -> boxes, outlines and turned boxes in pixels; and how sure it is.

Florence-2 writes `cat<loc_52><loc_332><loc_932><loc_774>`: a label and the bins, of 1,000 a side, of left, top, right
and bottom. What is malformed is left out exactly as the reference leaves it out (`transformers`,
`Florence2Processor.post_process_generation`). PaliGemma's own form is read in `location_strings`.
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
_QUAD = re.compile("(.+?)" + _LOC * 8)
_OUTLINES, _BARE_OUTLINES = re.compile(rf"[^<]+{_PART}{{4,}}"), re.compile(rf"{_PART}{{4,}}")
_OUTLINE, _ENCLOSED = re.compile(r"((?:<loc_\d+>)+)(?:<sep>|$)"), re.compile("<poly>(.*?)</poly>")
_ENDS = "<od>|</od>|<box>|</box>|<bbox>|</bbox>|<loc_"
_LABEL, _OUTLINE_LABEL = re.compile(rf"^\s*(.*?)(?={_ENDS})"), re.compile(rf"^\s*(.*?)(?={_ENDS}|<poly>)")

# Words that stand for no thing of their own: what is found for them is left out (the reference's processor files).
IGNORED_PHRASES = frozenset(
    "it I me mine you your yours he him his she her hers they them their theirs one oneself we us our ours its myself "
    "yourself himself herself itself ourselves yourselves themselves this that these those who whom whose which what "
    "all another any anybody anyone anything each everybody everyone everything few many nobody none several some "
    "somebody someone something image images the a an lots".split()
) | {"each other", "one another", "the image", "a group", "other objects", "a set"}


class ParsedRegion(NamedTuple):
    """One region of a text. box and polygons: in pixels; spans: where in the text its label and its places stand;
    segments: words of its mask, that a decoder reads (PaliGemma), or ()."""

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
    """The phrases of a caption, each with its boxes, less those that name no thing."""
    return list(_labelled_boxes(text, size, _BOXES, ignored_phrases))


def parse_quads(text: str, size: Size) -> list[ParsedRegion]:
    """Texts, each with four corners, clockwise from the top left of the text; the box is what holds them."""
    text = strip_special_tokens(text)
    out: list[ParsedRegion] = []
    for match in _QUAD.finditer(text):
        corners = _pixels([*map(_bin, match.groups()[1:])], size)
        spans = (match.span(1), (match.end(1), match.end()))
        out.append(ParsedRegion(match.group(1).strip(), bounding_box([corners]), (corners,), spans))
    return out


def parse_outlines(text: str, size: Size) -> list[ParsedRegion]:
    """Outlines alone, of one thing after the other; outlines of one thing have `<sep>` between them."""
    return list(_labelled_outlines(text, size, _BARE_OUTLINES))


def parse_boxes_or_outlines(text: str, size: Size) -> list[ParsedRegion]:
    """Labels with outlines where there is a `<poly>`, else labels with boxes."""
    if "<poly>" in text:
        return list(_labelled_outlines(text, size, _OUTLINES))
    return parse_boxes(text, size)


def parse_location_tokens(text: str, size: Size) -> list[ParsedRegion]:
    """PaliGemma's boxes, each with its label and perhaps the words of its mask behind it."""
    return [
        ParsedRegion(
            place.label, location_tokens.box_from_bins(place, size), (), (place.span,), place.segments
        )
        for place in location_tokens.parse_locations(text)
    ]


def parse_region_text(text: str, size: Size) -> list[ParsedRegion]:
    """The words about a box that was asked for, without its places, which the network may repeat behind them; the
    region is the whole image. None where it has no words."""
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
    """A text without the tokens that begin, end and fill it, as the parsers read it."""
    return text.replace("<s>", "").replace("</s>", "").replace("<pad>", "")


def box_tokens(box: Box, size: Size) -> str:
    """The words of a box in pixels, for prompts about a region: four of `<loc_0>` to `<loc_999>`."""
    height, width = size
    per_bin = np.array([width / BINS, height / BINS] * 2, dtype=np.float32)
    bins = np.floor(np.array(box, dtype=np.float32) / per_bin).clip(0, BINS - 1).astype(int)
    return "".join(f"<loc_{place}>" for place in bins.tolist())


def format_boxes(things: Sequence[tuple[str, Box]], size: Size) -> list[str]:
    """What `boxes` reads back: a piece for each thing, a label and a box in pixels; joined they are the text. Things of
    one label follow the first of them, and share its label."""
    found: list[str] = []
    for label in dict.fromkeys(label for label, _ in things):
        mine = [box_tokens(box, size) for name, box in things if name == label]
        found += [label + mine[0], *mine[1:]]
    return found


# Those of PARSERS whose texts can be written, to be learned.
FORMATTERS: dict[str, Callable[[Sequence[tuple[str, Box]], Size], list[str]]] = {
    "boxes": format_boxes,
    "located": location_tokens.format_locations,
}


def plain_label(label: str) -> str:
    """A label without what would end it or split the text: angle brackets, semicolons, ends of lines."""
    return " ".join(re.sub("[<>;]", " ", label).split())


def bounding_box(polygons: Sequence[Sequence[float]]) -> Box:
    """The box that holds all points; all zeros where there are none."""
    across = [x for polygon in polygons for x in polygon[0::2]] or [0.0]
    down = [y for polygon in polygons for y in polygon[1::2]] or [0.0]
    return (min(across), min(down), max(across), max(down))


def confidence(spans: Sequence[Span], tokens: Sequence[Span], log_p: Sequence[float]) -> float | None:
    """How sure the network is of a region, 0..1: the mean probability (geometric) of the tokens that say it, label and
    places. tokens: where in the text each token stands; log_p: its log-probability. None where no token says it."""
    said = [
        value
        for (start, end), value in zip(tokens, log_p, strict=True)
        if any(start < stop and begin < end for begin, stop in spans)
    ]
    return math.exp(sum(said) / len(said)) if said else None


def _labelled_boxes(
    text: str, size: Size, pattern: re.Pattern[str], ignored_phrases: frozenset[str] = frozenset()
) -> Iterator[ParsedRegion]:
    for match in pattern.finditer(strip_special_tokens(text)):
        label = _LABEL.search(match.group())
        if label is None or label.group().strip() in ignored_phrases:
            continue
        start = match.start()
        # As the reference has it: what is not ASCII is dropped from labels of boxes.
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
    """The number of a place; letters may spell larger ones than there are, but none that is too large to count with."""
    return int(digits) if len(digits) < 7 else _FAR


def _pixels(bins: Sequence[int], size: Size) -> tuple[float, ...]:
    """The middle of each bin in whole pixels, x and y in turn; in float32, as the reference rounds."""
    height, width = size
    per_bin = np.array([width / BINS, height / BINS] * (len(bins) // 2), dtype=np.float32)
    middles = np.array(bins, dtype=np.int64).astype(np.float32) + np.float32(0.5)
    return tuple((middles * per_bin).astype(np.int32).astype(float).tolist())
