"""JSON in which an object has a name twice: refused, or marked."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sightloop.data.json_members import RepeatedNames, parse_strict, parse_tolerant, repeated_name

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60)
@given(VALUES)
def test_other_json_is_unchanged(value: object) -> None:
    text = json.dumps(value)
    assert parse_strict(text) == json.loads(text)
    assert parse_tolerant(text) == (json.loads(text), False)


@settings(max_examples=60)
@given(VALUES, st.text(), st.lists(st.sampled_from("[{"), max_size=4))
def test_a_name_twice_is_found_at_any_depth(value: object, name: str, around: list[str]) -> None:
    text = f"{{{json.dumps(name)}: {json.dumps(value)}, {json.dumps(name)}: 1}}"
    for bracket in around:
        text = f"[0, {text}]" if bracket == "[" else f'{{"x": {text}}}'
    with pytest.raises(ValueError, match="twice"):
        parse_strict(text)
    parsed, has_repeats = parse_tolerant(text)
    assert has_repeats
    assert repeated_name(parsed) == name
    assert isinstance(parsed, RepeatedNames) == (not around)


def test_integers_that_python_refuses_are_infinite() -> None:
    value, has_repeats = parse_tolerant('[1, {"box": [' + "9" * 5000 + "]}]")
    assert value == [1, {"box": [float("inf")]}]
    assert not has_repeats
