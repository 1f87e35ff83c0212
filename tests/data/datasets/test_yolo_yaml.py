"""YOLO data sets by their .yaml file: paths as Ultralytics, Roboflow and Darknet write them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

import sightloop
from sightloop.errors import UsageError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    for folder, split in (
        ("images/train", "labels/train"),
        ("images/val", "labels/val"),
        ("valid/images", "valid/labels"),
    ):
        name = folder.replace("/", "-")
        (root / folder).mkdir(parents=True)
        (root / split).mkdir(parents=True)
        Image.new("RGB", (10, 10)).save(root / folder / f"{name}.png")
        (root / split / f"{name}.txt").write_text("1 .5 .5 1 1\n")
    return root


def read(file: Path) -> dict[str, list[str]]:
    return {s.key.rpartition("/")[2]: [r.label for r in s.regions] for s in sightloop.open_dataset(file)}


TRAIN, VAL, VALID = "images-train", "images-val", "valid-images"


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("train: images/train\nval: images/val", [TRAIN, VAL]),
        ("train: images/train\nval: images/train", [TRAIN]),
        ("train: [images/train, images/val]\nval:\ntest: ", [TRAIN, VAL]),
        ("path: .\ntrain: images", [TRAIN, VAL]),
        ("path: set\ntrain: images/train", [TRAIN]),  # from the folder above
        ("path: /elsewhere\ntrain: images/train", [TRAIN]),
        ("train: ../valid/images", [VALID]),  # Roboflow
        ("train: valid", [VALID]),
        ("train: list.txt", [TRAIN, VAL]),
    ],
)
def test_paths(root: Path, text: str, keys: list[str]) -> None:
    listed = ["./images/train/images-train.png", str(root / "images/val/images-val.png"), "./images/gone.png"]
    (root / "list.txt").write_text("\n".join(listed))
    (root / "any name.yaml").write_text(text + "\nnames: [cat, dog]\n")
    assert read(root / "any name.yaml") == {key: ["dog"] for key in keys}


def test_notes(root: Path) -> None:
    (root / "list.txt").write_text("./images/train/images-train.png\n./images/gone.png\n")
    (root / "x.yml").write_text("train: list.txt\nval: [images/val, nothing]\nnames: [cat, dog]\n")
    notes = "\n".join(sightloop.open_dataset(root / "x.yml").notes)
    for what in ("val: nothing not found", "train, val are all read", "1 of 2 images are not found"):
        assert what in notes
    assert os.path.sep + "gone" not in notes


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("path: images", "no train"),
        ("train: images/train", "no class names"),
        ("train: gone\nnames: [cat]", "gone not found"),
        ("train: {a: b}\nnames: [cat]", "no text"),
        ("train: images/train\ntrain: images/val\nnames: [cat]", "twice"),
        ("[", "YAML"),
        ("train: '\"\nnames: x", "YAML"),
    ],
)
def test_files_that_name_nothing_are_refused(root: Path, text: str, reason: str) -> None:
    (root / "labels").rename(root / "others")  # with it, the file is one of class names
    (root / "x.yaml").write_text(text)
    with pytest.raises(UsageError, match=reason) as caught:
        sightloop.open_dataset(root / "x.yaml")
    assert "x.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_names_opens_its_folder(root: Path) -> None:
    (root / "valid/notes.yaml").write_text("names: [cat, dog]")
    assert read(root / "valid/notes.yaml") == {VALID: ["dog"]}
