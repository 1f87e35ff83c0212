"""PaliGemma's location strings, against a reading letter by letter of the published rule."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from sightloop.tasks.location_tokens import LocationSpan, box_from_bins, parse_locations

Found = tuple[str, tuple[int, ...], tuple[int, ...]]


def word(text: str, at: int, kind: str, digits: int) -> int | None:
    """The number of a word such as <loc0012> that stands at a place of the text."""
    head, end = f"<{kind}", at + 2 + len(kind) + digits
    number = text[at + len(head) : end - 1]
    whole = text[at : at + len(head)] == head and text[end - 1 : end] == ">"
    return int(number) if whole and len(number) == digits and number.isdecimal() else None


def run(text: str, at: int, kind: str, digits: int, count: int) -> tuple[tuple[int, ...], int] | None:
    """`count` such words in a row, and where they end."""
    out: list[int] = []
    for _ in range(count):
        number = word(text, at, kind, digits)
        if number is None:
            return None
        out.append(number)
        at += 2 + len(kind) + digits
    return tuple(out), at


def blanks(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def by_hand(text: str) -> list[Found]:
    """Four places, blanks, sixteen segments or none, blanks, all letters up to one of ; < >, then perhaps a blank, then
    perhaps "; ". Before it anything in the same line."""
    out: list[Found] = []
    at = start = 0
    while start < len(text):
        boxes = run(text, start, "loc", 4, 4)
        if boxes is None:
            if text[start] == "\n":  # what was not read since `at` may not hold a line's end
                return out
            start += 1
            continue
        at = blanks(text, boxes[1])
        segments: tuple[int, ...] = ()
        if found := run(text, at, "seg", 3, 16):
            segments, at = found
        at = blanks(text, at)
        end = at
        while end < len(text) and text[end] not in ";<>":
            end += 1
        out.append((text[at:end].strip(), boxes[0], segments))
        at = end
        at += text[at : at + 1] == " "
        at += 2 * (text[at : at + 2] == "; ")
        start = at
    return out


def random_text(draw: random.Random) -> str:
    """Words of a network that has gone astray, and often whole objects."""
    loc = lambda: f"<loc{draw.choice((0, 7, 512, 1023, draw.randrange(1024))):04d}>"  # noqa: E731
    seg = lambda: f"<seg{draw.randrange(128):03d}>"  # noqa: E731
    odd = [
        "cat",
        " a dog",
        ";",
        " ; ",
        " ",
        "\n",
        "<",
        ">",
        "<loc12>",
        "<loc0>",
        "<seg0001>",
        "<eos>",
        "\u00fc",
        "\t",
    ]
    parts: list[str] = []
    for _ in range(draw.randrange(9)):
        match draw.randrange(6):
            case 0:
                parts.append(draw.choice(odd))
            case 1:
                parts += [loc() for _ in range(draw.randrange(7))]
            case 2:
                parts += [seg() for _ in range(draw.choice((1, 15, 16, 17)))]
            case 3:
                parts += [*(loc() for _ in range(4)), *(seg() for _ in range(16)), " cat"]
            case _:
                parts += [
                    *(loc() for _ in range(4)),
                    draw.choice((" cat", " a dog", "")),
                    draw.choice((" ; ", ";", "")),
                ]
    text = "".join(parts)
    if text and draw.random() < 0.2:  # cut somewhere
        text = (
            text[draw.randrange(len(text)) : draw.randrange(len(text)) + 1]
            or text[: draw.randrange(len(text))]
        )
    return text


def test_ten_thousand_strings() -> None:
    draw = random.Random(0)
    many = 0
    for _ in range(10_000):
        text = random_text(draw)
        found = parse_locations(text)
        assert [(p.label, p.bins, p.segments) for p in found] == by_hand(text), text
        for place in found:
            assert text[slice(*place.span)].startswith(f"<loc{place.bins[0]:04d}>")
        many += len(found)
    assert many > 10_000


@given(st.text(alphabet="<>loceg0123; \n"))
def test_any_letters(text: str) -> None:
    assert [(p.label, p.bins, p.segments) for p in parse_locations(text)] == by_hand(text)


def test_boxes_are_shares_of_the_picture() -> None:
    (place,) = parse_locations("<loc0256><loc0128><loc0512><loc1023> cat")
    assert place == LocationSpan("cat", (256, 128, 512, 1023), (), (0, 40))
    assert box_from_bins(place, (100, 200)) == (25.0, 25.0, 1023 / 1024 * 200, 50.0)
    assert box_from_bins(place._replace(bins=(512, 1023, 256, 128)), (100, 200)) == box_from_bins(
        place, (100, 200)
    )
    assert box_from_bins(place._replace(bins=(0, 0, 9999, 9999)), (100, 200)) == (0, 0, 200, 100)
