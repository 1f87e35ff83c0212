"""YOLO data sets: those that we write, and class names as other programs write them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

import sightloop
from sightloop.annotation.region_files import write_regions
from sightloop.data.datasets.yolo_names import class_names_file, read_class_names
from sightloop.errors import ImageError, UsageError
from sightloop.types import Region


def test_what_we_write_is_read_back(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    images = tmp_path / "photos"
    (images / "more").mkdir(parents=True)
    Image.new("RGB", (40, 20)).save(images / "a.png", exif=exif)  # 20 x 40 once upright
    Image.new("RGB", (60, 30)).save(images / "more" / "b.png")
    rows = [
        (str(images / "a.png"), [Region("a cat", (5, 10, 20, 40)), Region('"x": y', (0, 0, 10, 4))]),
        (str(images / "more" / "b.png"), [Region("dog, é", (6, 3, 60, 30), ((6, 3, 60, 3, 30, 30),))]),
    ]
    write_regions(tmp_path / "out", "yolo", rows)
    (tmp_path / "out" / "classes.txt").unlink()
    for dataset in (
        sightloop.open_dataset(tmp_path / "out", images=images),
        _with_link(tmp_path, images),
    ):
        assert [sample.key for sample in dataset] == ["a", "more/b"]
        for sample, (_, regions) in zip(dataset, rows, strict=True):
            assert [region.label for region in sample.regions] == [region.label for region in regions]
            for region, original in zip(sample.regions, regions, strict=True):
                assert region.box == pytest.approx(original.box, abs=1e-4)
                assert len(region.polygons) == len(original.polygons)


def _with_link(tmp_path: Path, images: Path) -> sightloop.Dataset:
    (tmp_path / "out" / "images").symlink_to(images)
    return sightloop.open_dataset(tmp_path / "out")


@pytest.mark.parametrize(
    "text",
    [
        "path: .\nnames:\n  0: cat  # small\n  1: 'a dog''s'\n  2: \"b\\u00e9\"\nnc: 3\n",
        "names: [cat, 'a dog''s', \"b\\u00e9\"]\nnc: 3",
        "nc: 3\nnames:\n- cat\n- 'a dog''s'\n- bé\n\ntrain: x",
        "names: {0: cat, 1: a dog's, 2: bé}",
        "names: [\n  cat,\n  a dog's,\n  bé\n]\n",
    ],
)
def test_class_names(text: str, tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text(text)
    assert read_class_names(class_names_file(tmp_path)) == {0: "cat", 1: "a dog's", 2: "bé"}
    (tmp_path / "classes.txt").write_text("cat\n\na dog's\nbé\n")
    assert read_class_names(class_names_file(tmp_path)) == {0: "cat", 1: "a dog's", 2: "bé"}
    # of the parent folder
    assert read_class_names(class_names_file(tmp_path / "train")) == {0: "cat", 1: "a dog's", 2: "bé"}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('names: ["car, red", dog]', ["car, red", "dog"]),
        ("names:\n- tool [big]\n- 'no # 5'\n", ["tool [big]", "no # 5"]),
        ("names: [no, 1.0, null]", ["no", "1.0", "null"]),  # not what YAML makes of them
        ('path: ../x\nnames:\n  0: a\n  1: "b: c"\n', ["a", "b: c"]),
    ],
)
@pytest.mark.parametrize("file", ["data.yaml", "coco128.yml"])
def test_names_are_read_as_yaml(file: str, text: str, names: list[str], tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / file).write_text(text)
    found = class_names_file(tmp_path)
    assert found is not None
    assert list(read_class_names(found).values()) == names


@pytest.mark.parametrize(
    "data",
    [
        b"names: [caf\xe9]",
        b"names: [a, b",
        b"names: {0: a, 0: b}",
        b"names: {x: a}",
        b"names: [[a]]",
        b"names: [a]\nnames: [b]",
        b"names: 5",
        b"names: " + b"[" * 5000,
        b'names: ["\\ud800"]',
        b"a: &a [x, x]\nb: &b [*a, *a, *a]\nnames: [*b, *b, *b]",
        b"\0",
    ],
)
def test_damaged_yaml_is_refused_by_name(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_bytes(data)
    with pytest.raises(UsageError, match=r"data\.yaml"):
        read_class_names(tmp_path / "data.yaml")


def test_layouts(tmp_path: Path) -> None:
    image = Image.new("RGB", (10, 10))
    for folder in ("rooted/images", "split/train/images", "split/valid/images", "together"):
        (tmp_path / folder).mkdir(parents=True)
        image.save(tmp_path / folder / "a.b.png")
    line = "1.0e+00 .5 .5 1 1\n"
    for folder in ("rooted/labels", "split/train/labels", "split/valid/labels", "together"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "a.b.txt").write_text(line)
    (tmp_path / "rooted/labels/other.txt").write_text(line)
    with pytest.raises(UsageError, match=r"YOLO labels, not captions"):
        sightloop.open_dataset(tmp_path / "together")
    for folder in ("rooted", "split", "together"):
        (tmp_path / folder / "classes.txt").write_text("cat\ndog\n")
        samples = list(sightloop.open_dataset(tmp_path / folder))
        assert len(samples) == (2 if folder == "split" else 1)
        for sample in samples:
            assert sample.captions == ()
            assert sample.regions == (Region("dog", (0, 0, 10, 10)),)
    notes = sightloop.open_dataset(tmp_path / "rooted").notes
    assert "rooted: 1 label files belong to no image and are left out" in notes
    (tmp_path / "together/a.b.txt").write_text("a caption\n")
    assert next(iter(sightloop.open_dataset(tmp_path / "together"))).captions == ("a caption",)


@pytest.mark.parametrize(
    "line", ["nan .5 .5 1 1", "0 .5 .5 1 inf", "0.5 .5 .5 1 1", "1e400 .5 .5 1 1", "-1 .5 .5 1 1"]
)
def test_numbers_that_are_none_are_named(line: str, tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (10, 10)).save(tmp_path / "images/a.png")
    (tmp_path / "classes.txt").write_text("cat\n")
    (tmp_path / "labels/a.txt").write_text(line)
    with pytest.raises(ImageError, match=r"a\.txt, line 1"):
        sightloop.open_dataset(tmp_path)[0]
    (tmp_path / "labels/a.txt").unlink()
    os.mkfifo(tmp_path / "labels/a.txt")
    with pytest.raises(ImageError, match="not a plain file"):
        sightloop.open_dataset(tmp_path)[0]


def test_keypoints_are_left_out_with_a_note(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (10, 10)).save(tmp_path / "images/a.png")
    (tmp_path / "pose.yaml").write_text("kpt_shape: [2, 2]\nnames: [person]\n")
    (tmp_path / "labels/a.txt").write_text("0 .5 .5 1 1 .1 .1 .2 .2")
    dataset = sightloop.open_dataset(tmp_path)
    assert dataset[0].regions == (Region("person", (0, 0, 10, 10)),)
    assert "keypoints are left out" in dataset.notes[0]


def test_errors_name_the_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(UsageError, match="--images"):
        sightloop.open_dataset(tmp_path)
    (tmp_path / "images").mkdir()
    for name in "abcd":
        Image.new("RGB", (10, 10)).save(tmp_path / "images" / f"{name}.png")
    for name, line in (("a", "0 .5 .5 1 1 .25"), ("b", "1 .5 .5 1 1"), ("c", "0 .5 .5 1")):
        (tmp_path / "labels" / f"{name}.txt").write_text(f"\n{line}\n")
    dataset = sightloop.open_dataset(tmp_path)
    assert dataset[0].regions == (Region("cat", (0, 0, 10, 10), score=0.25),)
    for index, reason in ((1, "line 2: not a class"), (2, "line 2: 3 numbers")):
        with pytest.raises(ImageError, match=reason):
            dataset[index]
    assert dataset[3].regions == ()
    before = dataset.fingerprint
    (tmp_path / "labels" / "d.txt").write_text("0 .5 .5 1 1\n")
    assert sightloop.open_dataset(tmp_path).fingerprint != before
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "data.yaml").write_text("nc: 3\n")
    with pytest.raises(UsageError, match="no class names"):
        sightloop.open_dataset(tmp_path)
