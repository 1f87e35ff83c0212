"""Words of places -> regions: equal to the reference's post-processing on texts of all kinds, malformed ones too."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.florence2.processing_florence2 import Florence2PostProcessor

from sightloop.tasks import region_parser
from sightloop.tasks.region_parser import ParsedRegion
from sightloop.types import Size

WORDS = [
    "a cat",
    "dog",
    "the",
    "it",
    " two dogs ",
    "é",
    "straße",
    "x\ny",
    "\n",
    "1 2",
    "",
    "a group",
    "I",
    "<",
    ">",
]
MARKS = [
    "<sep>",
    "<poly>",
    "</poly>",
    "<s>",
    "</s>",
    "<pad>",
    "<and>",
    "<od>",
    "</od>",
    "<box>",
    "<ground>",
    "<loc_>",
]
TEXTS = 2_000  # of each kind


class NoTokens:
    """What the reference wants to know of a tokenizer when it is given texts."""

    all_special_tokens: tuple[str, ...] = ()


KINDS = ["ocr", "phrase_grounding", "pure_text", "description_with_bboxes", "polygons", "bboxes"]
KINDS += ["description_with_bboxes_or_polygons"]
REFERENCE = Florence2PostProcessor(
    {kind: {} for kind in KINDS}
    | {"phrase_grounding": {"banned_grounding_tokens": sorted(region_parser.IGNORED_PHRASES)}},
    NoTokens(),
)


def texts(count: int, seed: int) -> list[str]:
    """Half of them mostly well formed, half of them anything."""
    rng = random.Random(seed)

    def places(count: int) -> str:
        return "".join(f"<loc_{rng.randrange(1000 if rng.random() < 0.97 else 1200)}>" for _ in range(count))

    out: list[str] = []
    for _ in range(count):
        parts: list[str] = []
        wild = rng.random() < 0.5
        for _ in range(rng.randrange(8)):
            if wild:
                parts.append(rng.choice([rng.choice(WORDS), rng.choice(MARKS), places(rng.randrange(10))]))
                continue
            parts.append(rng.choice(WORDS))
            thing = "<sep>".join(places(rng.choice([3, 4, 6, 8, 9])) for _ in range(rng.randrange(1, 4)))
            parts.append(rng.choice([places(4), places(8), thing, f"<poly>{thing}</poly>"]))
        out.append("".join(parts))
    return out


def flat(found: list[ParsedRegion]) -> list[Any]:
    return [(one.label, list(one.box)) for one in found]


def outlined(found: list[ParsedRegion]) -> list[Any]:
    return [(one.label, [list(polygon) for polygon in one.polygons]) for one in found]


def reference(kind: str, text: str, size: Size) -> list[Any]:
    parsed = REFERENCE(text=text, image_size=(size[1], size[0]), parse_tasks=[kind])[kind]
    if kind == "phrase_grounding":
        return [(one["cat_name"], box) for one in parsed for box in one["bbox"]]
    if kind == "ocr":
        return [(one["text"], [one["quad_box"]]) for one in parsed]
    return [(one["cat_name"], one.get("polygons") or one["bbox"]) for one in parsed]


CASES: list[tuple[str, str, Callable[[list[ParsedRegion]], list[Any]]]] = [
    ("boxes", "description_with_bboxes", flat),
    ("proposals", "bboxes", flat),
    ("phrases", "phrase_grounding", flat),
    ("quads", "ocr", outlined),
    ("outlines", "polygons", outlined),
]


@pytest.mark.parametrize(("ours", "theirs", "shape"), CASES)
def test_regions_are_those_of_the_reference(
    ours: str, theirs: str, shape: Callable[[list[ParsedRegion]], list[Any]]
) -> None:
    rng = random.Random(ours)
    some = 0
    for text in texts(TEXTS, seed=len(ours)):
        size = (rng.randrange(1, 5000), rng.randrange(1, 5000))
        found = region_parser.PARSERS[ours](text, size)
        assert shape(found) == reference(theirs, text, size), (text, size)
        some += bool(found)
    assert some > TEXTS // 20


def test_anything_is_boxes_or_outlines() -> None:
    for text in texts(TEXTS, seed=7):
        found = region_parser.parse_boxes_or_outlines(text, (333, 517))
        shape = outlined if "<poly>" in text else flat
        assert shape(found) == reference("description_with_bboxes_or_polygons", text, (333, 517)), text


def test_every_region_knows_its_words() -> None:
    for text in texts(2000, seed=3):
        clean = region_parser.strip_special_tokens(text)
        for found in region_parser.parse_boxes(text, (100, 100)):
            label, places = (clean[start:end] for start, end in found.spans)
            assert label.strip().encode("ascii", "ignore").decode() == found.label
            assert region_parser.parse_boxes("x" + places, (100, 100))[0].box == found.box
        for found in region_parser.parse_quads(text, (100, 100)):
            start, end = found.spans[1]
            assert region_parser.parse_quads("x" + clean[start:end], (100, 100))[0].polygons == found.polygons
        for found in region_parser.parse_outlines(text, (100, 100)):
            start, end = found.spans[1]
            assert clean[start:end].count("<loc_") >= sum(len(polygon) for polygon in found.polygons)


@given(
    st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
    st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4),
)
def test_places_name_the_bin_of_each_edge(size: Size, shares: list[float]) -> None:
    height, width = size
    box = (shares[0] * width, shares[1] * height, shares[2] * width, shares[3] * height)
    found = region_parser.parse_proposals(region_parser.box_tokens(box, size), size)[0]
    for edge, place, side in zip(box, found.box, (width, height, width, height), strict=True):
        assert abs(edge - place) <= side / region_parser.BINS + 1


def test_how_sure_it_is() -> None:
    tokens = [(0, 3), (3, 9), (9, 15), (15, 18)]
    log_p = [math.log(p) for p in (0.9, 0.4, 0.1, 0.5)]
    assert region_parser.confidence([(0, 3), (3, 9)], tokens, log_p) == pytest.approx(math.sqrt(0.9 * 0.4))
    assert region_parser.confidence([(2, 4)], tokens, log_p) == pytest.approx(math.sqrt(0.9 * 0.4))
    assert region_parser.confidence([(15, 18)], tokens, log_p) == pytest.approx(0.5)
    assert region_parser.confidence([(18, 18)], tokens, log_p) is None


def test_places_spelled_in_letters_break_nothing() -> None:
    """Who reads an image of such words gets them back as they are: a number may have any length."""
    for digits in ("1000", "9" * 9, "9" * 30, "9" * 5000, "0" * 40):
        text = "cat" + f"<loc_{digits}>" * 8 + "<poly>" + f"<loc_{digits}>" * 6 + "</poly>"
        for parse in region_parser.PARSERS.values():
            assert all(np.isfinite(one.box).all() for one in parse(text, (30, 40)))
