"""Odd files where data is expected: refused or named, never a hang, a crash or the end of the other records."""

from __future__ import annotations

import io
import os
import tarfile
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import sightloop
from sightloop.data.datasets.convert import convert
from sightloop.errors import ImageError, UsageError

needs_fifo = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")


def photo(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


def read(source: Path) -> tuple[list[str], dict[str, str]]:
    """Keys of the samples, and reason by key of the others."""
    failures: dict[str, str] = {}
    samples = sightloop.open_dataset(source).stream(lambda key, reason: failures.update({key: reason}))
    return [sample.key for sample in samples], failures


@needs_fifo
@pytest.mark.parametrize("extension", ["csv", "jsonl", "json", "parquet", "yaml"])
def test_pipes_named_like_tables_are_refused(extension: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"x.{extension}")
    with pytest.raises(UsageError, match="pipe"):
        sightloop.open_dataset(tmp_path / f"x.{extension}")


@needs_fifo
@pytest.mark.parametrize("kind", ["pipe", "endless", "folder"])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "classes.json"])
def test_tables_of_a_folder_that_are_no_files(kind: str, name: str, tmp_path: Path) -> None:
    for folder in "ab":
        photo(tmp_path / folder / "x.png")
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    dataset = sightloop.open_dataset(tmp_path)
    assert [sample.key for sample in dataset] == ["a/x", "b/x"]
    assert kind == "folder" or any(name in note for note in dataset.notes)


def test_images_that_are_no_files_are_called_what_they_are(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "c.png").symlink_to("/dev/null")
    (tmp_path / "d.png").write_bytes(b"")
    keys, failures = read(tmp_path)
    assert keys == ["a", "d"]
    assert "broken link" in failures["b"]
    assert "device" in failures["c"]
    reasons: list[str] = []
    convert(tmp_path, tmp_path / "x.jsonl", notify=lambda event: reasons.append(str(event)))
    assert any("empty file" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"image,caption\ra.png,x\r", "CR"),
        (b"image,caption,caption\na.png,x,y\n", "several columns"),
    ],
)
def test_csv_that_is_no_table(data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(data)
    with pytest.raises(UsageError, match=rf"x\.csv.*{reason}"):
        sightloop.open_dataset(tmp_path / "x.csv")


def test_parquet_values_that_python_cannot_hold(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    photo(tmp_path / "b.png")
    times = pa.array([2**62, int(datetime(2020, 1, 1).timestamp())], pa.timestamp("us"))
    pq.write_table(pa.table({"image": ["a.png", "b.png"], "taken": times}), tmp_path / "x.parquet")
    keys, failures = read(tmp_path / "x.parquet")
    assert keys == ["b"]
    assert list(failures) == ["x.parquet row 1"]
    keys_column = pa.table({"image": ["a.png"], "key": times[:1]})
    pq.write_table(keys_column, tmp_path / "y.parquet")
    with pytest.raises(UsageError, match=r"y\.parquet"):
        sightloop.open_dataset(tmp_path / "y.parquet")


@pytest.mark.parametrize(
    "text",
    [
        '{"image": "a.png", "image": "b.png"}',
        '{"image": "a.png", "qa": [{"question": "x", "question": "y", "answer": "z"}]}',
        '{"image": "a.png", "x": ' + "9" * 5000 + "}",
        '{"image": "a.png", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "sidecar"])
def test_one_odd_object_stops_no_other(name: str, text: str, tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    photo(tmp_path / "b.png")
    if name == "sidecar":
        (tmp_path / "a.json").write_text(text)
    else:
        rows = [text, '{"image": "b.png", "caption": "x"}']
        (tmp_path / name).write_text("\n".join(rows) if name == "x.jsonl" else f"[{','.join(rows)}]")
    if name == "x.json" and "[[" in text:  # the whole list is one text
        with pytest.raises(UsageError, match="too deeply"):
            sightloop.open_dataset(tmp_path / name)
        return
    keys, failures = read(tmp_path if name == "sidecar" else tmp_path / name)
    if name == "x.json" and "999" in text:  # an infinite number is no reason to leave a sample out
        assert keys == ["a", "b"]
        return
    assert keys == ["b"]
    assert len(failures) == 1
    (reason,) = failures.values()
    assert any(words in reason for words in ("twice", "more digits", "too deeply"))
    assert len(reason) < 200


def test_names_twice_in_coco_are_counted_or_refused(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    image = '{"id": 1, "file_name": "a.png"}'
    (tmp_path / "x.json").write_text(
        f'{{"images": [{image}], "annotations": [{{"image_id": 1, "caption": "a", "caption": "b"}},'
        '{"image_id": 1, "caption": "c"}, {"image_id": 1, "caption": "d", "x": {"y": 1, "y": 2}}]}'
    )
    dataset = sightloop.open_dataset(tmp_path / "x.json")
    assert [sample.captions for sample in dataset] == [("c",)]
    assert sorted(note.partition(" of ")[2] for note in dataset.notes) == [
        "annotations have the name 'caption' twice and are left out",
        "annotations have the name 'y' twice and are left out",
    ]
    (tmp_path / "y.json").write_text(f'{{"images": [{image}], "annotations": [], "annotations": []}}')
    with pytest.raises(UsageError, match=r"y\.json: the name 'annotations' occurs twice"):
        sightloop.open_dataset(tmp_path / "y.json")


def test_a_pax_record_longer_than_its_header_is_damage(tmp_path: Path) -> None:
    info = tarfile.TarInfo("header")
    info.type, record = tarfile.XHDTYPE, b"99999999999 path=x\n"
    info.size = len(record)
    data = photo(tmp_path / "a.png").read_bytes()
    file = io.BytesIO(info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0"))
    file.seek(0, os.SEEK_END)
    with tarfile.open(fileobj=file, mode="w") as tar:
        member = tarfile.TarInfo("a.png")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    (tmp_path / "x.tar").write_bytes(file.getvalue())
    with pytest.raises(ImageError, match="damaged extended header"):
        list(sightloop.open_dataset(tmp_path / "x.tar"))


def test_folders_with_a_coco_file_inside(tmp_path: Path) -> None:
    content = (
        '{"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"id": 1, "image_id": 1, "category_id": 1,'
        '"bbox": [1, 1, 2, 2]}], "categories": [{"id": 1, "name": "cat"}]}'
    )
    for image, file in (
        ("fiftyone/data/a.png", "fiftyone/labels.json"),
        ("roboflow/train/a.png", "roboflow/train/_annotations.coco.json"),
        ("roboflow/valid/a.png", "roboflow/valid/_annotations.coco.json"),
    ):
        photo(tmp_path / image)
        (tmp_path / file).write_text(content)
    for name, keys in (("fiftyone", ["a"]), ("roboflow", ["a", "a#2"]), ("roboflow/valid", ["a"])):
        samples = list(sightloop.open_dataset(tmp_path / name))
        assert [sample.key for sample in samples] == keys
        assert all([region.label for region in sample.regions] == ["cat"] for sample in samples)
    (tmp_path / "fiftyone/labels.json").write_text('{"classes": ["cat"], "labels": {"a": 0}}')  # not COCO
    (note,) = sightloop.open_dataset(tmp_path / "fiftyone").notes
    assert "labels.json" in note
