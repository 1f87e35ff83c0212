"""Which file is the caption of which image, for readers and writers alike."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sightloop.annotation.sidecars import SidecarSink, WriteMode
from sightloop.data.datasets.dataset import Dataset, open_dataset
from sightloop.data.datasets.sidecar_files import read_plain_file
from sightloop.errors import ImageError, UsageError
from sightloop.types import Skipped
from tests.data.datasets.sources import make_image, put

FORMS = ("a.txt", "a.jpg.txt", "a.TXT", "a.caption", "a.jpg.caption", "a.Caption")


def captions(dataset: Dataset) -> dict[str, tuple[str, ...]]:
    return {sample.key: sample.captions for sample in dataset}


@pytest.mark.parametrize("form", FORMS)
def test_reader_and_writer_take_the_same_file(form: str, tmp_path: Path) -> None:
    image = str(put(tmp_path / "a.jpg", make_image()))
    put(tmp_path / form, "by hand\n")
    assert captions(open_dataset(tmp_path)) == {"a": ("by hand",)}
    assert isinstance(SidecarSink().check(image), Skipped)
    modes: tuple[WriteMode, ...] = ("append", "prepend", "overwrite")
    for mode, text in zip(modes, (("by hand", "x"), ("y", "by hand", "x"), ("z",)), strict=True):
        line = text[-1] if mode == "append" else text[0]
        assert SidecarSink(mode).write(image, line) is None
        assert captions(open_dataset(tmp_path)) == {"a": text}
    assert sorted(os.listdir(tmp_path)) == sorted(["a.jpg", form])


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    forms=st.sets(st.sampled_from(FORMS)),
    modes=st.lists(st.sampled_from(("skip", "append", "overwrite")), min_size=1, max_size=3),
)
def test_what_is_written_is_what_is_read(
    forms: set[str], modes: list[WriteMode], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("photos")
    image = str(put(folder / "a.jpg", make_image()))
    for form in forms:
        put(folder / form, f"{form}\n")
    for number, mode in enumerate(modes):
        before = captions(open_dataset(folder))["a"]
        result = SidecarSink(mode).write(image, f"new {number}")
        after = captions(open_dataset(folder))["a"]
        if isinstance(result, Skipped):
            assert before == after != ()
        else:
            assert f"new {number}" in after
            assert mode == "overwrite" or set(before) <= set(after)


def test_an_image_that_is_added_later_changes_no_caption(tmp_path: Path) -> None:
    put(tmp_path / "cat.txt", "my own words\n")
    names = [str(put(tmp_path / name, make_image())) for name in ("cat.jpg", "cat.png")]
    dataset = open_dataset(tmp_path)
    assert captions(dataset) == {"cat.jpg": ("my own words",), "cat.png": ("my own words",)}
    assert dataset.notes == ("1 caption files belong to several images each: cat.txt",)
    assert all(isinstance(SidecarSink().write(name, "new"), Skipped) for name in names)
    assert SidecarSink("append").write(names[1], "a png") is None
    assert captions(open_dataset(tmp_path)) == {
        "cat.jpg": ("my own words",),
        "cat.png": ("my own words", "a png"),
    }
    assert SidecarSink("overwrite").write(names[0], "a jpg") is None
    assert captions(open_dataset(tmp_path))["cat.jpg"] == ("a jpg",)
    assert (tmp_path / "cat.txt").read_text() == "my own words\n"


@pytest.mark.parametrize("blank", [b"", b"\n", b"\xef\xbb\xbf \r\n"])
def test_a_blank_caption_file_is_filled(blank: bytes, tmp_path: Path) -> None:
    image = str(put(tmp_path / "a.jpg", make_image()))
    put(tmp_path / "a.txt", blank)
    assert SidecarSink().check(image) is None
    assert SidecarSink().write(image, "new") is None
    assert (tmp_path / "a.txt").read_text() == "new\n"
    assert isinstance(SidecarSink().write(image, "newer"), Skipped)


def test_composed_and_decomposed_names_are_one(tmp_path: Path) -> None:
    forms = [unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD")]
    put(tmp_path / "x" / f"{forms[0]}.jpg", make_image())
    put(tmp_path / "x" / f"{forms[1]}.txt", "one")
    put(tmp_path / "y" / f"{forms[1]}.jpg", make_image())
    put(tmp_path / "y" / f"{forms[0]}.txt", "two")
    assert [c for folder in "xy" for c in captions(open_dataset(tmp_path / folder)).values()] == [
        ("one",),
        ("two",),
    ]


def test_one_bad_sidecar_stops_nothing(tmp_path: Path) -> None:
    for name in ("folder", "pipe", "big", "ok", "x" * 251):
        put(tmp_path / f"{name}.jpg", make_image())
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    put(tmp_path / "big.txt", b"x" * (17 << 20))
    put(tmp_path / "ok.txt", "fine")
    dataset = open_dataset(tmp_path)
    failed: dict[str, str] = {}
    kept = [sample.key for sample in dataset.stream(failed.__setitem__)]
    assert kept == ["ok", "x" * 251]
    assert "folder" in failed["folder"]
    assert "not a plain file" in failed["pipe"]
    assert "larger" in failed["big"]
    assert dataset.fingerprint == open_dataset(tmp_path).fingerprint  # reads all of them
    with pytest.raises(ValueError, match="not a plain file"):
        read_plain_file(str(tmp_path / "pipe.json"))


def test_metadata_tables_of_a_folder_are_read(tmp_path: Path) -> None:
    for name in ("1.jpg", "2.jpg", "sub/3.jpg"):
        put(tmp_path / name, make_image())
    put(tmp_path / "metadata.csv", "file_name,label\nsub/3.jpg,\n1.jpg,bus\n")
    rows = (
        '{"file_name": "1.jpg", "text": "a bus"}',
        '{"file_name": "2.jpg", "text": "no"}',
        '{"file_name": "9.jpg"}',
    )
    put(tmp_path / "metadata.jsonl", "\n".join(rows))
    put(tmp_path / "sub/metadata.csv", "file_name,text,label\n3.jpg,a dog,dog\n")
    put(tmp_path / "2.txt", "by hand")
    dataset = open_dataset(tmp_path)
    assert captions(dataset) == {"1": ("a bus",), "2": ("by hand",), "sub/3": ("a dog",)}
    assert [sample.label for sample in dataset] == ["bus", None, "dog"]
    assert dataset.notes == ("metadata.jsonl: 1 rows name no image of the folder and are left out",)
    before = dataset.fingerprint
    put(tmp_path / "sub/metadata.csv", "words\n1\n")
    dataset = open_dataset(tmp_path)
    assert dataset.fingerprint != before
    assert any("sub/metadata.csv is left out" in note for note in dataset.notes)


def test_files_that_belong_to_no_image_are_counted(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg", make_image())
    for name in ("a.txt", "b.txt", "c.xml", "README.md", ".hidden", "d/e.npz"):
        put(tmp_path / name, "x")
    (note,) = open_dataset(tmp_path).notes
    assert note.endswith("left out: 1 .npz, 1 .txt, 1 .xml")


@pytest.mark.parametrize("title", ["IMG_1.JPG", "another, longer name.jpeg"])
def test_a_title_that_is_a_file_name_is_no_caption(title: str, tmp_path: Path) -> None:
    put(tmp_path / "IMG_1.JPG", make_image())
    for description, expected in (("A lake", ("A lake",)), ("", ())):
        put(tmp_path / "IMG_1.JPG.json", {"title": title, "description": description})
        (sample,) = open_dataset(tmp_path)
        assert (sample.captions, sample.extra["title"]) == (expected, title)
    put(tmp_path / "IMG_1.JPG.json", {"title": "A lake at night"})
    assert open_dataset(tmp_path)[0].captions == ("A lake at night",)


def labels(folder: Path) -> set[str | None]:
    return {sample.label for sample in open_dataset(folder)}


def test_splits_are_no_classes(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        put(tmp_path / "flat" / split / "1.jpg", make_image())
        for kind in ("cat", "dog"):
            put(tmp_path / "deep" / split / kind / "1.jpg", make_image())
    assert labels(tmp_path / "flat") == {None}
    assert labels(tmp_path / "deep") == {"cat", "dog"}
    assert "splits" in open_dataset(tmp_path / "flat").notes[0]


def test_one_stray_file_cancels_no_classes(tmp_path: Path) -> None:
    for number in range(20):
        put(tmp_path / "red_panda" / f"{number}.jpg", make_image())
        put(tmp_path / "cat" / f"{number}.jpg", make_image())
    put(tmp_path / "stray.jpg", make_image())
    put(tmp_path / "cat/1.txt", "a cat")
    assert labels(tmp_path) == {"red_panda", "cat", None}
    assert "1 images outside of the class folders have no class" in open_dataset(tmp_path).notes
    put(tmp_path / "classes.json", {"red_panda": "red panda", "cat": 3})
    assert labels(tmp_path) == {"red panda", "cat", None}
    for number in range(20):
        put(tmp_path / "cat" / f"{number}.txt", "a cat")
    assert labels(tmp_path) == {None}
    assert "are not taken as classes" in open_dataset(tmp_path).notes[0]


def test_pipes_and_devices_are_refused_without_waiting(tmp_path: Path) -> None:
    for name in ("x.tar", "x"):
        os.mkfifo(tmp_path / name)
        assert open_dataset(tmp_path / name).is_stream  # a tar, read when its writer comes
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(UsageError, match="pipe"):
        open_dataset(tmp_path / "x.json")
    with pytest.raises(UsageError, match="neither"):
        open_dataset("/dev/null")
    put(tmp_path / "t.jsonl", '{"image": "pipe.jpg"}')
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match="no file"):
        open_dataset(tmp_path / "t.jsonl")[0]


@pytest.mark.parametrize(
    "pattern",
    ["x{0..99999999999}.tar", "x{0..9999}{0..9999}.tar", "x{5..3}.tar", "x{0..%s}.tar" % ("9" * 5000)],
)
def test_brace_ranges_are_bounded(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        open_dataset(tmp_path / pattern)
