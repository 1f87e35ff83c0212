"""The command convert: summary, notes, standard input, wrong usage."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from sightloop import open_dataset
from sightloop.apps.cli import main
from tests.data.datasets.sources import picture, put, tar


def run(*arguments: object) -> int:
    return main.main([str(argument) for argument in arguments])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(3):
        put(tmp_path / f"photos/{number}.jpg", picture(number))
        put(tmp_path / f"photos/{number}.txt", f"number {number}\n")
    return tmp_path / "photos"


def test_convert_prints_a_summary(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(photos / "broken.jpg", "<html>")
    assert run("convert", photos, tmp_path / "x-{000..}.tar", "--shard-size", 2, "--json") == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "target": str(tmp_path / "x-{000..}.tar"), "kind": "tar", "samples": 3, "failed": 1, "notes": [],
    }  # fmt: skip
    assert "failed: broken: not an image" in err
    assert "4 images: 3 done, 0 skipped, 1 failed" in err
    assert sorted(path.name for path in tmp_path.glob("x-*")) == ["x-000.tar", "x-001.tar"]
    assert run("convert", tmp_path / "x-{000..001}.tar", tmp_path / "x.parquet") == 0
    assert [sample.captions for sample in open_dataset(tmp_path / "x.parquet")] == [
        (f"number {i}",) for i in range(3)
    ]


def test_notes_and_several_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [
        tar(
            tmp_path / f"{i}.tar",
            {f"{i}.jpg": picture(i), f"{i}.json": '{"captions": ["", "a"]}', f"{i}.npy": ""},
        )
        for i in range(2)
    ]
    assert run("convert", *sources, tmp_path / "x.csv") == 0
    err = capsys.readouterr().err
    assert "Note: 2 empty captions, which csv cannot hold." in err
    assert err.count("left out: 1 .npy") == 2
    assert run("convert", *sources, tmp_path / "x.csv") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run("convert", *sources, tmp_path / "x.csv", "--overwrite") == 0


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tar(tmp_path / "0.tar", {"0.jpg": picture(), "0.txt": "x"}).read_bytes()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert run("convert", "-", tmp_path / "x.jsonl") == 0
    assert [(s.key, s.captions) for s in open_dataset(tmp_path / "x.jsonl")] == [("0", ("x",))]


@pytest.mark.parametrize("line", ["photos", "gone x.tar", "photos x.zip", "photos x.tar --bogus"])
def test_wrong_usage(line: str, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos.parent)
    assert run("convert", *line.split()) == 2
    assert [path.name for path in photos.parent.iterdir()] == ["photos"]
