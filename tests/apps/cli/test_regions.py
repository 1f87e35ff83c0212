"""The commands detect, locate, segment and read on a fake model: rows, files and drawings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import sightloop
from sightloop.apps.cli import common, main
from sightloop.data.images.decode import decode
from sightloop.types import Pixels, Region
from tests.apps.fake_model import FakeModel


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    fake = FakeModel()
    monkeypatch.setattr(common, "load", lambda source, **_: fake)
    return fake


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two images of one name, one of them rotated by EXIF, and a broken one."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "gray").save(folder / "a.png", exif=exif)
    Image.new("RGB", (60, 30), "gray").save(folder / "more" / "a.png")
    (folder / "b.jpg").write_bytes(b"no image")
    return folder


def run(*arguments: object) -> int:
    return main.main([str(argument) for argument in arguments])


def test_detect_writes_rows_files_and_drawings(
    model: FakeModel, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, drawn = tmp_path / "regions.jsonl", tmp_path / "drawn"
    status = run(
        *("detect", photos, "-m", "M", "--phrases", "cat,dog", "--out", out, "--draw", drawn, "--json"),
        *("--num-beams", 2),
    )
    assert status == 1  # b.jpg
    assert model.calls[0] == ("detect", ["cat", "dog"], False, {"num_beams": 2})
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [[region["label"] for region in row["regions"]] for row in rows] == [["cat", "dog"]] * 2
    assert [sample.regions[1].label for sample in sightloop.open_dataset(out)] == ["dog"] * 2
    assert {path.name: decode(path).size for path in drawn.iterdir()} in (
        {"a.jpg": (20, 40), "a-2.jpg": (60, 30)},
        {"a.jpg": (60, 30), "a-2.jpg": (20, 40)},
    )
    assert run("detect", photos, "-m", "M", "--draw", drawn) == 2


def test_a_stopped_run_resumes_and_a_finished_file_takes_new_images(
    model: FakeModel, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "b.jpg").unlink()
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, out):
        folder.mkdir()
    words = ("detect", photos, "-m", "M", "--phrases", "cat", "--batch-size", 1)
    detect = model.detect

    def stopping(images: list[Pixels], *rest: object, **options: object) -> list[list[Region]]:
        if images[0].size == (30, 60):  # the second image
            raise KeyboardInterrupt
        return detect(images, *rest, **options)

    for ending in ("json", "jsonl", "yolo"):
        name = f"regions.{ending}".removesuffix(".yolo")
        monkeypatch.setattr(model, "detect", detect)
        assert run(*words, "--out", whole / name) == 0
        monkeypatch.setattr(model, "detect", stopping)
        assert run(*words, "--out", out / name, "--draw", out / ending) != 0
        assert (out / f"{name}.partial").exists()
        assert not (out / name).exists()
        assert run(*words, "--describe", "--out", out / name) == 2  # both cannot be asked for
        assert run("detect", photos, "-m", "M", "--phrases", "dog", "--out", out / name) == 2  # another run
        monkeypatch.setattr(model, "detect", detect)
        before = len(model.calls)
        assert run(*words, "--out", out / name, "--draw", out / ending) == 0
        assert len(model.calls) == before + 1
        assert len(list((out / ending).iterdir())) == 2
        assert not (out / f"{name}.partial").exists()
        if ending != "yolo":
            assert (out / name).read_text() == (whole / name).read_text()
    Image.new("RGB", (8, 8)).save(photos / "z.png")
    lines = (out / "regions.jsonl").read_text()
    (out / "regions.jsonl").write_text(lines.replace("cat", "my cat").rstrip())
    before = len(model.calls)
    assert run(*words, "--out", out / "regions.jsonl") == 0
    assert len(model.calls) == before + 1
    now = (out / "regions.jsonl").read_text().splitlines()
    assert now[:2] == lines.replace("cat", "my cat").splitlines()
    assert json.loads(now[2])["image"].endswith("z.png")
    assert run(*words, "--out", out / "regions.jsonl") == 0
    assert len(model.calls) == before + 1
    assert run(*words, "--out", out / "regions.json") == 2


def test_tab_separated_rows(model: FakeModel, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("detect", photos / "more", "-m", "M", "--describe") == 0
    name = str(photos / "more" / "a.png")
    assert capsys.readouterr().out == f"{name}\ta thing\t0 0 30 15\t0.5000\n"
    assert run("read", photos / "more", "-m", "M") == 0
    assert "a\t0 0 30 15" in capsys.readouterr().out


def test_every_phrase_is_located_in_every_image(
    model: FakeModel, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        "locate",
        photos,
        "-m",
        "M",
        "--phrases",
        "a cat",
        "-p",
        "two dogs",
        "--out",
        tmp_path / "x.json",
        "--json",
    )
    assert model.calls == [("locate", ["a cat", "two dogs"] * 2, {})]
    assert len(json.loads((tmp_path / "x.json").read_text())["annotations"]) == 4
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [[region["label"] for region in row["regions"]] for row in rows] == [["a cat", "two dogs"]] * 2
    run("segment", photos, "-m", "M", "--region", "1,2,3,4.5", "--out", tmp_path / "labels")
    assert model.calls[-1] == ("segment", [(1.0, 2.0, 3.0, 4.5)] * 2, {})
    assert (tmp_path / "labels" / "classes.txt").is_file()


@pytest.mark.parametrize(
    "line",
    [
        "detect P --phrases a,b --describe",
        "detect P --out x.txt",
        "locate P",
        "locate P -p ' '",
        "segment P",
        "segment P -p a --region 1,2,3,4",
        "segment P --region 1,2,3",
        "segment P --region 3,2,1,4",
        "segment P --region 0,0,inf,4",
        "detect P --region 1,2,3",
        "detect P --region 1,2,3,4 --phrases a",
        "read P --region 1,2,1,4",
        "caption P --region a",
        "caption P --region 1,2,3,4 --length long",
        "caption P --region 1,2,3,4 --prompt a",
    ],
)
def test_wrong_usage(model: FakeModel, photos: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(photos) if word == "P" else word.strip("'") for word in line.split()]
    assert run(*words, "-m", "M") == 2
    assert capsys.readouterr().err.startswith("sightloop: ")
    assert not model.calls


def test_caption_length(model: FakeModel, photos: Path) -> None:
    run("caption", photos / "more", "-m", "M", "--length", "long")
    assert model.calls[0][3] == {"length": "long"}


def test_region_of_an_image(
    model: FakeModel, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more, region = photos / "more", {"region": (1.0, 2.0, 30.0, 20.5)}
    assert run("caption", more, "-m", "M", "--region", "1,2,30,20.5", "--out", tmp_path / "x.jsonl") == 0
    assert model.calls[-1][2:] == (None, region)
    assert run("detect", more, "-m", "M", "--region", "1,2,30,20.5", "--num-beams", 2) == 0
    assert model.calls[-1] == ("detect", None, False, {"num_beams": 2, **region})
    assert run("read", more, "-m", "M", "--region", "1,2,30,20.5") == 0
    assert model.calls[-1] == ("read", region)
    for command in ("caption", "detect", "read"):
        capsys.readouterr()
        assert run(command, "--help") == 0
        assert "--region" in capsys.readouterr().out
