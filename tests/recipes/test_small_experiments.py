"""The experiments on fusions and on labels with captions run from end to end, and go on where they were stopped."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.rules import REPOSITORY


def script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(REPOSITORY / "recipes" / f"{name}.py"))


def no_more(*_: Any, **__: Any) -> Any:
    raise AssertionError("a finished run is run again")


def test_fusions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = script("fusion_experiment")
    main, names = recipe["main"], recipe["main"].__globals__
    for name, value in {"TRAIN": 40, "TEST": 6}.items():
        monkeypatch.setitem(names, name, value)
    monkeypatch.setitem(names, "SETTINGS", (*names["SETTINGS"], "schedule.warmup_steps=1"))
    found = main(tmp_path, 1, 2, ("late", "early"))
    assert set(found) == {"late", "early"}
    assert all(len(found[f]["ITM, swapped colors"][0]) == 6 for f in found)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0] == "| | late | early |"
    assert len(lines) == 2 + len(found["late"])
    monkeypatch.setitem(names, "train", no_more)
    assert (
        main(tmp_path, 1, 2, ("late", "early"))
        == found
        == json.loads((tmp_path / "results.json").read_text())
    )


def test_wrong_texts_have_the_words_of_the_true_one_and_are_false() -> None:
    recipe = script("fusion_experiment")
    _, shown = recipe["scenes"]("unseen", 200, 0)
    for scene in shown:
        for text in recipe["swapped"](scene):
            assert text != str(scene)
            assert sorted(text.split()) == sorted(str(scene).replace(" an ", " a ").split()) or "an " in text
        assert len({group.color for group in scene.groups} | {group.shape for group in scene.groups}) == 4
    seen = {str(scene) for scene in recipe["scenes"]("train", 500, 0)[1]}
    assert not seen & {str(scene) for scene in shown}


def test_labels_and_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = script("unicl_experiment")
    main, names = recipe["main"], recipe["main"].__globals__
    for name, value in {"A_CLASS": 1, "TEST_CLASS": 1, "CAPTIONS": 20, "TEST_CAPTIONS": 12}.items():
        monkeypatch.setitem(names, name, value)
    monkeypatch.setitem(names, "SETTINGS", (*names["SETTINGS"], "data.batch=16", "schedule.warmup_steps=1"))
    found = main(tmp_path, 1, 2)
    assert set(found) == {"labels", "captions", "both"}
    assert {len(values) for numbers in found.values() for values in numbers.values()} == {1}
    assert "| both less captions, paired |" in (tmp_path / "table.md").read_text()
    monkeypatch.setitem(names, "train", no_more)
    assert main(tmp_path, 1, 2) == found
