from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightloop.errors import SightloopError
from sightloop.training.events import (
    KINDS,
    Calibrated,
    CheckpointSaved,
    Evaluated,
    RunEnded,
    RunEvent,
    RunStarted,
    SampleSkipped,
    StepDone,
    WarningRaised,
    from_json,
    to_json,
)

whole = st.integers(0, 2**40)
number = st.floats(allow_nan=False)
numbers = st.dictionaries(st.text(), number, max_size=4)
path = st.text("abc ü\"'/", min_size=1).map(Path)
EVENTS = st.one_of(
    st.builds(RunStarted, st.text(), whole, whole, whole, whole, whole, whole),
    st.builds(StepDone, whole, number, number, numbers, numbers, number, number, whole),
    st.builds(Evaluated, whole, numbers, st.lists(st.tuples(st.text(), st.text()), max_size=3).map(tuple)),
    st.builds(Calibrated, whole, st.text(), whole, whole, number, numbers, numbers),
    st.builds(WarningRaised, whole, st.text(), st.text(), st.booleans()),
    st.builds(SampleSkipped, st.text(), st.text()),
    st.builds(CheckpointSaved, whole, path),
    st.builds(RunEnded, whole, number, path | st.none()),
)


@given(EVENTS)
def test_events_survive_json(event: RunEvent) -> None:
    record = to_json(event)
    assert next(iter(record)) == "kind"
    assert KINDS[record["kind"]] is type(event)
    names = [field.name for field in fields(event)]
    assert list(record)[1:] == names
    line = json.dumps(record, allow_nan=False)
    assert from_json(json.loads(line)) == event


def test_not_a_number_survives() -> None:
    event = StepDone(1, 0.0, math.nan, {"lm": math.inf}, {"lm": -math.inf}, 0.0, 0.0, 1)
    read = from_json(json.loads(json.dumps(to_json(event), allow_nan=False)))
    assert isinstance(read, StepDone)
    assert math.isnan(read.loss)
    assert (read.values, read.chances) == ({"lm": math.inf}, {"lm": -math.inf})


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"kind": "party"},
        {"kind": "saved", "step": 1},
        {"kind": "saved", "step": "x", "folder": "a"},
        {"kind": "saved", "step": 1, "folder": 3},
        {"kind": "evaluation", "step": 1, "values": [], "texts": []},
        {"kind": "evaluation", "step": 1, "values": {}, "texts": [["a"]]},
    ],
)
def test_a_damaged_event_is_an_error(record: dict[str, object]) -> None:
    with pytest.raises(SightloopError, match="event"):
        from_json(record)


def test_unknown_fields_are_ignored() -> None:
    assert from_json({"kind": "skipped", "key": "a", "reason": "b", "host": 3}) == SampleSkipped("a", "b")


def test_fields_with_a_default_may_be_missing() -> None:
    assert from_json({"kind": "warning", "step": 1, "about": "a", "text": "b"}) == WarningRaised(1, "a", "b")


def test_the_summary_of_a_calibration_has_its_numbers() -> None:
    before, after = {"kept": 0.66, "dropped": 0.87}, {"kept": 0.78, "dropped": 0.781}
    text = Calibrated(140, "dev.tar", 200, 2000, 0.8633, before, after).summary()
    for fact in ("78.0%", "78.1%", "66.0%", "87.0%", "0.863", "2,000 pairs", "200 images", "dev.tar"):
        assert fact in text
    assert "cosine" not in text
    text = Calibrated(140, "", 200, 2000, 0.88, before, after, 20.0).summary()
    assert re.search(r"kept out.*cosine.*\b20\b", text)
    text = Calibrated(140, "dev.tar", 200, 2000, 0.88, before, after, start="old/model").summary()
    for fact in ("old/model", "200 images", "78.1%", "87.0%", "--evaluate"):
        assert fact in text
