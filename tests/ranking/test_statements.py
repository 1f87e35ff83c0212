"""Statements of questions and answers: what rules say, and what holds for any text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightloop.ranking.statements import statement


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("How many dogs are there?", "2", "there are 2 dogs"),
        ("how many chairs are in front of the table?", "4", "4 chairs are in front of the table"),
        ("What color is the cat?", "black", "the cat is black"),
        ("what is the colour of the car", "red", "the car is red"),
        ("Is there a dog?", "yes", "there is a dog"),
        ("is there any person in the image?", "no", "there is no person in the image"),
        ("is the cat black?", "no", "the cat is not black"),
        ("what is on the left side of the table?", "lamp", "a lamp is on the left side of the table"),
        ("what animal is this?", "elephant", "this is an elephant"),
        ("where is the cat?", "on the sofa", "the cat is on the sofa"),
        ("where is the cat?", "sofa", "the cat is at the sofa"),
        ("what is the man doing?", "riding a horse", "the man is riding a horse"),
        ("why is it wet?", "rain", "why is it wet? rain"),
        ("", "A dog runs.", "a dog runs"),
        ("what is this?", "This is a large red bus.", "this is a large red bus"),
    ],
)
def test_rules(question: str, answer: str, expected: str) -> None:
    assert statement(question, answer) == expected


OPENINGS = ["what is", "is there a", "is the", "how many", "where is", "what color is", "who", "what are", ""]
TEXTS = st.text(max_size=30)


@given(st.sampled_from(OPENINGS), TEXTS, TEXTS)
def test_any_text_gives_a_statement_that_has_the_answer(opening: str, rest: str, answer: str) -> None:
    made = statement(f"{opening} {rest}", answer)
    said = answer.strip().rstrip(". ").lower()
    assert made == made.strip()
    if not said.startswith(("yes", "no")):
        assert " ".join(said.split()) in " ".join(made.split())


@given(st.sampled_from(["cat", "two dogs", "person in the room"]))
def test_yes_and_no_say_different_things(thing: str) -> None:
    for question in (f"is there a {thing}?", f"are there {thing}?"):
        assert statement(question, "yes") != statement(question, "no")
