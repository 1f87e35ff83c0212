"""`sightloop duplicates`: tables, JSON, lists and pages; wrong input is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import ImageOps

from sightloop.apps.cli.main import main
from tests.data.copies.scenes import encoded, scene


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(encoded(scene(1)))
    (photos / "b.png").write_bytes(encoded(scene(2)))
    (photos / "a2.png").write_bytes(encoded(scene(1)))
    (photos / "b small.jpg").write_bytes(encoded(ImageOps.mirror(scene(2)).resize((70, 70)), "JPEG"))
    return photos


def test_the_table_and_the_list(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    extras, page = tmp_path / "extras.txt", tmp_path / "page.html"
    assert (
        main(["duplicates", str(folder), "--keep", "first", "--list", str(extras), "--out", str(page)]) == 0
    )
    captured = capsys.readouterr()
    rows = [line.split("\t") for line in captured.out.splitlines()]
    assert [(row[0], row[1], Path(row[3]).name) for row in rows] == [
        ("1", "yes", "a.png"),
        ("1", "no", "a2.png"),
        ("2", "yes", "b small.jpg"),
        ("2", "no", "b.png"),
    ]
    assert rows[1][4] == "identical: the same bytes (SHA-256)"
    assert "mirrored" in rows[3][4]
    assert "4 in 2 clusters (1 with identical images, 1 with copies)" in captured.err
    assert extras.read_text().splitlines() == [str(folder / "a2.png"), str(folder / "b.png")]
    assert page.read_text().count("<img") == 4
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_json_has_an_object_a_cluster(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["duplicates", str(folder), "--kinds", "identical", "--json"]) == 0
    (cluster,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert [image["keep"] for image in cluster["images"]] == [True, False]
    assert cluster["edges"][0]["kind"] == "identical"


def test_a_broken_image_is_named_and_the_others_are_compared(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    assert main(["duplicates", str(folder)]) == 1
    captured = capsys.readouterr()
    assert "broken.jpg" in captured.err
    assert len(captured.out.splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kinds", "same"], "there are identical, copy, look-alike"),
        (["--kinds", "look-alike"], "--model"),
        (["--where", "width>3"], "sightloop index"),
        (["--out", "page.txt"], ".html"),
        (["--keep", "newest"], "keep"),
    ],
)
def test_wrong_options_are_refused(
    folder: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["duplicates", str(folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_convert_leaves_copies_out(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(folder), str(tmp_path / "x.tar"), "--dedupe"]) == 0
    error = capsys.readouterr().err
    assert "2 images were left out, 1 with the same bytes as another and 1 copies" in error
    assert "2 samples" in error
