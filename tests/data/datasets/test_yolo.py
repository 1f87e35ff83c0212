"""YOLO data sets: those that we write, and class names as other programs write them."""

from __future__ import annotations

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
    assert read_class_names(class_names_file(tmp_path / "train")) == {
        0: "cat",
        1: "a dog's",
        2: "bé",
    }  # of the parent folder


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
