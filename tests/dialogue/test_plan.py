"""Plans of questions: what the rules say, and what holds for any message."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightloop.dialogue.plan import (
    AskImage,
    CompareCounts,
    CountImages,
    DescribeImage,
    FindImages,
    FindSimilar,
    Plan,
    plan_of,
)


@pytest.mark.parametrize(
    ("message", "fresh", "after_an_image"),
    [
        ("How many photos show a dog?", CountImages("a dog"), CountImages("a dog")),
        ("how many of my pictures are of boats", CountImages("boats"), CountImages("boats")),
        ("in how many photos is there a ball?", CountImages("a ball"), CountImages("a ball")),
        ("how many images are there?", CountImages(""), CountImages("")),
        ("Find a red car.", FindImages("a red car"), FindImages("a red car")),
        ("please show me pictures of people on a beach", *[FindImages("people on a beach")] * 2),
        ("which image shows a cat?", FindImages("a cat"), FindImages("a cat")),
        ("is there a photo of a unicorn?", FindImages("a unicorn"), FindImages("a unicorn")),
        ("are there any boats in my photos?", FindImages("boats"), FindImages("boats")),
        ("red car", FindImages("red car"), FindImages("red car")),
        ("is there a dog in it?", FindImages("a dog in it"), AskImage("is there a dog?")),
        ("what color is the car?", *[AskImage("what color is the car?", "car")] * 2),
        (
            "what animal is on the grass?",
            *[AskImage("what animal is on the grass?", "animal on the grass")] * 2,
        ),
        ("what color is it?", None, AskImage("what color is it?")),
        ("how many people are in image 2?", *[AskImage("how many people are there?", "", 2)] * 2),
        ("what is in [3]", DescribeImage(3), DescribeImage(3)),
        ("describe it", None, DescribeImage(None)),
        ("more like this", None, FindSimilar(None)),
        ("show me more photos like that one", None, FindSimilar(None)),
        ("are there more dogs or cats?", *[CompareCounts("dogs", "cats")] * 2),
        ("?", None, None),
        ("", None, None),
    ],
)
def test_rules(message: str, fresh: Plan | None, after_an_image: Plan | None) -> None:
    assert plan_of(message, has_image=False) == fresh
    assert plan_of(message, has_image=True) == after_an_image


WORDS = st.lists(
    st.sampled_from(
        "how many photos show a dog what is in it this image 2 [3] find more like are there is or than the any do i "
        "have which of with color where who count describe".split()
    ),
    max_size=12,
).map(" ".join)


@given(WORDS | st.text(max_size=60), st.booleans())
def test_any_message_has_one_plan_or_none(message: str, has_image: bool) -> None:
    plan = plan_of(message, has_image=has_image)
    assert plan == plan_of(f"  {message}?! ", has_image=has_image)
    if isinstance(plan, (FindImages, CompareCounts)):
        assert all(len(text) <= len(message) for text in (getattr(plan, name) for name in plan.__slots__))
    if isinstance(plan, (FindSimilar, DescribeImage)):
        assert has_image or plan.number is not None
    if isinstance(plan, AskImage):
        assert plan.question.endswith("?")
        assert plan.text or has_image or plan.number is not None
