"""COCO JSON of other programs: every form that is common is read, and no entry stops the rest."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

from sightloop.data.datasets.convert import convert
from sightloop.data.datasets.dataset import open_dataset
from sightloop.errors import UsageError
from sightloop.types import JsonDict, Region, Sample
from tests.data.datasets.sources import make_image, put

CATEGORIES = [{"id": 1, "name": "cat"}, {"id": "c2", "name": "dog"}]


def write(folder: Path, annotations: list[Any], name: str = "x.json", **members: Any) -> Path:
    """A COCO file about a.jpg (id 1) and b.jpg (id "2_0")."""
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": "2_0", "file_name": "b.jpg"}]
    for number, image in enumerate(images):
        put(folder / str(image["file_name"]), make_image(number))
    return put(
        folder / name, {"images": images, "annotations": annotations, "categories": CATEGORIES} | members
    )


def read(path: Path | list[Path]) -> tuple[dict[str, Sample], str]:
    """Samples by key, and all notes and failures as one text."""
    dataset = open_dataset(path)
    messages = list(dataset.notes)
    samples = {s.key: s for s in dataset.stream(lambda key, reason: messages.append(f"{key}: {reason}"))}
    return samples, "\n".join(messages)


def box(**members: Any) -> JsonDict:
    return {"id": 0, "image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2]} | members


def test_ids_need_not_be_unique_and_may_be_texts(tmp_path: Path) -> None:
    boxes = [box(), box(category_id="c2"), box(image_id="2_0")]
    samples, messages = read(write(tmp_path, boxes))
    assert [r.label for r in samples["a"].regions] == ["cat", "dog"]
    assert samples["b"].regions == (Region("cat", (1, 1, 3, 3)),)
    assert (samples["b"].extra["image_id"], messages) == ("2_0", "")
    convert(tmp_path / "x.json", tmp_path / "out.json")
    assert read(tmp_path / "out.json")[0]["b"].extra["image_id"] == "2_0"
    again = write(tmp_path, [box(keypoints=[1, 1, 2])], "y.json")
    samples, messages = read([tmp_path / "x.json", again])
    assert len(samples["a"].regions) == 2  # the annotation in both files counts once
    assert messages == "1 keypoints are left out"


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"segmentation": [0, 0, 2, 0, 2, 2]}, (1, 1, 3, 3)),  # a bare outline
        ({"segmentation": [[0, 0, 2, 0, 2, 2]], "bbox": []}, (0, 0, 2, 2)),
        ({"segmentation": {"size": [4, 5], "counts": [5, 2, 13]}, "bbox": None}, (1, 1, 2, 3)),
        ({"segmentation": None, "score": 1}, (1, 1, 3, 3)),
    ],
)
def test_forms_of_regions(members: JsonDict, expected: tuple[float, ...], tmp_path: Path) -> None:
    samples, messages = read(write(tmp_path, [box(**members)]))
    assert (samples["a"].regions[0].box, messages) == (expected, "")


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (box(category_id=7), "annotation 0: its category 7 is not listed"),
        (box(category_id=[1]), "is not listed"),
        (box(segmentation=[1, 2]), "segmentation"),
        (box(segmentation="x"), "segmentation"),
        (box(segmentation={"size": [4, 5], "counts": "o" * 4000}), "segmentation"),
        (box(bbox=[0, 0, 1, 10**400]), "bbox"),
        (box(bbox=[0, 0, 1, float("inf")]), "bbox"),
        (box(bbox=[0, 0, 1]), "bbox"),
        (box(bbox="abcd"), "bbox"),
        ({"image_id": 1, "caption": 5}, "caption is not a string"),
        ({"image_id": 1, "caption": "\ud800"}, "Unicode"),
        (box(bbox=[], segmentation=[]), "1 annotations without a box"),
        (box(image_id={}), "1 annotations without an image_id"),
        (box(image_id=5), "1 annotations are about images that are not listed"),
        (box(iscrowd=1), "1 crowd regions"),
        ({"image_id": 1, "segments_info": []}, "1 panoptic annotations"),
        ({"image_id": 1, "words": "x"}, "1 annotations are neither"),
        (5, "1 entries of annotations are no objects"),
    ],
)
def test_what_cannot_be_used_is_named_and_stops_no_other_image(
    annotation: Any, message: str, tmp_path: Path
) -> None:
    samples, messages = read(write(tmp_path, [annotation, {"image_id": "2_0", "caption": "two"}]))
    assert samples["b"].captions == ("two",)
    assert message in messages


def test_labels_of_images(tmp_path: Path) -> None:
    label = {"image_id": 1, "category_id": 1}
    assert read(write(tmp_path, [label]))[0]["a"].label == "cat"
    sample = read(write(tmp_path, [label, label | {"category_id": "c2"}]))[0]["a"]
    assert (sample.label, sample.extra["labels"]) == (None, ["cat", "dog"])


def test_images_that_cannot_be_told_apart_are_named(tmp_path: Path) -> None:
    images = [
        {"id": 1, "file_name": "a.jpg"},
        {"id": 1, "file_name": "b.jpg"},
        {"id": 2, "file_name": 7},
        {"file_name": "c"},
    ]
    samples, messages = read(write(tmp_path, [], images=images))
    assert (samples, messages.count("\n")) == ({}, 3)
    other = write(tmp_path, [], "y.json", categories=[{"id": 1, "name": "horse"}])
    with pytest.raises(UsageError, match="category 1 is 'horse'"):
        read([write(tmp_path, []), other])


def test_data_folder_beside_the_file(tmp_path: Path) -> None:
    put(tmp_path / "data/a.jpg", make_image())
    put(tmp_path / "labels.json", {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []})
    assert list(read(tmp_path / "labels.json")[0]) == ["a"]


_JSON = st.recursive(
    st.sampled_from([None, True, 0, 1, -1, 1.5, 10**400, float("nan"), "", "a.jpg", "x", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "counts", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)
_GOOD: list[tuple[str, JsonDict]] = [
    ("images", {"id": 1, "file_name": "a.jpg", "key": "k"}),
    ("annotations", box(segmentation=[[0, 0, 1, 0, 1, 1]], iscrowd=0, score=0.5)),
    ("annotations", {"id": 1, "image_id": 1, "caption": "x"}),
    ("annotations", {"question_id": 1, "image_id": 1, "answers": [{"answer": "y"}]}),
    ("questions", {"question_id": 1, "image_id": 1, "question": "q"}),
    ("categories", {"id": 1, "name": "cat"}),
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, len(_GOOD) - 1), st.integers(0, 6), _JSON), max_size=3))
def test_any_type_anywhere_ends_in_named_samples(changes: list[tuple[int, int, Any]], tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    items = [(member, dict(item)) for member, item in _GOOD]
    for number, position, value in changes:
        names = list(items[number][1])
        if position < len(names):
            items[number][1][names[position]] = value
        else:
            content[items[number][0]] = value
    for member, item in items:
        if isinstance(content.setdefault(member, []), list):
            content[member] = [*content[member], item]
    put(tmp_path / "a.jpg", make_image())
    (tmp_path / "x.json").write_text(json.dumps(content))
    for target in ("o.tar", "o.parquet", "o.json", "o.csv"):
        with suppress(UsageError):
            convert(tmp_path / "x.json", tmp_path / target, overwrite=True)


def test_pycocotools_reads_captions_and_instances(tmp_path: Path) -> None:
    caption = {"id": 5, "image_id": 1, "caption": "x"}
    for name, items in (("captions", [caption]), ("instances", [box()]), ("mixed", [caption, box()])):
        convert(write(tmp_path, items), tmp_path / f"{name}.json")
        assert len(COCO(tmp_path / f"{name}.json").getImgIds()) == 2
    assert "categories" not in json.loads((tmp_path / "captions.json").read_text())
    assert COCO(tmp_path / "mixed.captions.json").loadAnns([1])[0]["caption"] == "x"
    assert COCO(tmp_path / "mixed.json").getCatIds() == [1]
    for source in (tmp_path / "mixed.json", [tmp_path / "mixed.json", tmp_path / "mixed.captions.json"]):
        sample = read(source)[0]["a"]
        assert (sample.captions, len(sample.regions)) == (("x",), 1)
    with pytest.raises(UsageError, match=r"mixed\.captions\.json exists"):
        (tmp_path / "mixed.json").unlink()
        convert(tmp_path / "x.json", tmp_path / "mixed.json")
