"""The demonstration on a fake model: images, terminal output, page."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sightloop.apps.cli import common
from sightloop.apps.demo import __main__, album
from sightloop.errors import CheckpointError
from tests.apps.fake_model import FakeModel, make_image
from tests.rules import PACKAGE, REPOSITORY


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    fake = FakeModel()
    monkeypatch.setattr(common, "load", lambda source, *, device, dtype: fake)
    monkeypatch.setattr(__main__.webbrowser, "open", lambda address: pytest.fail("opened a browser"))
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    return fake


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(album, "find_spec", lambda name: None)


def packages(folder: Path) -> Path:
    """The two packages as a wheel lays them out; importing them fails."""
    for package, file, *_ in album._PHOTOGRAPHS:
        make_image(folder / package / file, (len(file) * 9, 90, 30))
        (folder / package / "__init__.py").write_text("raise ImportError('a dependency is missing')")
    return folder


def run(*arguments: object) -> int:
    return __main__.main([str(argument) for argument in arguments])


class Page(HTMLParser):
    """The tags of a page, those left open, and the addresses that it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [
            v or "" for k, v in attrs if k in ("src", "href") and not (v or "").startswith("data:")
        ]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_images_of_a_folder(model: FakeModel, tmp_path: Path, capsys) -> None:
    photos = tmp_path / "photos"
    for name in ("a<b>.jpg", "sub/b.png", "sub/c.png"):
        make_image(photos / name, (len(name) * 20, 0, 90))
    (photos / "broken.jpg").write_bytes(b"nothing")
    model.texts = {"b": "one & only"}
    assert run("--photos", photos, "--out", tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert "a<b>\tan image of a<b>" in out
    assert "failed: broken: not an image" in err
    assert str(tmp_path / "out" / "index.html") in out
    assert not list(photos.rglob("*.txt"))

    text = (tmp_path / "out" / "index.html").read_text("utf-8")
    page = Page(text)
    assert page.open == []
    assert page.fetched == []
    assert "script" not in page.tags
    assert page.tags.count("article") == 3
    assert "one &amp; only" in text
    assert "a&lt;b&gt;" in text
    assert not re.search(r"<i> (true|false)</i>", text)  # no true texts are known
    assert "chance" not in text.partition("<body>")[2]


def test_photographs_inside_packages_that_cannot_be_imported(
    model: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.syspath_prepend(packages(tmp_path / "packages"))
    assert run("--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert out.startswith("8 images from scikit-image and scikit-learn, read by fake\n")
    assert "The true text has the highest match in 8 of 8 images (chance: 1 in 3)." in out
    assert re.search(r"comes first for \d of 4 texts \(chance: 1 in 8\)", out)
    text = (tmp_path / "out" / "index.html").read_text("utf-8")
    assert "scikit-learn: danielbuechele, CC BY 2.0" in text
    assert text.count('class="target"') >= 1
    assert run("--count", 3, "--out", tmp_path / "out") == 0
    assert capsys.readouterr().out.startswith("3 images")
    assert not {"skimage", "sklearn"} & set(sys.modules)


def test_rendered_scenes_are_the_fallback(
    model: FakeModel, no_packages: None, tmp_path: Path, capsys
) -> None:
    assert run("--out", tmp_path / "out", "--count", 5) == 0
    out, err = capsys.readouterr()
    assert out.startswith("5 images rendered")
    assert "make demo PHOTOS=folder" in err


def test_missing_capabilities_are_left_out(
    model: FakeModel, no_packages: None, tmp_path: Path, capsys
) -> None:
    model.capabilities = frozenset({"caption"})
    assert run("--out", tmp_path / "out", "--count", 1) == 0
    out = capsys.readouterr().out
    assert "match: fake cannot do this" in out
    text = (tmp_path / "out" / "index.html").read_text("utf-8")
    assert "<blockquote>" in text
    assert "Search" not in text
    assert {name for name, *_ in model.calls} == {"caption"}


def test_one_image_is_enough(model: FakeModel, no_packages: None, tmp_path: Path) -> None:
    assert run("--out", tmp_path / "out", "--count", 1) == 0


def test_the_page_opens_on_a_display(
    model: FakeModel, no_packages: None, tmp_path: Path, monkeypatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(__main__.webbrowser, "open", opened.append)
    monkeypatch.setenv("DISPLAY", ":0")
    assert run("--out", tmp_path / "out", "--count", 2) == 0
    assert opened == [(tmp_path / "out" / "index.html").as_uri()]


def test_errors_name_the_remedy(
    model: FakeModel, no_packages: None, tmp_path: Path, monkeypatch, capsys
) -> None:
    assert run("--photos", tmp_path) == 2
    assert "make demo PHOTOS=folder" in capsys.readouterr().err
    assert run("--count", 0) == 2
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    assert run("--photos", tmp_path, "--out", tmp_path / "out") == 2
    assert "none of the images can be read" in capsys.readouterr().err

    def load(source, *, device, dtype):
        raise CheckpointError(f"{source}: the hub cannot be reached.")

    monkeypatch.setattr(common, "load", load)
    assert run("--out", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "the hub cannot be reached" in err
    assert "make demo MODEL=" in err


def test_with_the_bundled_model(no_packages: None, tmp_path: Path, monkeypatch, capsys) -> None:
    if not (PACKAGE / "nano").is_dir():
        pytest.skip("this source tree has no bundled model")
    monkeypatch.setattr(__main__.webbrowser, "open", lambda address: True)
    assert run("--out", tmp_path / "out", "--count", 3) == 0
    assert "small and often wrong" in capsys.readouterr().out
    text = (tmp_path / "out" / "index.html").read_text("utf-8")
    assert 'class="warning"' in text
    assert "often wrong" in text


def test_photograph_packages_are_the_dependency_group() -> None:
    import tomllib

    groups = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["dependency-groups"]
    named = {line.split(">")[0] for line in groups["demo"]}
    assert named == set(album._DISTRIBUTIONS.values())
    assert "--group demo" in (REPOSITORY / "Makefile").read_text("utf-8")
