"""Keywords: normalization, n-grams, fusion."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightloop.search.keywords import fuse_ranks, grams_of, matched_words, normalize, words_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Café au LAIT, E16!", "cafe au lait e16"),
        ("  two\n dogs_running ", "two dogs running"),
        ("Straße ﬁne", "strasse fine"),
        ("東京駅の犬", "東京駅の犬"),
        ("हिन्दी में", "हिन्दी में"),
        ("Ёлка", "елка"),
    ],
)
def test_normalization(text: str, words: str) -> None:
    assert normalize(text) == words


@given(st.text(max_size=60))
def test_normalization_is_the_same_for_every_form(text: str) -> None:
    once = normalize(text)
    assert normalize(once) == once
    assert normalize(unicodedata.normalize("NFD", text)) == once
    assert normalize(unicodedata.normalize("NFC", text)) == once


def test_grams_find_parts_of_codes_and_of_scripts_without_spaces() -> None:
    assert matched_words("e16 京", "connector ae16x 東京駅") == ["e16", "京"]
    assert matched_words("cat", "concatenate") == []
    assert grams_of(["dog"]) == []
    assert set(grams_of(["e16"])) <= set(grams_of(words_of("AE16X")))
    assert set(grams_of(["東京"])) <= set(grams_of(words_of("新東京駅")))


def test_fusion() -> None:
    scores = fuse_ranks([["a", "b"], ["b", "c"]], [1, 2])
    assert list(scores) == ["b", "c", "a"]
    assert scores["b"] == pytest.approx(1 / 12 + 2 / 11)
