"""The line that says what --dtype auto would gain: on a terminal, for large models, in float32, once."""

from __future__ import annotations

import pytest

import sightloop
from sightloop.apps.cli import common
from sightloop.apps.cli.options import RuntimeOptions
from sightloop.inference import precision


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is printed, on a terminal, on a machine whose bfloat16 is twice as fast."""
    lines: list[str] = []
    monkeypatch.setattr(common, "print_message", lines.append)
    monkeypatch.setattr(common, "is_interactive", lambda: True)
    monkeypatch.setattr(common, "_MIN_WEIGHTS_OF_HINT", 1)
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda: True)
    monkeypatch.setattr(precision, "has_vnni", lambda: False)
    monkeypatch.setattr(precision, "bfloat16_gain", lambda _: 2.0)  # pyright: ignore
    return lines


def test_it_is_one_line_with_the_option(said: list[str]) -> None:
    common.print_gain_of_auto(sightloop.load(device="cpu"), RuntimeOptions())
    expected = "--dtype auto would use bfloat16, whose products take 1/2.0 of the time on this processor."
    assert said == [f"float32, the default, is exact; {expected}"]


@pytest.mark.parametrize(
    "options",
    [{"dtype": "bfloat16"}, {"dtype": "auto"}, {"quantize": "int8"}],
    ids=["bfloat16", "auto", "int8"],
)
def test_who_chose_a_precision_is_told_nothing(said: list[str], options: dict[str, str]) -> None:
    common.print_gain_of_auto(sightloop.load(device="cpu"), RuntimeOptions(**options))  # pyright: ignore
    assert said == []


def test_nothing_is_said_to_a_file_or_of_a_small_model(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "_MIN_WEIGHTS_OF_HINT", 10**9)
    common.print_gain_of_auto(sightloop.load(device="cpu"), RuntimeOptions())
    monkeypatch.setattr(common, "_MIN_WEIGHTS_OF_HINT", 1)
    monkeypatch.setattr(common, "is_interactive", lambda: False)
    common.print_gain_of_auto(sightloop.load(device="cpu"), RuntimeOptions())
    assert said == []
