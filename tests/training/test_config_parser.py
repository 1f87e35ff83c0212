"""Suggestions for a setting that does not exist: the whole name, wherever it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sightloop.errors import UsageError
from sightloop.training.config import apply_settings, from_json, to_json
from sightloop.training.recipes import RECIPES


@pytest.mark.parametrize(
    ("setting", "meant"),
    [
        ("init_from=x", "model.init_from"),
        ("modle.init_from=x", "model.init_from"),
        ("model.init_form=x", "model.init_from"),
        ("init_form=x", "model.init_from"),
        ("lr=1", "optimizer.lr"),
        ("optimizer.lrr=1", "optimizer.lr"),
        ("model.lr=1", "optimizer.lr"),
        ("max_tokens=9", "data.max_tokens"),
        ("stpes=1", "steps"),
        ("evaluation.evry=1", "evaluation.every"),
    ],
)
def test_a_wrong_name_is_answered_by_the_whole_right_one(setting: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        apply_settings(RECIPES["captioner"], [setting])
    assert str(caught.value).endswith(f"no such setting; did you mean {meant}?")


@pytest.mark.parametrize(("setting", "listed"), [("qqq=1", "model, "), ("optimizer.qqq=1", "optimizer.lr, ")])
def test_a_name_like_no_other_is_answered_by_those_there(setting: str, listed: str) -> None:
    with pytest.raises(UsageError, match="choose from") as caught:
        apply_settings(RECIPES["captioner"], [setting])
    assert listed in str(caught.value)


def test_a_wrong_name_in_a_recipe(tmp_path: Path) -> None:
    data = json.loads(json.dumps(to_json(RECIPES["captioner"])))
    data["optimizer"]["lrr"] = 1
    with pytest.raises(UsageError, match=r"optimizer\.lrr: no such setting; did you mean optimizer\.lr\?"):
        from_json(data)
