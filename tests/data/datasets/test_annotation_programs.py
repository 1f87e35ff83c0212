"""Annotations of LabelMe, Pascal VOC and CreateML: read as regions, wherever their files are."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sightloop
from sightloop.data.datasets.convert import convert
from sightloop.data.datasets.foreign_fields import own_fields
from sightloop.data.datasets.schema import sample_from_fields
from sightloop.data.datasets.voc import voc_fields
from sightloop.errors import ImageError, UsageError
from sightloop.types import Sample
from tests.data.datasets.sources import make_image, put

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def shape(label: str, kind: str, points: Sequence[Sequence[float]], **members: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}} | members


def labelme(*shapes: dict[str, Any], image: str = "a.jpg", **members: Any) -> dict[str, Any]:
    about = {"version": "5.4.1", "flags": {}, "shapes": list(shapes), "imagePath": image, "imageData": None}
    return about | {"imageHeight": 4, "imageWidth": 5} | members


def voc(*boxes: tuple[str, float, float, float, float], image: str = "a.jpg", extra: str = "") -> str:
    objects = "".join(
        f"<object><name>{escape(name)}</name><difficult>0</difficult><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin>"
        f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for name, x0, y0, x1, y1 in boxes
    )
    return f"<annotation><folder>x</folder><filename>{image}</filename>{objects}{extra}</annotation>"


def regions(sample: Sample) -> list[tuple[str, tuple[float, ...]]]:
    return [(region.label, region.box) for region in sample.regions]


def test_shapes_of_labelme_beside_the_images(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg", make_image(1))
    shapes = (
        shape("cat", "polygon", [[1, 1], [4, 1], [4, 3]]),
        shape("dog", "rectangle", [[4, 3], [2, 0]]),
        shape("sun", "circle", [[2, 2], [2, 1]]),
        shape("ear", "point", [[1, 1]]),
        shape("leg", "linestrip", [[1, 1], [2, 2]]),
    )
    put(tmp_path / "a.json", labelme(*shapes, imageData="A" * 100) | {"flags": {"indoor": True}})
    put(tmp_path / "a.txt", "a caption\n")
    put(tmp_path / "b.jpg", make_image(2))
    dataset = sightloop.open_dataset(tmp_path)
    first, second = dataset
    assert [region.label for region in first.regions] == ["cat", "dog", "sun"]
    assert [region.box for region in first.regions[:2]] == [(1, 1, 4, 3), (2, 0, 4, 3)]
    assert first.regions[2].box == pytest.approx((1, 1, 3, 3), abs=0.01)
    assert first.regions[0].polygons == ((1, 1, 4, 1, 4, 3),)
    assert first.captions == ("a caption",)
    assert second.regions == ()
    assert first.extra["flags"] == {"indoor": True}
    assert len(first.extra["shapes"]) == 2
    assert "imageData" not in first.extra
    assert dataset.notes == (
        f"{tmp_path.name}: 2 shapes of LabelMe are points or lines, no regions, and are kept aside",
    )


def test_parts_of_one_object_and_masks_of_labelme() -> None:
    mask = np.array([[1, 0], [1, 1]], np.uint8)
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    encoded = base64.b64encode(file.getvalue()).decode()
    fields = labelme(
        shape("cat", "polygon", [[0, 0], [1, 0], [1, 1]], group_id=1),
        shape("cat", "rectangle", [[3, 2], [4, 3]], group_id=1),
        shape("cat", "polygon", [[0, 0], [1, 0], [1, 1]], group_id=2),
        shape("dog", "mask", [[2, 1], [3, 2]], mask=encoded),
    )
    sample = sample_from_fields("a", b"", fields)
    assert regions(sample) == [
        ("cat", (0, 0, 4, 3)),
        ("cat", (0, 0, 1, 1)),
        ("dog", (2, 1, 4, 3)),
    ]
    assert len(sample.regions[0].polygons) == 2
    whole = np.zeros((4, 5), bool)
    whole[1:3, 2:4] = mask
    assert (np.asarray(sample.regions[2].mask) == whole).all()


@pytest.mark.parametrize(
    ("image", "where"),
    [
        ("../images/a.jpg", "images"),
        ("..\\images\\a.jpg", "images"),
        ("a.jpg", "images"),
        ("old-name.jpg", "images"),
        ("a.jpg", "labels"),
    ],
)
def test_labelme_files_apart_from_the_images(image: str, where: str, tmp_path: Path) -> None:
    put(tmp_path / where / "a.jpg", make_image(1))
    put(tmp_path / "labels" / "a.json", labelme(shape("cat", "rectangle", [[1, 1], [4, 3]]), image=image))
    for source in (
        tmp_path,
        tmp_path / "labels",
        tmp_path / "labels" / "a.json",
        tmp_path / "labels" / "*.json",
    ):
        (sample,) = sightloop.open_dataset(source)
        assert regions(sample) == [("cat", (1, 1, 4, 3))]
        assert sample.image == tmp_path / where / "a.jpg"


def _voc_folder(root: Path, names: str = "abc") -> None:
    for number, name in enumerate(names):
        put(root / "JPEGImages" / f"{name}.jpg", make_image(number))
        put(root / "Annotations" / f"{name}.xml", voc(("cat", 2, 1, 4 + number / 2, 3), image=f"{name}.jpg"))
    put(root / "SegmentationClass" / "a.png", make_image(9, "PNG"))
    put(root / "ImageSets" / "Main" / "train.txt", "a\nb\n")
    put(root / "ImageSets" / "Main" / "val.txt", "c\nmissing\n")
    put(root / "ImageSets" / "Main" / "cat_val.txt", "c -1\na  1\n")


def test_a_folder_of_pascal_voc(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    _voc_folder(root)
    put(root / "JPEGImages" / "empty.jpg", make_image(7))
    put(root / "Annotations" / "stray.xml", voc(("cat", 1, 1, 2, 2)))
    for source in (root, root.parent):
        dataset = sightloop.open_dataset(source)
        assert [sample.key for sample in dataset] == ["a", "b", "c", "empty"]
        assert regions(dataset[1]) == [("cat", (1, 0, 4.5, 3))]
        assert regions(dataset[3]) == []
        assert dataset.notes == (
            "VOC2012: 1 annotation files belong to no image and are left out",
            "VOC2012: train, val are all read; name ImageSets/Main/train.txt for one",
            "VOC2012: not read are the folders SegmentationClass",
        )
    listed = sightloop.open_dataset(root / "ImageSets" / "Main" / "val.txt")
    assert [sample.key for sample in listed] == ["c"]
    assert listed.notes == ("val.txt: 1 of 2 images are not found, and left out",)
    of_class = sightloop.open_dataset(root / "ImageSets" / "Main" / "cat_val.txt")
    assert [sample.key for sample in of_class] == ["a", "c"]
    put(root / "ImageSets" / "Main" / "test.txt", "nothing\n")
    with pytest.raises(UsageError, match="none of its 1 images"):
        sightloop.open_dataset(root / "ImageSets" / "Main" / "test.txt")


def test_boxes_beside_the_images_and_xml_of_other_kinds(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "valid/c"):
        put(tmp_path / f"{name}.jpg", make_image(len(name)))
    put(
        tmp_path / "train" / "a.xml",
        voc(("cat & dog", 1, 1, 5, 4), extra="<object><name>far</name></object>"),
    )
    put(tmp_path / "train" / "b.xml", "<settings/>")
    put(tmp_path / "valid" / "c.xml", voc(("cat", 0, 0, 5, 4)))
    dataset = sightloop.open_dataset(tmp_path)
    assert [regions(sample) for sample in dataset] == [
        [("cat & dog", (0, 0, 5, 4))],
        [],
        [("cat", (0, 0, 5, 4))],
    ]
    notes = "\n".join(dataset.notes)
    assert "1 objects of Pascal VOC have no bndbox and are left out" in notes
    assert "files that belong to no image are left out: 1 .xml" in notes
    before = dataset.fingerprint
    put(tmp_path / "valid" / "c.xml", voc(("cat", 1, 0, 5, 4)))
    assert sightloop.open_dataset(tmp_path).fingerprint != before


@pytest.mark.parametrize("member", ["annotations", "annotation"])
def test_createml(member: str, tmp_path: Path) -> None:
    image = "image" if member == "annotations" else "imagefilename"
    box = {"label": "cat", "coordinates": {"x": 2.5, "y": 2, "width": 3, "height": 2}}
    rows = [{image: "a.jpg", member: [box, box]}, {image: "b.jpg", member: [box, {"label": "whole image"}]}]
    for name in "ab":
        put(tmp_path / "train" / f"{name}.jpg", make_image(ord(name)))
    path = put(tmp_path / "train" / "_annotations.createml.json", rows)
    for source in (path, tmp_path, tmp_path / "train"):
        dataset = sightloop.open_dataset(source)
        assert [regions(sample) for sample in dataset] == [
            [("cat", (1, 1, 4, 3))] * 2,
            [("cat", (1, 1, 4, 3))],
        ]
        assert "1 annotations of CreateML have no coordinates and are kept aside" in dataset.notes[0]


@pytest.mark.parametrize("kind", ["labelme", "voc", "createml"])
def test_conversions_keep_the_regions(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "in"
    box = [[1, 1], [4, 3]]
    put(source / "a.jpg", make_image(1))
    if kind == "labelme":
        put(source / "a.json", labelme(shape("cat", "rectangle", box)))
    elif kind == "voc":
        put(source / "a.xml", voc(("cat", 2, 2, 4, 3)))
    else:
        coordinates = {"x": 2.5, "y": 2, "width": 3, "height": 2}
        rows = [{"image": "a.jpg", "annotations": [{"label": "cat", "coordinates": coordinates}]}]
        put(source / "_annotations.createml.json", rows)
    targets = [
        ("coco.json", None),
        ("yolo", "yolo"),
        ("set.tar", None),
        ("folder", None),
        ("rows.jsonl", None),
    ]
    for name, to in targets:
        convert(source, tmp_path / "out" / name, to=to)  # pyright: ignore[reportArgumentType]
        (sample,) = sightloop.open_dataset(tmp_path / "out" / name)
        assert [region.label for region in sample.regions] == ["cat"]
        assert sample.regions[0].box == pytest.approx((1, 1, 4, 3), abs=1e-4)


_WRONG = [
    "",
    "<annotation>",
    "<annotation><object><name>a</name><bndbox><xmin>x</xmin></bndbox></object></annotation>",
    "<annotation><object><bndbox/></object></annotation>",
    '<!DOCTYPE annotation [<!ENTITY a "b">]><annotation>&a;</annotation>',
    '<!DOCTYPE annotation SYSTEM "file:///etc/passwd"><annotation/>',
    "<annotation>" * 100,
    "<?xml version='1.0' encoding='punycode'?><annotation/>",
    voc(("cat", 1, 1, float("nan"), 3)),
]


@pytest.mark.parametrize("text", _WRONG)
def test_wrong_xml_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"^a\.xml"):
        voc_fields(text.encode(), "a.xml")


def test_encodings_of_xml() -> None:
    for encoding in ("utf-8", "utf-16", "iso-8859-1", "gbk", "shift_jis"):
        label = "猫" if encoding in ("gbk", "shift_jis") else "é"
        text = f"<?xml version='1.0' encoding='{encoding}'?>" + voc((label, 1, 1, 2, 2))
        assert voc_fields(text.encode(encoding), "a.xml")["regions"][0]["label"] == label


def test_a_wrong_file_stops_no_other(tmp_path: Path) -> None:
    _voc_folder(tmp_path)
    put(tmp_path / "Annotations" / "a.xml", voc(("cat", 1, 1, float("nan"), 3)))
    failed: list[tuple[str, str]] = []
    dataset = sightloop.open_dataset(tmp_path)
    samples = list(dataset.stream(lambda key, reason: failed.append((key, reason))))
    assert [sample.key for sample in samples] == ["b", "c"]
    assert failed == [("a", "a.xml, object 1: its bndbox holds something else than finite numbers")]


@given(shapes=_JSON, size=_JSON)
@settings(max_examples=150, deadline=None)
def test_any_json_as_shapes(shapes: object, size: object) -> None:
    _read_any(labelme(imageHeight=size) | {"shapes": shapes})
    _read_any(labelme(shape("a", "polygon", [])) | {"shapes": [shapes]})
    for kind in ("polygon", "rectangle", "circle", "mask"):
        wrong = {"shape_type": kind, "points": shapes, "label": size, "group_id": shapes, "mask": size}
        _read_any(labelme() | {"shapes": [wrong, wrong]})
    for members in (shapes, {"x": shapes, "y": 1, "width": size, "height": 1}):
        _read_any({"image": "a", "annotations": [{"coordinates": members, "label": size}, shapes]})


def _read_any(fields: dict[str, Any]) -> None:
    with suppress(ValueError):
        sample_from_fields("a", b"", json.loads(json.dumps(fields)))


@pytest.mark.parametrize("kind", ["voc", "createml", "coco", "yolo", "rows"])
def test_a_box_that_ends_before_it_begins_is_named(kind: str, tmp_path: Path) -> None:
    put(tmp_path / "a.jpg", make_image(1))
    source = tmp_path
    if kind == "voc":
        put(tmp_path / "a.xml", voc(("cat", 4, 1, 2, 3)))
    elif kind == "createml":
        coordinates = {"x": 2, "y": 2, "width": -1, "height": 1}
        rows = [{"image": "a.jpg", "annotations": [{"label": "c", "coordinates": coordinates}]}]
        source = put(tmp_path / "rows.json", rows)
    elif kind == "coco":
        annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, -1, 1]}
        content = {"images": [{"id": 1, "file_name": "a.jpg"}], "categories": [{"id": 1, "name": "c"}]}
        source = put(tmp_path / "coco.json", content | {"annotations": [annotation]})
    elif kind == "yolo":
        put(tmp_path / "a.txt", "0 0.5 0.5 -0.1 0.2\n")
        put(tmp_path / "classes.txt", "c\n")
    else:
        put(tmp_path / "a.json", {"regions": [{"label": "c", "box": [3, 0, 1, 2]}]})
    with pytest.raises(ImageError, match="ends before it begins"):
        sightloop.open_dataset(source)[0]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg", make_image(1))
    put(tmp_path / "in.jsonl", '{"image": "a.jpg", "price": NaN, "sizes": [1, Infinity]}\n')
    for name in ("out.jsonl", "out.tar", "out.parquet", "out.json"):
        convert(tmp_path / "in.jsonl", tmp_path / name)
        (sample,) = sightloop.open_dataset(tmp_path / name)
        assert sample.extra["sizes"] == [1, None]
    text = (tmp_path / "out.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text


def test_what_is_read_twice_stays(tmp_path: Path) -> None:
    fields = labelme(shape("a", "point", [[1, 1]]), shape("b", "rectangle", [[1, 1], [2, 2]]))
    once = own_fields(fields)
    assert own_fields(once) == once


def test_an_image_that_is_not_there(tmp_path: Path) -> None:
    put(tmp_path / "a.json", labelme(shape("cat", "rectangle", [[1, 1], [4, 3]])))
    with pytest.raises(ImageError, match=r"a\.jpg is not found; name the folder of the images"):
        sightloop.open_dataset(tmp_path / "a.json")[0]
    put(tmp_path / "elsewhere" / "a.jpg", make_image(1))
    assert sightloop.open_dataset(tmp_path / "a.json", images=tmp_path / "elsewhere")[0].regions


def test_an_image_inside_a_large_file(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg", make_image(1))
    put(tmp_path / "a.json", labelme(shape("cat", "rectangle", [[1, 1], [4, 3]]), imageData="A" * (17 << 20)))
    assert sightloop.open_dataset(tmp_path)[0].regions
