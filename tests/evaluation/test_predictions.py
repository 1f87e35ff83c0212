"""Predictions of other programs: every line is read or named, and numbers that do not exist are not computed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sightloop.errors import SightloopError, UsageError
from sightloop.evaluation.evaluate import evaluate
from sightloop.evaluation.predictions import check_finite, packed, read_predictions
from sightloop.evaluation.report import as_json


def write(path: Path, *lines: Any, end: str = "\n") -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + end)
    return path


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("caption", None),
        ("caption", ["a dog"]),
        ("caption", 3),
        ("answers", "yes"),
        ("answers", [1]),
        ("top", []),
        ("top", ["cat"]),
        ("top", [["cat", "0.5"]]),
        ("scores", [["x"]]),
        ("cosines", [1.0]),
        ("regions", [[0, 0, 1, 1]]),
        ("image", [0.5]),
    ],
)
def test_a_value_of_the_wrong_type_names_its_line(field: str, value: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"key": "a", "caption": "x"}, {"key": "b", field: value})
    with pytest.raises(UsageError, match=rf"p\.jsonl, line 2: {field} must be"):
        read_predictions(path)


def test_a_repeated_key_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"key": "a", "caption": "x"}, {"key": "a", "cosines": [0.1, 0.2]})
    assert read_predictions(path)[1] == {"a": {"caption": "x", "cosines": [0.1, 0.2]}}
    path = write(tmp_path / "p.jsonl", {"key": "a", "caption": "x"}, {"key": "a", "caption": "y"})
    with pytest.raises(UsageError, match="line 2: a second caption of 'a'"):
        read_predictions(path)


def test_a_last_line_without_newline_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"key": "a", "caption": "x"}, {"key": "b", "caption": "y"}, end="")
    assert list(read_predictions(path)[1]) == ["a", "b"]
    path = write(tmp_path / "p.jsonl", {"key": "a", "caption": "x"}, '{"key": "b", "capt', end="")
    with pytest.raises(UsageError, match="line 2"):
        read_predictions(path)


@pytest.mark.parametrize("count", [1, 2])
def test_cider_of_one_image_or_of_equal_references_is_not_computed(count: int, tmp_path: Path) -> None:
    data, lines = tmp_path / "data", []
    data.mkdir()
    for index in range(count):
        Image.fromarray(np.full((32, 32, 3), index * 40, np.uint8)).save(data / f"{index}.png")
        (data / f"{index}.txt").write_text("a dog runs on the grass")
        lines.append({"key": str(index), "caption": "a dog runs on the grass"})
    result = evaluate("captions", str(data), predictions=write(tmp_path / "p.jsonl", *lines))
    (run,) = result.runs
    numbers = {number.name: number for number in run.numbers}
    assert "CIDEr" not in numbers
    assert "references" in run.scored.not_computed["CIDEr"]
    assert numbers["BLEU-1"].value == pytest.approx(1.0)
    assert (numbers["BLEU-1"].low is None) == (count == 1)
    assert all(math.isfinite(number.value) for number in run.numbers)
    json.loads(as_json(result), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_outputs_that_are_not_finite_are_errors() -> None:
    check_finite("a", {"top": [["cat", 0.5]], "image": packed(np.ones(3, np.float32))}, "float16")
    for fields in ({"top": [["cat", math.nan]]}, {"image": packed(np.array([1, np.inf], np.float32))}):
        with pytest.raises(SightloopError, match=r"a: .*float16; try --dtype bfloat16"):
            check_finite("a", fields, "float16")
