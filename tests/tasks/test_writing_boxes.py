"""Boxes as words: what is written is what is read back, within half a place."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sightloop.tasks.region_parser import FORMATTERS, PARSERS, plain_label
from sightloop.types import Box

BINS = {"boxes": 1000, "located": 1024}
LABELS = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=12)
EDGES = st.floats(-0.2, 1.2)


@pytest.mark.parametrize("kind", FORMATTERS)
@given(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.lists(st.tuples(LABELS, EDGES, EDGES, EDGES, EDGES), max_size=5),
)
@settings(max_examples=200, deadline=None)
def test_they_come_back(
    kind: str, size: tuple[int, int], drawn: list[tuple[str, float, float, float, float]]
) -> None:
    height, width = size
    things: list[tuple[str, Box]] = []
    for name, a, b, c, d in drawn:
        if label := plain_label(name):
            box = (min(a, b) * width, min(c, d) * height, max(a, b) * width, max(c, d) * height)
            things.append((label, box))
    pieces = FORMATTERS[kind](things, size)
    assert len(pieces) == len(things)
    found = PARSERS[kind]("".join(pieces), size)
    if kind == "boxes":  # those of one label stand together
        order = list(dict.fromkeys(label for label, _ in things))
        things.sort(key=lambda thing: order.index(thing[0]))
    assert [one.label for one in found] == [label for label, _ in things]
    for one, (_, box) in zip(found, things, strict=True):
        for place, (edge, wanted) in enumerate(zip(one.box, box, strict=True)):
            side = (width, height)[place % 2]
            wanted = min(max(wanted, 0.0), float(side))
            near = side / BINS[kind] / 2 * (1 + 1e-3)
            if kind == "boxes":  # the middle of its place, in whole pixels, as the reference has it
                assert wanted - near - 1 <= edge <= wanted + near
            elif wanted > (BINS[kind] - 1) / BINS[kind] * side:  # there is no place for the far edge itself
                assert edge == pytest.approx((BINS[kind] - 1) / BINS[kind] * side)
            else:
                assert abs(edge - wanted) <= near


def test_examples() -> None:
    things = [
        ("dog", (10.0, 20.0, 30.0, 40.0)),
        ("cat", (0.0, 0.0, 100.0, 200.0)),
        ("dog", (1.0, 1.0, 2.0, 2.0)),
    ]
    assert FORMATTERS["boxes"](things, (200, 100)) == [
        "dog<loc_100><loc_100><loc_300><loc_200>",
        "<loc_10><loc_5><loc_20><loc_10>",
        "cat<loc_0><loc_0><loc_999><loc_999>",
    ]
    assert "".join(FORMATTERS["located"](things[:2], (200, 100))) == (
        "<loc0102><loc0102><loc0205><loc0307> dog ; <loc0000><loc0000><loc1023><loc1023> cat"
    )
    assert plain_label(" a <b>; c\nd ") == "a b c d"
