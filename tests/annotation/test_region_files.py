"""Region files: read back by `open_dataset` and by other programs; written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sightloop
from sightloop.annotation.region_files import RegionFile, RegionRow, write_regions
from sightloop.errors import ImageError, UsageError
from sightloop.types import Region

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture
def rows(tmp_path: Path) -> list[RegionRow]:
    """Two images, the second with an EXIF rotation, and one without regions."""
    (tmp_path / "photos" / "more").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    paths = [str(tmp_path / "photos" / name) for name in ("a.png", "more/b.jpg", "c.png")]
    Image.new("RGB", (40, 30)).save(paths[0])
    Image.new("RGB", (80, 50)).save(paths[1], exif=exif)  # upright: 50 wide, 80 high
    Image.new("RGB", (8, 8)).save(paths[2])
    mask = np.zeros((80, 50), bool)
    mask[10:40, 5:25] = True
    first = [
        Region("cat", (4.0, 3.0, 20.0, 27.0), score=0.75),
        Region("dog: a \u00fc", (0.0, 0.0, 40.0, 30.0), ((0.0, 0.0, 40.0, 0.0, 0.0, 30.0),), 0.5),
    ]
    return [
        (paths[0], first),
        (paths[1], [Region("cat", (5.0, 10.0, 25.0, 40.0), mask=mask)]),
        (paths[2], []),
    ]


@pytest.mark.parametrize("kind", ["coco", "jsonl"])
def test_our_own_reader_reads_them_back(rows: list[RegionRow], kind: RegionFile, tmp_path: Path) -> None:
    path = tmp_path / ("x.json" if kind == "coco" else "x.jsonl")
    assert write_regions(path, kind, rows) == 3
    samples = list(sightloop.open_dataset(path))
    assert [(str(Path(str(s.image)).resolve()), s.regions) for s in samples] == [
        (p, tuple(r)) for p, r in rows
    ]
    for sample, (_, regions) in zip(samples, rows, strict=True):
        for read, written in zip(sample.regions, regions, strict=True):
            assert (read.mask is None) == (written.mask is None)
            assert written.mask is None or np.array_equal(read.mask, written.mask)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_coco_as_pycocotools_reads_it(rows: list[RegionRow], tmp_path: Path) -> None:
    reader = pytest.importorskip("pycocotools.coco")
    write_regions(tmp_path / "x.json", "coco", rows)
    coco = reader.COCO(str(tmp_path / "x.json"))
    assert [(i["id"], i["width"], i["height"]) for i in coco.loadImgs(coco.getImgIds())] == [
        (1, 40, 30),
        (2, 50, 80),
        (3, 8, 8),
    ]
    notes = coco.loadAnns(coco.getAnnIds())
    assert [(n["id"], n["image_id"], n["category_id"], n["bbox"], n.get("score")) for n in notes] == [
        (1, 1, 1, [4, 3, 16, 24], 0.75),
        (2, 1, 2, [0, 0, 40, 30], 0.5),
        (3, 2, 1, [5, 10, 20, 30], None),
    ]
    assert {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())} == {1: "cat", 2: "dog: a \u00fc"}
    mask = rows[1][1][0].mask
    assert mask is not None
    assert np.array_equal(coco.annToMask(notes[2]), mask)
    assert notes[2]["area"] == mask.sum()


def test_yolo(rows: list[RegionRow], tmp_path: Path) -> None:
    out = tmp_path / "yolo"
    assert write_regions(out, "yolo", rows) == 3
    assert (out / "classes.txt").read_text("utf-8") == "cat\ndog: a \u00fc\n"
    assert '  1: "dog: a \\u00fc"' in (out / "data.yaml").read_text()
    labels = {
        p.relative_to(out / "labels").as_posix(): p.read_text() for p in (out / "labels").rglob("*.txt")
    }
    assert labels["a.txt"] == "0 0.300000 0.500000 0.400000 0.800000\n1 0.500000 0.500000 1.000000 1.000000\n"
    assert labels["more/b.txt"] == "0 0.300000 0.312500 0.400000 0.375000\n"
    assert labels["c.txt"] == ""
    write_regions(tmp_path / "outlines", "yolo", [(rows[0][0], rows[0][1][1:])])
    text = (tmp_path / "outlines" / "labels" / "a.txt").read_text()
    assert text == "0 0.000000 0.000000 1.000000 0.000000 0.000000 1.000000\n"


@pytest.mark.parametrize("kind", ["coco", "jsonl", "yolo"])
def test_whole_or_not_at_all(rows: list[RegionRow], kind: RegionFile, tmp_path: Path) -> None:
    def broken() -> Iterator[RegionRow]:
        yield rows[0]
        raise RuntimeError("the model died")

    with pytest.raises(RuntimeError):
        write_regions(tmp_path / "x", kind, broken())
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]
    write_regions(tmp_path / "x", kind, rows[:1])
    with pytest.raises(UsageError, match="exists already"):
        write_regions(tmp_path / "x", kind, rows)
    with pytest.raises(UsageError, match="does not exist"):
        write_regions(tmp_path / "nowhere" / "x", kind, rows)
    if kind != "yolo":
        assert write_regions(tmp_path / "x", kind, rows[:2], overwrite=True) == 2
    if kind != "jsonl":
        Path(rows[2][0]).write_bytes(b"no image")
        with pytest.raises(ImageError, match="size cannot be read"):
            write_regions(tmp_path / "y", kind, rows)


def test_two_images_of_one_name_are_refused(rows: list[RegionRow], tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "a.jpg")
    with pytest.raises(UsageError, match="rename one"):
        write_regions(tmp_path / "x", "yolo", [*rows, (str(tmp_path / "photos" / "a.jpg"), [])])


@pytest.mark.skipif(not (DATA / "coco_mini").is_dir(), reason="no COCO photographs on this machine")
def test_coco_comes_back_as_coco(tmp_path: Path) -> None:
    source = DATA / "coco_mini" / "annotations" / "instances_train2017.json"
    samples = list(sightloop.open_dataset(source))
    write_regions(tmp_path / "x.json", "coco", [(str(s.image), s.regions) for s in samples])
    again = {Path(str(s.image)).name: s.regions for s in sightloop.open_dataset(tmp_path / "x.json")}
    assert again == {Path(str(s.image)).name: s.regions for s in samples}
    sizes = {i["file_name"]: (i["width"], i["height"]) for i in json.loads(source.read_text())["images"]}
    written = json.loads((tmp_path / "x.json").read_text())["images"]
    assert {Path(i["file_name"]).name: (i["width"], i["height"]) for i in written} == sizes
