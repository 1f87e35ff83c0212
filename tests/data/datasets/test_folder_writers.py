"""Folders for other programs: what we write comes back, within what the format holds; the rest is counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import sightloop
from sightloop.data.datasets.convert import convert
from sightloop.data.datasets.folder_writers import YoloWriter
from sightloop.errors import UsageError
from sightloop.types import Region, Sample

SIDE = 20
NUMBERS = st.floats(-5, 30, allow_nan=False, width=16)
LABELS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)


def photo(path: Path, width: int = SIDE, height: int = SIDE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (9, 99, 200)).save(path)
    return path


def source(folder: Path) -> Path:
    for name in ("a.jpg", "sub/b.c.jpg", "sub/é n.jpg", "none.jpg"):
        photo(folder / name)
    (folder / "a.txt").write_text("one\ntwo\n")
    fields = {
        "label": "indoor",
        "qa": [{"question": "What?", "answers": ["cat", "a cat"]}],
        "regions": [
            {"label": 'cat: "x" # 1', "box": [1, 2, 11, 12], "score": 0.5},
            {"label": "no", "box": [2, 2, 8, 8], "polygons": [[2, 2, 8, 2, 8, 8], [3, 5, 5, 5, 5, 7]]},
        ],
        "license": 3,
        "extra": {"title": "A"},
    }
    (folder / "a.json").write_text(json.dumps(fields))
    (folder / "sub/b.c.json").write_text(
        '{"regions": [{"label": "no", "box": [-4, 1, 5, 40]}], "license": "cc"}'
    )
    return folder


def test_imagefolder_comes_back(tmp_path: Path) -> None:
    folder = source(tmp_path / "in")
    summary = convert(folder, tmp_path / "out", to="imagefolder")
    assert (summary.samples, summary.failed) == (4, 0)
    for before, after in zip(
        sightloop.open_dataset(folder), sightloop.open_dataset(tmp_path / "out"), strict=True
    ):
        assert isinstance(before.image, Path)
        assert isinstance(after.image, Path)
        assert before.image.read_bytes() == after.image.read_bytes()
        names = ("key", "captions", "questions", "regions", "label", "extra")
        assert [getattr(after, n) for n in names] == [getattr(before, n) for n in names]
    rows = [json.loads(line) for line in (tmp_path / "out/metadata.jsonl").read_text().splitlines()]
    # A column has one type: `license` is a number in one sample and a text in another.
    assert all(isinstance(row.get("extra", ""), str) for row in rows)


def test_yolo_comes_back_within_the_image(tmp_path: Path) -> None:
    folder = source(tmp_path / "in")
    summary = convert(folder, tmp_path / "out", to="yolo")
    for what in ("1 scores", "1 parts of regions beyond", "2 boxes beside outlines"):
        assert any(note.startswith(what) for note in summary.notes), summary.notes
    assert len(summary.notes) == 3
    for opened in ("out", "out/data.yaml"):
        samples = {sample.key: sample for sample in sightloop.open_dataset(tmp_path / opened)}
        assert sorted(samples) == ["a", "none", "sub/b.c", "sub/é n"]
        assert samples["a"].captions == ("one", "two")
        assert samples["a"].label == "indoor"
        first, second = samples["a"].regions
        assert (first.label, second.label) == ('cat: "x" # 1', "no")
        assert first.box == pytest.approx((1, 2, 11, 12))
        assert second.box == pytest.approx((2, 2, 8, 8))
        assert samples["sub/b.c"].regions[0].box == pytest.approx((0, 1, 5, SIDE))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(LABELS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.booleans()), min_size=1, max_size=4))
def test_yolo_labels_are_shares_of_the_image(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[str, float, float, float, float, bool]]
) -> None:
    """Whatever the boxes are, the loader's conditions hold, and a box that is inside of the image comes back."""
    folder = tmp_path_factory.mktemp("yolo")
    image = photo(folder / "in/a.png").read_bytes()
    regions = [
        Region(
            label,
            box := (min(x, x2), min(y, y2), max(x, x2), max(y, y2)),
            ((box[0], box[1], box[2], box[1], box[2], box[3]),) if has_outline else (),
        )
        for label, x, y, x2, y2, has_outline in drawn
    ]
    (folder / "out").mkdir()
    writer = YoloWriter(folder / "out")
    sample = Sample("a", image, regions=tuple(regions))
    writer.check(sample)
    writer.add(sample, image, ".png")
    inside = [
        (max(b[0], 0), max(b[1], 0), min(b[2], SIDE), min(b[3], SIDE))
        for b in (region.box for region in regions)
    ]
    kept = [i for i, b in enumerate(inside) if b[0] < b[2] and b[1] < b[3]]
    if not kept:
        with pytest.raises(UsageError, match="no sample has a box"):
            writer.close()
        return
    writer.close()
    lines = [line.split() for line in (folder / "out/labels/a.txt").read_text().splitlines()]
    assert len({len(line) == 5 for line in lines}) == 1  # boxes, or outlines
    assert all(0 <= float(value) <= 1 for line in lines for value in line[1:])
    (read,) = sightloop.open_dataset(folder / "out")
    assert [region.label for region in read.regions] == [regions[i].label for i in kept]
    for region, i in zip(read.regions, kept, strict=True):
        assert region.box == pytest.approx(inside[i], abs=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pycocotools
def test_parts_of_an_outline_are_joined_without_area(tmp_path: Path) -> None:
    pycocotools_mask = pytest.importorskip("pycocotools.mask")
    parts = ((2.0, 2.0, 8.0, 2.0, 8.0, 8.0, 2.0, 8.0), (10.0, 10.0, 18.0, 10.0, 18.0, 18.0, 10.0, 18.0))
    image = photo(tmp_path / "a.png").read_bytes()
    writer = YoloWriter(tmp_path / "out")
    sample = Sample("a", image, regions=(Region("x", (2, 2, 18, 18), parts),))
    (tmp_path / "out").mkdir()
    writer.check(sample)
    writer.add(sample, image, ".png")
    writer.close()
    (region,) = next(iter(sightloop.open_dataset(tmp_path / "out"))).regions
    (outline,) = region.polygons

    def mask(polygons: list[list[float]]) -> np.ndarray:
        return pycocotools_mask.decode(
            pycocotools_mask.merge(pycocotools_mask.frPyObjects(polygons, SIDE, SIDE))
        )

    difference = mask([list(outline)]) != mask([list(part) for part in parts])
    assert difference.sum() <= SIDE  # of the joining line, whose pixels pycocotools may count


def test_what_yolo_cannot_name_is_left_out_by_name(tmp_path: Path) -> None:
    photo(tmp_path / "in/images/a.jpg")
    photo(tmp_path / "in/b.jpg")
    (tmp_path / "in/b.json").write_text('{"regions": [{"label": "cat", "box": [1, 1, 5, 5]}]}')
    failures: list[str] = []
    summary = convert(tmp_path / "in", tmp_path / "out", to="yolo", notify=lambda e: failures.append(repr(e)))
    assert (summary.samples, summary.failed) == (1, 1)
    assert any("images/a" in text and "named images" in text for text in failures)
    with pytest.raises(UsageError, match="no sample has a box"):
        convert(tmp_path / "in/images", tmp_path / "none", to="yolo")
    assert not (tmp_path / "none").exists()
