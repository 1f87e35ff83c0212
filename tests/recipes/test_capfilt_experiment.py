"""CapFilt's experiment runs from end to end, and goes on where it was stopped."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.rules import REPOSITORY


def test_it_runs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe: dict[str, Any] = runpy.run_path(str(REPOSITORY / "recipes" / "capfilt_experiment.py"))
    main, scale = recipe["main"], recipe["SCALES"]["test"]
    names: dict[str, Any] = main.__globals__
    monkeypatch.setitem(names, "ROWS", {"none": None, "both, shared": {"shared": True}})
    found = main(tmp_path, scale, device="cpu")
    assert set(found["results"]) == {"none", "both, shared"}
    assert all(len(found["results"][row][name]) == 1 for row in found["results"] for name in recipe["SHOWN"])
    assert found["about"]["both, shared, seed 0"]["kept of true"] == 1.0  # its threshold is 0
    assert "| both, shared |" in (tmp_path / "table.md").read_text()

    def no_more(*given: Any, **named: Any) -> Any:
        raise AssertionError("a finished stage is run again")

    monkeypatch.setitem(names, "train", no_more)
    assert main(tmp_path, scale, device="cpu") == found

    out = tmp_path / "seed-0" / "bootstrap-both-shared"
    lines = [
        json.loads(x) for file in (out / "evidence").glob("*.jsonl") for x in file.read_text().splitlines()
    ]
    said = {line["key"]: (line["text"],) for line in lines if line.get("source") == "synthetic"}
    true = dict(list(said.items())[: len(said) // 4])  # the others say what is not so
    share = recipe["quality"](tmp_path / "seed-0" / "data" / "web.tar", out, dict.fromkeys(said, ()) | true)
    assert share["right of synthetic"] == round(len(true) / len(said), 4)
