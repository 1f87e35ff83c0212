"""The benchmark runs, its sides agree, and what it prints and writes has its form. Never a time."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from benchmarks.cases import Case, Job, choose, every_case
from benchmarks.report import Row, compare
from benchmarks.run import main
from tests.rules import REPOSITORY

# Every kind of work once.
NAMES = [
    *("caption-b1-greedy", "caption-b8-beam3", "encode-blip-b8", "judge-16", "judge-16-texts", "ask-16"),
    "bootstrap-b8",
    *("clip-images-b32", "clip-files-b32", "clip-texts-b64", "pixels-clip-exact-t2", "pixels-blip-fast-t1"),
    *("start-import", "start-help", "memory-b1", "train-clip-b64", "train-blip-b8"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "benchmarks.run", "--tiny", "--rounds=1", "--only", *NAMES]
    paths = [f"--cache={folder / 'cache'}", f"--out={folder / 'bench.json'}"]
    done = subprocess.run([*command, *paths], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not [*folder.rglob("*.partial")]
    return done.stdout, json.loads((folder / "bench.json").read_text("utf-8"))


def test_every_case_has_run(run: tuple[str, dict[str, Any]]) -> None:
    table, written = run
    assert written["machine"]["cores"] >= 1
    assert written["machine"]["versions"]["torch"]
    assert written["settings"]["size"] == "tiny"
    assert list(dict.fromkeys(row["case"] for row in written["results"])) == NAMES
    for row in written["results"]:
        assert row["case"] in table
        if row["not_run"] is None:
            assert row["ours_median"] > 0
            assert (row["ratio"] is None) == (row["peer"] is None)
        else:
            assert (row["peer"], find_spec("open_clip")) == ("open_clip", None), row["not_run"]


def test_both_sides_say_the_same(run: tuple[str, dict[str, Any]]) -> None:
    near = {case.name: case.near for case in every_case()}
    compared = 0
    for row in run[1]["results"]:
        assert row["texts_equal"] == row["texts"], row["case"]
        assert row["difference"] is None or row["difference"] <= near[row["case"]], row["case"]
        compared += row["texts"] is not None or row["difference"] is not None
    assert compared >= len(NAMES) - 2  # all but two ways to start


def test_cases_are_chosen_by_name() -> None:
    cases = every_case()
    assert len({case.name for case in cases}) == len(cases)
    assert choose(cases, []) == cases
    assert [case.name for case in choose(cases, ["judge", "*-beam3"])] == [
        "caption-b1-beam3",
        "caption-b8-beam3",
        "judge-16",
        "judge-16-texts",
    ]
    with pytest.raises(ValueError, match="no such case"):
        choose(cases, ["judge", "nothing"])


def test_wrong_usage_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "nothing"]) == 2
    assert "no such case; there are caption-b1-greedy" in capsys.readouterr().err
    assert main(["--list", "--only", "ask-1"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["ask-1", "ask-16"]


def test_differences_are_seen() -> None:
    assert compare(["a", "b"], ["a", "c"], 0.0).equal == 1
    assert not compare(["a", "b"], ["a", "c"], 0.0).holds
    found = compare([np.zeros((2, 2))], [np.array([[0.0, 0.0], [0.0, 0.5]])], 0.1)
    assert (found.difference, found.share, found.holds) == (0.5, 0.25, False)
    assert compare(np.zeros(3), np.full(3, 1e-5), 1e-4).holds
    assert compare(None, None, 0.0).holds


def test_ratios_are_of_medians() -> None:
    case = Case("x", "x", "s", 1, Job("sightloop", "x"), ())
    row = Row(case, "peer", ours=[1.0, 2.0, 9.0], theirs=[4.0, 6.0, 6.0])
    assert row.ratio == 3.0
    assert row.spread == (6 / 9, 4.0)
    assert Row(case, "peer", ours=[1.0], theirs=[2.0]).spread is None
    assert Row(case, "peer", ours=[1.0]).ratio is None
