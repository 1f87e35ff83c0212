from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightloop.tasks.caption_filter import CaptionFilter, drop_reason, find_loop


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("a dog on a beach", ""),
        ("ha ha ha", ""),
        ("ha ha ha ha", "ha"),
        ("Very, very very VERY large", "very"),
        ("new york new york", ""),
        ("a dog, a dog, a dog.", "a dog"),
        ("a cat and a cat and a cat", ""),
        ("a cat and a cat and a cat and", "a cat and"),
        ("one two three one two three one two three", "one two three"),
        ("a b c d e f g h " * 3, "a b c d e f g h"),
        ("a b c d e f g h i " * 3, ""),
        ("", ""),
        (". . . . .", ""),
        ("a man and a woman and a child", ""),
        ("1 1 1 1", "1"),
    ],
)
def test_loops(text: str, loop: str) -> None:
    phrase = find_loop(text)
    assert bool(phrase) == bool(loop)
    assert sorted(phrase.split()) == sorted(loop.split())


WORDS = st.lists(st.sampled_from(["a", "dog", "cat", "red"]), min_size=1, max_size=8)


@given(WORDS, st.integers(4, 6), WORDS, WORDS)
def test_a_repeated_phrase_is_a_loop(
    phrase: list[str], times: int, before: list[str], after: list[str]
) -> None:
    assert find_loop(" ".join(before + phrase * times + after))


@given(st.lists(st.sampled_from(["a", "dog", "cat"]), max_size=40))
def test_loops_match_the_definition(words: list[str]) -> None:
    def brute_force() -> bool:
        return any(
            words[i : i + n] * times == words[i : i + n * times]
            for n in range(1, 9)
            for times in ([4] if n == 1 else [3])
            for i in range(len(words) - n * times + 1)
        )

    assert bool(find_loop(" ".join(words))) == brute_force()


def test_kinds_of_dropped_captions() -> None:
    rules = CaptionFilter(prompt="A photo of", drop_if=re.compile("water(mark|print)"))
    assert drop_reason("a photo of a dog", rules)[0] == ""
    assert drop_reason("", rules)[0] == "empty"
    assert drop_reason(" .,- ", rules)[0] == "empty"
    assert drop_reason("a photo of", rules)[0] == "empty"
    assert drop_reason("a watermark", rules)[0] == "unwanted"
    assert drop_reason("no no no no", rules)[0] == "looping"
    everything = CaptionFilter(keep_all=True, drop_if=re.compile("x"))
    assert drop_reason("", everything)[0] == ""
    assert drop_reason("no no no no", everything)[0] == ""
    assert drop_reason("x", everything)[0] == "unwanted"
