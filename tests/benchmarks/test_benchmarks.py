"""The benchmark runs, its sides agree, and what it prints and writes has its form. Never a time."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import photographs
from benchmarks.cases import Case, Job, choose, every_case, quick_cases
from benchmarks.report import FEATURES, Row, compare, worst
from benchmarks.run import main
from sightloop.apps.demo.album import DemoImage
from tests.rules import REPOSITORY

# Every kind of work once.
NAMES = [
    *("caption-b1-greedy", "caption-b8-beam3", "encode-blip-b8", "judge-16", "judge-16-texts", "ask-16"),
    "bootstrap-b8",
    *(
        "clip-images-b32",
        "clip-files-b32",
        "clip-files-alone",
        "clip-texts-b64",
        "pixels-clip-exact-t2",
        "pixels-blip-fast-t1",
    ),
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
        "auto-caption-b1-beam3",
        "auto-caption-b8-beam3",
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


def test_photographs_and_captions_of_a_folder_come_first(tmp_path: Path) -> None:
    Image.new("RGB", (90, 60), (200, 10, 10)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red board\n")
    with tarfile.open(tmp_path / "b.tar", "w") as shard:
        content = io.BytesIO()
        Image.new("RGB", (50, 80), (10, 200, 10)).save(content, "JPEG")
        for name, data in (
            ("b.jpg", content.getvalue()),
            ("b.json", json.dumps({"captions": ["a green board", "green"]}).encode()),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    notes: list[str] = []
    images = list(photographs.photographs(tmp_path, 3, notes))
    assert [image.size for image in images] == [(640, 480)] * 3
    assert [int(np.asarray(image).mean(axis=(0, 1)).argmax()) for image in images] == [0, 1, 0]
    assert photographs.captions(tmp_path, 3, notes) == ["a red board", "a green board", "a red board"]
    assert len(notes) == 2


def test_without_a_folder_the_packages_photographs_and_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8))
    content = io.BytesIO()
    inside.save(content, "PNG")
    album = [DemoImage("noise", content, "a screen without a signal")]  # type: ignore[arg-type]
    monkeypatch.setattr(photographs, "_album", lambda: album)
    parts = [np.asarray(image) for image in photographs.photographs(None, 4, [])]
    assert all(part.shape == (480, 640, 3) for part in parts)
    assert not any(np.array_equal(parts[0], part) for part in parts[1:])
    assert photographs.captions(None, 2, []) == ["a screen without a signal"] * 2
    monkeypatch.setattr(photographs, "_album", tuple)
    notes: list[str] = []
    assert len(set(photographs.captions(None, 8, notes))) == 8
    assert len(list(photographs.photographs(None, 2, notes))) == 2
    assert len(notes) == 2


def test_the_worst_row_is_named() -> None:
    case = Case("x", "x", "s", 1, Job("sightloop", "x"), ())
    rows = [Row(case, "a", [1.0], [2.0], wanted=1.5), Row(case, "b", [1.0], [0.5], wanted=1.0), Row(case)]
    assert worst(rows) == "worst row: x, 0.50x of b; 1 of 2 rows below what is wanted"
    assert "nothing was compared" in worst([Row(case)])


def test_the_machine_and_its_kernels_are_printed(run: tuple[str, dict[str, Any]]) -> None:
    out, written = run
    assert written["machine"]["processor"]
    assert set(written["machine"]["features"]) <= set(FEATURES)
    assert {"caption", "clip"} <= set(written["machine"]["kernels"])
    for counts in written["machine"]["kernels"].values():
        assert sum(counts.values()) > 0
    assert "kernels:" in " ".join(out.split())
    assert out.rstrip().splitlines()[-1].startswith("worst row: ")


def test_a_quick_run_has_every_kind_of_inference() -> None:
    names = {case.name for case in quick_cases()}
    assert {"caption-b8-beam3", "clip-files-alone", "judge-16", "pixels-blip-fast-t2"} <= names
    assert not any(name.startswith(("train", "memory", "bootstrap")) for name in names)


def test_a_folder_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--data", str(tmp_path / "absent")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
