"""The commands index and search: what people and programs see, and what is refused before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sightloop.apps.cli import main
from tests.search.test_index import write_images
from tests.tiny_checkpoints.clip_and_blip import write_clip


def run(*words: object) -> int:
    return main.main([*map(str, words)])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    write_clip(folder / "clip")
    write_images(folder / "photos", 4)
    (folder / "photos" / "002.txt").write_text("a red car\n")
    assert run("index", folder / "photos", "--store", folder / "index", "-m", folder / "clip") == 0
    return folder


def test_index_says_what_it_did(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(place / "photos", 1, start=4)
    (place / "photos" / "broken.jpg").write_text("no image")
    assert run("index", place / "photos", "--store", place / "index", "--json") == 1
    out, err = capsys.readouterr()
    assert [json.loads(line)["action"] for line in out.splitlines()] == ["added"]
    assert "broken.jpg: not an image" in err
    assert "5 images; 1 added." in err
    (place / "photos" / "broken.jpg").unlink()


def test_hits_for_people_programs_and_a_page(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("search", place / "index", "a car", "--words", "red car", "-k", 3)
    assert run(*words, "--out", place / "page.html") == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["1", "2", "3"]
    assert lines[0][2].endswith("002.png")
    assert lines[0][3].endswith("words #1 (red, car)")
    assert lines[0][4] == "a red car"
    page = (place / "page.html").read_text("utf-8")
    assert page.count("data:image/jpeg;base64") == 3
    assert run(*words, "--json") == 0
    hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert hits[0]["captions"] == ["a red car"]
    assert hits[0]["query"] == "a car, words 'red car'"
    assert run("search", place / "index", "--like", hits[0]["id"], "--where", "width>=30", "--json") == 0
    assert len(capsys.readouterr().out.splitlines()) >= 3
    (place / "queries.txt").write_text("a dog\n\na cat\n")
    assert run("search", place / "index", "--queries", place / "queries.txt", "-k", 1, "--json") == 0
    assert [json.loads(line)["query"] for line in capsys.readouterr().out.splitlines()] == ["a dog", "a cat"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("search", "{place}/none", "a car"), "no such folder"),
        (("search", "{place}/index"), "nothing to search for"),
        (("search", "{place}/index", " "), "a text is empty"),
        (("search", "{place}/index", "a car", "--where", "lable=cat"), "did you mean label"),
        (("search", "{place}/index", "a car", "-k", 0), "-k 0: must be at least 1"),
        (("search", "{place}/index", "a car", "--blend", 2), "--blend 2: must be from 0 to 1"),
        (("search", "{place}/index", "--image", "{place}/none.jpg"), "no such file"),
        (("search", "{place}/index", "--like", "nothing"), "no such id"),
        (("search", "{place}/index", "a car", "--out", "page.txt"), "must end in .html"),
        (("index", "{place}/photos", "--store", "{place}/photos"), "exists and is no index"),
        (("index", "{place}/photos", "--store", "{place}/index", "--add-model"), "name the model"),
        (("search", "qdrant://localhost", "a car"), "write qdrant://host:port/collection"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    place: Path, words: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*(str(word).replace("{place}", str(place)) for word in words)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sightloop:")]
    assert len(lines) == 1
    assert message in lines[0]
