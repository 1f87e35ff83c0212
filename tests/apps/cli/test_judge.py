"""`match` over datasets, and `--out` of ask, classify and match: worst first, resumed, warned, nothing in vain."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sightloop.apps.cli import common, judge, main
from tests.apps.fake_model import FakeModel, make_image
from tests.rules import REPOSITORY


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    fake = FakeModel()
    fake.network = None
    monkeypatch.setattr(common, "load", lambda source, **_: fake)
    for module in (judge, sys.modules["sightloop.apps.cli.tables"]):
        monkeypatch.setattr(module, "weights_identity", lambda source, lora=None: f"{source}@1")
    return fake


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i in range(22):
        make_image(tmp_path / "photos" / f"{i:02d}.png", (i, 0, 0))
        (tmp_path / "photos" / f"{i:02d}.txt").write_text(f"caption {i}\n")
    return tmp_path / "photos"


def run(*arguments: object) -> int:
    return main.main([str(argument) for argument in arguments])


def rows(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_captions_of_a_folder_worst_first(
    model: FakeModel, photos: Path, tmp_path: Path, ending: str, capsys
) -> None:
    model.scores = {"caption 4": 0.1, "caption 9": 0.001}
    out = tmp_path / f"scores{ending}"
    assert run("match", photos, "-m", "M", "--out", out) == 0
    err = capsys.readouterr().err
    assert "p: share of captions of other images that fit as well" in err
    assert "22 images: 22 done" in err
    table = rows(out)
    assert [row["caption"] for row in table[:2]] == ["caption 9", "caption 4"]
    assert table[0]["verdict"] == "does not fit"
    reads, before = len(model.read_names), out.read_bytes()
    assert run("match", photos, "-m", "M", "--out", out) == 0
    assert (len(model.read_names), out.read_bytes()) == (reads, before)
    assert "22 skipped" in capsys.readouterr().err


def test_json_rows_and_too_few_images(model: FakeModel, photos: Path, capsys) -> None:
    for path in sorted(photos.glob("*.png"))[3:]:
        path.unlink()
    (photos / "01.txt").unlink()
    assert run("match", photos, "-m", "M", "--json") == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["caption"] for line in out.splitlines()] == ["caption 0", "caption 2"]
    assert "no p-values: 2 images with a caption" in err
    assert "the scores are raw" in err
    assert "it has no caption" in err


def test_a_model_that_judges_its_own_captions_is_warned_about(
    model: FakeModel, photos: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    from sightloop.apps.cli import caption

    monkeypatch.setattr(caption, "weights_identity", lambda source, lora=None: f"{source}@1")
    (photos / "05.txt").unlink()
    (photos / "06.txt").unlink()
    assert run("caption", photos, "-m", "M") == 0
    (photos / "06.txt").write_text("by hand")
    assert run("match", photos, "-m", "M") == 0
    assert "warning: M@1 wrote 1 of these captions itself" in capsys.readouterr().err
    monkeypatch.setattr(judge, "weights_identity", lambda source, lora=None: f"{source}@2")
    assert run("match", photos, "-m", "N") == 0
    assert "itself" not in capsys.readouterr().err
    assert run("caption", photos, "-m", "M", "--out", tmp_path / "c.jsonl") == 0
    monkeypatch.setattr(judge, "weights_identity", lambda source, lora=None: f"{source}@1")
    assert run("match", tmp_path / "c.jsonl", "-m", "M") == 0
    assert "M@1 wrote 22 of these captions itself" in capsys.readouterr().err


def test_ask_and_classify_write_tables_and_resume(model: FakeModel, photos: Path, tmp_path: Path) -> None:
    first = photos / "00.png"
    answers, labels = tmp_path / "a.csv", tmp_path / "l.parquet"
    assert run("ask", first, "-m", "M", "-q", "who?", "--out", answers) == 0
    assert run("ask", photos, "-m", "M", "-q", "who?", "--out", answers) == 0
    assert len(model.read_names) == 22
    assert [row["answer"] for row in rows(answers)[:2]] == ["00: who?", "01: who?"]
    assert run("ask", first, "-m", "M", "-q", "who?", "-q", "why?", "--out", answers) == 0
    assert [row["question"] for row in rows(answers) if row["name"] == str(first)] == ["who?", "why?"]
    model.read_names.clear()
    for _ in range(2):
        assert run("classify", photos, "-m", "M", "--labels", "x,y", "--top", 1, "--out", labels) == 0
    assert len(model.read_names) == 22
    assert {(row["label"], round(row["probability"], 4)) for row in rows(labels)} == {("y", 0.6667)}
    assert run("classify", photos, "-m", "M", "--labels", "x,z", "--out", labels) == 2
    assert run("classify", photos, "-m", "M", "--labels", "x,z", "--out", labels, "--write", "overwrite") == 0


def test_an_interrupted_run_resumes(
    model: FakeModel, photos: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    original = model.match

    def match(images, texts):
        if len(model.calls) == 2:
            raise KeyboardInterrupt
        return original(images, texts)

    monkeypatch.setattr(model, "match", match)
    arguments = ("match", photos, "-m", "M", "--out", tmp_path / "s.csv")
    assert run(*arguments) == 130
    assert "Run the same command again to resume" in capsys.readouterr().err
    assert not (tmp_path / "s.csv").exists()
    model.calls.append("resume")
    assert run(*arguments) == 0
    assert "14 done, 8 skipped" in capsys.readouterr().err
    assert len(rows(tmp_path / "s.csv")) == 22
    assert not (tmp_path / "s.csv.partial").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["match", "photos/00.png"], "give texts to score for this image, or name a folder"),
        (["match", "photos", "a text"], "is a folder"),
        (["match", "gone"], "no such file"),
        (["match", "photos", "--out", "s.txt"], "must end in .jsonl, .csv or .parquet"),
        (["match", "photos/00.png", "a text", "--out", "s.csv"], "--out: is for the captions of a dataset"),
        (["match", "photos", "--explain", "photos"], "exists already"),
        (["ask", "photos", "-q", "who?", "--out", "gone/a.csv"], "does not exist"),
    ],
)
def test_wrong_usage(model: FakeModel, photos: Path, monkeypatch, capsys, arguments, message: str) -> None:
    monkeypatch.chdir(photos.parent)
    assert run(*arguments, "-m", "M") == 2
    assert message in capsys.readouterr().err
    assert not model.read_names


def test_maps_of_the_worst_captions(model: FakeModel, photos: Path, tmp_path: Path, monkeypatch) -> None:
    from sightloop.inference.explanation import HeatMap

    def explain(image, text):
        heat = np.full((3, 4), 1 / 12, np.float32).view(HeatMap)
        heat.score, heat.layer, heat.head, heat.grid = "match", 1, None, np.ones((2, 2), np.float32)
        return heat

    model.explain = explain
    model.scores = {"caption 4": 0.1}
    assert run("match", photos, "-m", "M", "--explain", tmp_path / "maps") == 0
    files = sorted(path.name for path in (tmp_path / "maps").iterdir())
    assert len(files) == 2 * 20
    record = json.loads((tmp_path / "maps" / "0000-04.json").read_text())
    assert (record["text"], record["layer"], record["head"]) == ("caption 4", 1, None)


def test_a_rerun_with_nothing_to_do_loads_no_torch(tmp_path: Path) -> None:
    image = make_image(tmp_path / "p" / "a.png")
    image.with_suffix(".txt").write_text("x")
    (tmp_path / "s.csv").write_text(f"name,caption,match,p,verdict\n{image},x,0.5,,\n")
    (tmp_path / "a.csv").write_text(f"name,question,answer\n{image},who?,me\n")
    (tmp_path / "l.csv").write_text(f"name,label,probability\n{image},cat,0.9\n")
    program = (
        "import sys\nfrom sightloop.apps.cli.main import main\nstatus = main(sys.argv[1:])\n"
        "sys.exit(9 if 'torch' in sys.modules else status)"
    )
    for arguments in (
        ["match", "p", "--out", "s.csv"],
        ["ask", "p", "-q", "who?", "--out", "a.csv"],
        ["classify", "p", "--labels", "cat,dog", "--out", "l.csv"],
    ):
        words = [
            str(tmp_path / word) if word in ("p", "s.csv", "a.csv", "l.csv") else word for word in arguments
        ]
        done = subprocess.run(
            [sys.executable, "-c", program, *words],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            check=False,
        )
        assert (done.returncode, "1 skipped" in done.stderr) == (0, True), done.stderr
