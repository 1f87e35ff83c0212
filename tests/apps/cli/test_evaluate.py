"""The command evaluate: table, JSON, exit statuses, failed images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sightloop.apps.cli import main
from sightloop.checkpoints.hub import BUNDLED_FOLDER
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from tests.tiny_checkpoints.clip_and_blip import write_blip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluating")
    write_blip(folder / "caption")
    write_blip(folder / "match", head="match")
    write_synthetic_world(folder / "world.tar", synthetic_world("train", 8, 1))
    return folder


def run(*words: object) -> int:
    return main.main(["evaluate", *map(str, words)])


def test_table(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "captions",
        "-d",
        place / "world.tar",
        "-m",
        place / "caption",
        "--max-new-tokens",
        5,
        "-o",
        tmp_path,
    )
    assert run(*words, "--samples", 6) == 0
    out, err = capsys.readouterr()
    rows = dict(line.split("\t", 1) for line in out.splitlines())
    assert "CIDEr" in rows
    assert rows["length"].endswith("6 images")
    assert "6 done, 0 skipped" in err
    assert "METEOR: not computed" in err
    assert (tmp_path / "report.html").is_file()
    assert run(*words, "--samples", 6) == 0
    again = capsys.readouterr()
    assert again.out == out
    assert "0 done, 6 skipped" in again.err
    assert run(*words, "--samples", 5) == 2
    assert "other data" in capsys.readouterr().err


def test_json_lines(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("retrieval", "-d", place / "world.tar")
    assert run(*words, "-m", place / "match", "--rerank", 2, "--rerank", 4, "-o", tmp_path, "--json") == 0
    out = capsys.readouterr().out
    numbers = [json.loads(line) for line in out.splitlines()]
    assert {"image-to-text recall@1, k=2", "text-to-image median rank, k=4"} <= {n["name"] for n in numbers}
    assert all(n["low"] <= n["high"] and n["protocol"] and n["samples"] == 8 for n in numbers)
    assert run(*words, "--predictions", tmp_path / "predictions.jsonl", "--json") == 0
    assert [json.loads(line)["value"] for line in capsys.readouterr().out.splitlines()] == [
        number["value"] for number in numbers
    ]


def test_two_models_in_one_table(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = ("-m", place / "match", "-m", place / "match")
    assert run("matching", "-d", place / "world.tar", *both, "--train-data", place / "world.tar") == 0
    out, err = capsys.readouterr()
    assert "roc_auc (hard)" in out
    assert "+0.0000 (+0.0000 to +0.0000)" in out
    assert "8 evaluation images are in the training data" in err


def test_broken_images_are_reported(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, sample in enumerate(synthetic_world("train", 3, 1)):
        assert isinstance(sample.image, bytes)
        (tmp_path / f"{i}.png").write_bytes(sample.image if i else b"no image")
        (tmp_path / f"{i}.txt").write_text(sample.captions[0])
    assert run("retrieval", "-d", tmp_path, "-m", place / "match") == 1
    err = capsys.readouterr().err
    assert "failed: 0: " in err
    assert "1 left out" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("captions", "-m", "nowhere"), "--data"),
        (("captions", "-d", "WORLD", *"-m a -m b -m c".split()), "one or two models"),
        (("captions", "-d", "nowhere", "-m", "x"), "nowhere"),
        (("captions", "-d", "WORLD", "-m", "nowhere"), "nowhere"),
        (("captions", "-d", "WORLD", "-m", "MATCH"), "cannot caption"),
        (("detect", "-d", "WORLD", "-m", "MATCH"), "--predictions FILE"),
        (("taste", "-d", "WORLD", "-m", "MATCH"), "taste"),
        (("captions", "-d", "WORLD", "-m", "MATCH", "--samples", "0"), "--samples"),
    ],
)
def test_wrong_usage(
    place: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"WORLD": str(place / "world.tar"), "MATCH": str(place / "match")}
    assert run(*(names.get(word, word) for word in words)) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_default_model_is_the_bundled_one_with_a_notice(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not BUNDLED_FOLDER.is_dir():
        pytest.skip("this source tree has no bundled model")
    assert run("captions", "-d", place / "world.tar", "--max-new-tokens", 5, "--json") == 0
    out, err = capsys.readouterr()
    assert err.startswith("using the bundled model nano ")
    assert [json.loads(line) for line in out.splitlines()]
    assert run("detect", "-d", place / "world.tar") == 2
    assert "nano" in (err := capsys.readouterr().err)
    assert "cannot detect" in err
