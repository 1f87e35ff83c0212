"""The command draw on a tiny painter: files, resume, policies, and what is refused before a model is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sightloop
from sightloop.apps.cli import common, main
from tests.tiny_checkpoints.clip_and_blip import write_clip
from tests.tiny_checkpoints.painter import TEXTS, painter_model


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("painter")
    painter_model(folder).save(folder / "model")
    return folder / "model"


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(source: str, **_: object) -> None:
        raise AssertionError(f"{source} is loaded")

    monkeypatch.setattr(common, "load", load)


@dataclass
class Command:
    """`sightloop draw` with the painter into one folder."""

    painter: Path
    out: Path
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: object, status: int = 0) -> list[dict[str, object]]:
        line = ["draw", *arguments, "-m", self.painter, "--out", self.out, "--json"]
        assert main.main([str(argument) for argument in line]) == status
        return [json.loads(row) for row in self.capsys.readouterr().out.splitlines()]


@pytest.fixture
def draw(painter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(painter, tmp_path / "drawn", capsys)


def read(path: object) -> Image.Image:
    with Image.open(str(path)) as image:
        image.load()
    return image


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_texts_of_arguments_and_of_a_file_are_drawn_once(draw: Command, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text(f"{TEXTS[1]}\n\n  {TEXTS[0]} \n{TEXTS[2]}\n")
    rows = draw(TEXTS[0], "--file", texts, "-n", 2, "--seed", 3, "--steps", 2)
    assert [row["text"] for row in rows] == [text for text in TEXTS for _ in range(2)]
    images = sightloop.load(draw.painter, device="cpu").draw(TEXTS, 2, seed=3, steps=2)
    for row, image in zip(rows, images, strict=True):
        opened = read(row["file"])
        assert np.array_equal(np.asarray(opened), np.asarray(image))
        info = opened.info
        assert (info["prompt"], info["source"]) == (row["text"], "synthetic")
        assert info["model"] == image.info["model"]
        assert (json.loads(info["number"]), json.loads(info["seed"])) == (image.info["number"], 3)
        assert json.loads(info["settings"]) == image.info["settings"]
        assert image.info["settings"]["steps"] == 2
    samples = list(sightloop.open_dataset(draw.out))
    assert sorted(sample.captions[0] for sample in samples) == sorted(TEXTS * 2)
    assert {sample.extra["source"] for sample in samples} == {"synthetic"}


def test_the_best_by_a_judge_are_kept(draw: Command) -> None:
    rows = draw(*TEXTS[:2], "-n", 3, "--keep", 2, "--judge", "nano", "--batch-size", 32)
    images = sightloop.load(draw.painter, device="cpu").draw(TEXTS[:2], 3, keep=2, judge="nano")
    assert [row["score"] for row in rows] == pytest.approx(
        [image.info["scores"]["itm"] for image in images], abs=1e-3
    )
    assert [json.loads(read(row["file"]).info["number"]) for row in rows] == [
        image.info["number"] for image in images
    ]
    assert len(contents(draw.out)) == 2 * 2 * 2  # of a PNG and a JSON file each


def test_a_resumed_run_draws_what_is_missing_and_equals_an_unbroken_one(draw: Command) -> None:
    draw(*TEXTS, "-n", 2)
    unbroken = contents(draw.out)
    png = sorted(name for name in unbroken if name.endswith(".png"))
    (draw.out / png[1]).unlink()  # killed between the two files
    for path in (draw.out / png[4], (draw.out / png[4]).with_suffix(".json")):
        path.unlink()
    rows = draw(*TEXTS, "-n", 2)
    assert {Path(str(row["file"])).name for row in rows} == {png[1], png[4]}
    assert contents(draw.out) == unbroken
    draw(TEXTS[0], "-n", 2, "--seed", 1)
    assert len(contents(draw.out)) == len(unbroken) + 4  # other images have other names


def test_files_of_a_person_are_kept(draw: Command, tmp_path: Path) -> None:
    draw(*TEXTS)
    first, second, _ = sorted(draw.out.glob("*.png"))
    first.write_bytes(b"retouched")
    second.with_suffix(".json").write_text('{"captions": ["my own words"]}')
    second.unlink()
    draw(*TEXTS)
    assert first.read_bytes() == b"retouched"
    assert "my own words" in second.with_suffix(".json").read_text()
    assert second.is_file()
    photo = tmp_path / "photo.png"
    Image.new("RGB", (8, 8)).save(photo)
    before = photo.read_bytes()
    draw(*TEXTS, "--grid", photo, status=2)
    assert photo.read_bytes() == before


def test_a_grid_shows_every_image_and_is_written_again(draw: Command, tmp_path: Path) -> None:
    grid = tmp_path / "grid.png"
    draw(*TEXTS[:1], "--grid", grid)
    one = read(grid).size
    draw(*TEXTS, "--grid", grid)
    assert read(grid).height > 2 * one[1]


def test_a_policy_leaves_out_words_and_concepts_and_counts_them(
    draw: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip, policy = tmp_path / "clip", tmp_path / "policy.toml"
    write_clip(clip)
    images = sightloop.load(draw.painter, device="cpu").draw(TEXTS[:2], 2)
    cosines = sightloop.load(clip, device="cpu").similarity(images, ["a cat"])[:, 0]
    threshold = float(np.sort(cosines)[1:3].mean())
    policy.write_text(
        f'words = ["rings"]\njudge = "{clip}"\n[[concepts]]\ntext = "a cat"\nthreshold = {threshold}\n'
    )
    line = ["draw", *TEXTS, "-n", "2", "--policy", policy, "-m", draw.painter, "--out", draw.out, "--json"]
    assert main.main([str(argument) for argument in line]) == 1
    out, err = capsys.readouterr()
    rows = [json.loads(row) for row in out.splitlines()]
    drawn = [np.asarray(read(row["file"])) for row in rows]
    allowed = [
        np.asarray(image) for image, cosine in zip(images, cosines, strict=True) if cosine <= threshold
    ]
    assert len(drawn) == 2
    assert all(np.array_equal(*pair) for pair in zip(drawn, allowed, strict=True))
    assert 'failed: three white rings: the policy has the word "rings"' in err
    assert "2 of 4 drawn images are left out" in err
    assert "2 done, 0 skipped, 3 failed" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "TEXT: none is given"),
        (["a", "--file", "nowhere.txt"], "--file nowhere.txt"),
        ([" "], "a text is empty"),
        (["a", "-n", "0"], "--number"),
        (["a", "-n", "2", "--keep", "3", "--judge", "nano"], "--keep 3: is more than the 2"),
        (["a", "-n", "2", "--keep", "1"], "add --judge MODEL"),
        (["a", "--judge", "nowhere/model.pt"], "nowhere/model.pt"),
        (["a", "--steps", "0"], "--steps"),
        (["a", "--guidance", "-1"], "--guidance"),
        (["a", "--size", "big"], "--size big: must be a side in pixels"),
        (["a", "--strength", "0.5"], "--init and --strength: give both"),
        (["a", "--init", "nowhere.png", "--strength", "0.5"], "--init nowhere.png: no such file"),
        (["a", "--grid", "grid.jpg"], "must end in .png"),
        (["a", "--grid", "drawn/grid.png"], "is in drawn"),
        (["a", "--policy", "nowhere.toml"], "nowhere.toml: no policy"),
        (["a", "-m", "nano"], "nano cannot draw"),
        (["a", "-m", "nowhere"], "nowhere"),
    ],
)
def test_wrong_options_are_refused_before_a_model_is_loaded(
    arguments: list[str],
    message: str,
    draw: Command,
    tmp_path: Path,
    no_model: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = [] if "-m" in arguments else ["-m", str(draw.painter)]
    assert main.main(["draw", *arguments, *model, "--out", "drawn"]) != 0
    assert message in " ".join(draw.capsys.readouterr().err.split())
    assert not Path("drawn").exists()


def test_nothing_to_do_imports_no_torch(draw: Command) -> None:
    draw(*TEXTS)
    program = (
        "import sys; from sightloop.apps.cli.main import main; "
        "print(main(sys.argv[1:]), 'torch' in sys.modules)"
    )
    line = [sys.executable, "-c", program, "draw", *TEXTS, "-m", str(draw.painter), "--out", str(draw.out)]
    assert subprocess.run(line, capture_output=True, text=True, check=True).stdout.split() == ["0", "False"]
