from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
import threading
from itertools import count
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightloop import Dataset, ImageError, open_dataset
from sightloop.annotation.captioning import Caption
from sightloop.annotation.sidecars import SidecarSink
from sightloop.data.datasets.folder import escape_key, unescape_key
from sightloop.data.datasets.schema import json_text
from sightloop.errors import UsageError
from sightloop.types import Question, Region, Sample
from tests.data.datasets.sources import make_image, put, tar


def captions(dataset: Dataset) -> dict[str, tuple[str, ...]]:
    return {sample.key: sample.captions for sample in dataset}


def streamed(dataset: Dataset) -> tuple[list[Sample], dict[str, str]]:
    skipped: dict[str, str] = {}
    return list(dataset.stream(skipped.__setitem__)), skipped


# Folders.


@given(
    st.lists(
        st.lists(st.sampled_from(["a", "b", "a#2", "a#3", "b#02", "a#2#2", "#", ""]), min_size=1), min_size=1
    ),
    st.randoms(),
)
def test_repeated_keys_are_numbered(
    tmp_path_factory: pytest.TempPathFactory, sources: list[list[str]], random: Random
) -> None:
    """The first record keeps its key, later ones get the next free number; the names are the same in any order."""
    folder = tmp_path_factory.mktemp("keys")
    files = [
        put(folder / f"{i}.json", [{"key": key, "image": f"{i} {j}.jpg"} for j, key in enumerate(keys)])
        for i, keys in enumerate(sources)
    ]
    dataset = open_dataset(files)
    own = [key or f"{i} {j}" for i, keys in enumerate(sources) for j, key in enumerate(keys)]
    names = [dataset.key(index) for index in range(len(dataset))]
    expected: list[str] = []
    for key in own:
        tries = (f"{key}#{number}" for number in count(2))
        expected.append(key if key not in expected else next(n for n in tries if n not in {*own, *expected}))
    assert names == expected
    assert len(set(names)) == len(names)
    random.shuffle(files)
    dataset = pickle.loads(pickle.dumps(open_dataset(files)))
    assert sorted(names) == sorted(dataset.key(index) for index in range(len(dataset)))


def test_a_folder_with_sidecars(tmp_path: Path) -> None:
    for number, name in enumerate(
        ["a.jpg", "b.PNG", "c.jpg", "c.png", "sub/d.webp", ".hidden/x.jpg", "._a.jpg"]
    ):
        put(tmp_path / name, make_image(number))
    put(tmp_path / "a.txt", b"\xef\xbb\xbfa dog\r\n\r\n  two dogs \nthree")
    put(tmp_path / "b.json", {"caption": "from json", "label": 3, "score": 0.5})
    put(tmp_path / "c.png.txt", "the png")
    put(tmp_path / "sub/d.txt", "edited by hand\n")
    put(tmp_path / "sub/d.json", {"captions": ["old"], "qa": [{"question": "what?", "answer": 2}]})
    put(tmp_path / "list.csv", "no,image")
    dataset = open_dataset(tmp_path)
    assert captions(dataset) == {
        "a": ("a dog", "two dogs", "three"),
        "b": ("from json",),
        "c.jpg": (),
        "c.png": ("the png",),
        "sub/d": ("edited by hand",),
    }
    assert (dataset[1].label, dataset[1].extra) == ("3", {"score": 0.5})
    assert dataset[-1].questions == (Question("what?", ("2",)),)
    assert dataset[0].image == tmp_path / "a.jpg"
    assert [dataset.key(i) for i in range(5)] == list(captions(dataset))
    (note,) = dataset.notes
    assert note.endswith(
        "left out: 1 .csv; annotations are read where their file is named, not its folder: list.csv"
    )


def test_sidecars_of_the_captioner_are_read(tmp_path: Path) -> None:
    names = ["a.jpg", "b.jpg", "b.png", "d.jpg", "d.jpg.png", "sub/e.f.jpg"]
    sidecars = SidecarSink()
    for name in names:
        put(tmp_path / name, make_image())
    for name in names:
        assert sidecars.write(str(tmp_path / name), Caption(f"this is {name}").text) is None
    dataset = open_dataset(tmp_path)
    assert {str(s.image.relative_to(tmp_path)): s.captions for s in dataset} == {  # type: ignore[union-attr]
        name: (f"this is {name}",) for name in names
    }


def test_subfolders_are_classes_unless_there_are_sidecars(tmp_path: Path) -> None:
    for name in ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg"):
        put(tmp_path / name, make_image())
    dataset = open_dataset(tmp_path)
    assert [(s.key, s.label) for s in dataset] == [("cat/1", "cat"), ("cat/2", "cat"), ("dog/1", "dog")]
    assert dataset.notes == ("2 folders are taken as classes: cat, dog",)
    assert {s.label for s in open_dataset(tmp_path, classes=False)} == {None}
    put(tmp_path / "dog/1.txt", "a dog")  # with captions, folders are not classes
    assert {s.label for s in open_dataset(tmp_path)} == {None}
    assert [s.label for s in open_dataset(tmp_path, classes=True)] == ["cat", "cat", "dog"]


def test_circular_links_are_walked_once(tmp_path: Path) -> None:
    put(tmp_path / "x/a.jpg", make_image())
    (tmp_path / "x/up").symlink_to(tmp_path)
    assert len(open_dataset(tmp_path)) == 1


def test_escaped_keys_are_safe_paths_and_round_trip() -> None:
    for key in (
        "a.jpg",
        "../../etc/passwd",
        "/abs",
        "a//b",
        "",
        "c:\\x",
        "%2E",
        "a%",
        "50%25",
        ".x",
        "a.b.c",
        "\n",
    ):
        for dots in (False, True):
            name = escape_key(key, dots)
            assert unescape_key(name) == key
            assert not os.path.isabs(name)
            assert not {"", ".", ".."} & set(name.split("/"))
            assert "." not in name.split("/")[-1] or not dots


# Tables.


def test_csv_rows_of_one_image_merge(tmp_path: Path) -> None:
    for name in "ab":
        put(tmp_path / f"{name}.jpg", make_image())
    text = 'Filepath,Caption,question,answer,score\r\na.jpg,"one, with ""quotes""\nand a line",q?,yes,1\r\n'
    put(tmp_path / "x.csv", text + "b.jpg,b,,,\r\n\r\na.jpg,two,q?,no,2\r\na.jpg,[three],other?,maybe,")
    first, second = open_dataset(tmp_path / "x.csv")
    assert first.key == "a"
    assert first.captions == ('one, with "quotes"\nand a line', "two", "[three]")
    assert first.questions == (Question("q?", ("yes", "no")), Question("other?", ("maybe",)))
    assert first.extra == {"score": "1"}
    assert (second.key, second.captions, second.questions) == ("b", ("b",), ())


def test_tables_of_open_clip_and_json_cells(tmp_path: Path) -> None:
    for name in "ab":
        put(tmp_path / f"p/{name}.jpg", make_image())
    put(tmp_path / "clip.csv", "filepath\ttitle\np/a.jpg\ta, b and c\n")
    assert captions(open_dataset(tmp_path / "clip.csv")) == {"p/a": ("a, b and c",)}
    put(tmp_path / "x.tsv", 'image\tcaptions\tlabel\nb.jpg\t["one", "two"]\tcat\na.jpg\t[not json\tdog\n')
    dataset = open_dataset(tmp_path / "x.tsv", images=tmp_path / "p")
    assert [(s.key, s.captions, s.label) for s in dataset] == [
        ("b", ("one", "two"), "cat"),
        ("a", ("[not json",), "dog"),
    ]


def test_json_lines_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        put(tmp_path / f"{name}.jpg", make_image())
    region = {"label": "dog", "box": [0, 1, 2, 3.5], "polygons": [[0, 0, 1, 1, 0, 1]]}
    lines = [
        json.dumps({"image": "a.jpg", "caption": "A", "regions": [region]}),
        "{broken",
        '{"image": "gone.jpg", "caption": "x"}',
        '{"image": "http://x/y.jpg"}',
        '{"caption": "no image"}',
        '{"image": "b.jpg", "caption": "\\ud800"}',
        '{"image": "b.jpg", "caption": 5}',
        "",
        '{"image": "c.jpg", "question": "?", "answer": ["1", "one"], "key": "C"}',
    ]
    put(tmp_path / "x.jsonl", "\n".join(lines))
    good, skipped = streamed(open_dataset(tmp_path / "x.jsonl"))
    assert [s.key for s in good] == ["a", "C"]
    assert good[0].regions == (Region("dog", (0, 1, 2, 3.5), ((0, 0, 1, 1, 0, 1),)),)
    assert good[1].questions == (Question("?", ("1", "one")),)
    assert list(skipped) == ["x.jsonl row 2", "gone", "http://x/y", "x.jsonl row 5", "b"]
    assert "not fetched" in skipped["http://x/y"]
    put(tmp_path / "x.json", [{"image": "a.jpg", "caption": ["A", "B"]}, 7])
    good, skipped = streamed(open_dataset(tmp_path / "x.json"))
    assert ([s.captions for s in good], list(skipped)) == ([("A", "B")], ["x.json row 2"])
    monkeypatch.chdir(
        tmp_path
    )  # `sightloop caption --out lists/y.jsonl` writes paths relative to the current folder
    put(tmp_path / "lists/y.jsonl", '{"name": "a.jpg", "caption": "A", "match": 0.5}')
    assert captions(open_dataset("lists/y.jsonl")) == {"a": ("A",)}


def test_parquet_as_hugging_face_and_img2dataset_write_it(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [make_image(i) for i in range(5)]
    about = b'{"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"]}}}}'
    table = pa.table({"image": [{"bytes": p, "path": None} for p in images], "label": [0, 1, 1, 0, 1]})
    pq.write_table(
        table.replace_schema_metadata({b"huggingface": about}), tmp_path / "hf.parquet", row_group_size=2
    )
    dataset = open_dataset(tmp_path / "hf.parquet")
    assert [s.image for s in dataset] == images
    assert [s.label for s in dataset] == ["cat", "dog", "dog", "cat", "dog"]
    assert dataset.key(3) == "hf.parquet row 4"
    table = pa.table({"key": ["0", "1"], "jpg": images[:2], "caption": ["x", None], "hash": [b"1", b"2"]})
    pq.write_table(table, tmp_path / "img.parquet")
    assert [(s.key, s.image, s.captions, s.extra) for s in open_dataset(tmp_path / "img.parquet")] == [
        ("0", images[0], ("x",), {}),
        ("1", images[1], (), {}),
    ]
    put(tmp_path / "p.jpg", make_image())
    pq.write_table(pa.table({"path": ["p.jpg", "p.jpg"], "text": ["a", "b"]}), tmp_path / "p.parquet")
    assert captions(open_dataset(tmp_path / "p.parquet")) == {"p": ("a", "b")}
    put(tmp_path / "no.parquet", b"PAR1 no")
    with pytest.raises(UsageError, match=r"no\.parquet"):
        open_dataset(tmp_path / "no.parquet")


def test_a_table_without_images_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="img2dataset"):
        open_dataset(put(tmp_path / "urls.csv", "url,caption\nhttp://x,y\n"))
    with pytest.raises(UsageError, match="no image column among words, more"):
        open_dataset(put(tmp_path / "x.csv", "words,more\n1,2\n"))


# COCO.


def coco(folder: Path) -> dict[str, Any]:
    for number in (1, 2):
        put(folder / f"val/{number}.jpg", make_image(number))
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 4, "width": 5, "license": 3} for i in (1, 2)]
    return {"images": images}


def test_coco_files_merge(tmp_path: Path) -> None:
    base = coco(tmp_path)
    boxed = {"image_id": 1, "category_id": 9, "bbox": [1, 1, 2, 2.5]}
    regions = [
        boxed | {"id": 5, "segmentation": [[0, 0, 1, 0, 1, 1]], "iscrowd": 0},
        boxed | {"id": 6, "segmentation": {"counts": "abc", "size": [4, 5]}, "iscrowd": 1},
        {"id": 7, "image_id": 99, "category_id": 9, "bbox": [0, 0, 1, 1]},
    ]
    captions_json = base | {"annotations": [{"id": 1, "image_id": 1, "caption": c} for c in ("x", "y")]}
    categories = {"categories": [{"id": 9, "name": "dog"}]}
    paths = [
        put(tmp_path / "annotations/captions_val.json", captions_json),
        put(tmp_path / "annotations/instances_val.json", base | categories | {"annotations": regions}),
        put(
            tmp_path / "annotations/keypoints_val.json",
            base | categories | {"annotations": [regions[0] | {"keypoints": [0]}]},
        ),
    ]
    dataset = open_dataset(paths)
    first, second = dataset
    assert (first.key, first.captions) == ("1", ("x", "y"))
    assert first.regions == (Region("dog", (1, 1, 3, 3.5), ((0, 0, 1, 0, 1, 1),)),)
    crowd = [{"label": "dog", "bbox": [1, 1, 2, 2.5], "segmentation": {"counts": "abc", "size": [4, 5]}}]
    assert first.extra == {"license": 3, "image_id": 1, "crowd": crowd}
    assert (second.captions, second.regions, second.extra) == ((), (), {"license": 3, "image_id": 2})
    assert set(dataset.notes) == {
        "1 keypoints are left out",
        "1 crowd regions (iscrowd 1) are kept aside: they are neither learned nor searched",
        "1 annotations are about images that are not listed",
    }


def test_vqa_files_merge(tmp_path: Path) -> None:
    put(tmp_path / "val2014/COCO_val2014_000000000042.jpg", make_image())
    asked = [{"question_id": i, "image_id": 42, "question": f"{i}?"} for i in (1, 2)]
    answers = [{"question_id": 1, "image_id": 42, "answers": [{"answer": "yes"}, {"answer": "no"}]}]
    paths = [
        put(tmp_path / "questions_val2014.json", {"data_subtype": "val2014", "questions": asked}),
        put(tmp_path / "annotations_val2014.json", {"data_subtype": "val2014", "annotations": answers}),
    ]
    dataset = open_dataset(paths)
    assert dataset[0].questions == (Question("1?", ("yes", "no")),)
    assert dataset.notes == ("1 questions without answers are left out",)


def test_damaged_coco_is_refused(tmp_path: Path) -> None:
    base = coco(tmp_path)
    with pytest.raises(UsageError, match=r"z\.json: images .* not found .*--images"):
        open_dataset(put(tmp_path / "x/y/z.json", base))
    assert len(open_dataset(tmp_path / "x/y/z.json", images=tmp_path / "val")) == 2
    for wrong in ({"info": {}}, base | {"annotations": 5}, {"images": 5}):
        with pytest.raises(UsageError, match=r"wrong\.json cannot be read as COCO JSON"):
            open_dataset(put(tmp_path / "val/wrong.json", wrong), images=tmp_path / "val")
    noted = base | {"annotations": [{"image_id": 1, "bbox": [0, 0], "category_id": 1}]}
    good, skipped = streamed(open_dataset(put(tmp_path / "w.json", noted), images=tmp_path / "val"))
    assert ([s.key for s in good], list(skipped)) == (["2"], ["1"])


# Datasets.


def test_published_data_sets(shared_data: Path) -> None:
    flickr = open_dataset(str(shared_data / "flickr8k/train-{000..001}.tar"))
    assert all(len(sample.captions) == 5 for sample in flickr.select(range(0, len(flickr), 97)))
    daquar = open_dataset(shared_data / "daquar/train-000.tar")
    assert (len(daquar), sum(len(sample.questions) for sample in daquar)) == (794, 6795)
    files = [
        shared_data / f"coco_mini/annotations/{name}_train2017.json" for name in ("captions", "instances")
    ]
    both = list(open_dataset(files))
    assert (len(both), sum(len(s.captions) for s in both)) == (80, 400)
    assert sum(len(s.regions) + len(s.extra.get("crowd", ())) for s in both) == 739
    clothing = open_dataset(shared_data / "clothing")
    assert len({sample.label for sample in clothing}) == 10


def test_select_pickle_and_threads(tmp_path: Path) -> None:
    shards = [
        tar(tmp_path / f"{s}.tar", {f"{s}{i}.jpg": make_image(10 * s + i) for i in range(4)})
        for s in range(3)
    ]
    dataset = open_dataset(shards)
    part = dataset.select(np.array([11, 0, 5])).select([2, 0])
    assert ([s.key for s in part], part.key(1), len(part)) == (["11", "23"], "23", 2)
    assert pickle.loads(pickle.dumps(part))[0] == dataset[5]
    for index in (12, -13):
        with pytest.raises(IndexError):
            dataset[index]
    with pytest.raises(IndexError):
        part.select([2])
    samples: dict[int, Sample] = {}
    threads = [
        threading.Thread(target=lambda i=i: samples.update({i: dataset[i]}))  # type: ignore[misc]
        for i in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [samples[i] for i in range(12)] == list(dataset)


def test_the_fingerprint_depends_on_the_content_only(tmp_path: Path) -> None:
    for place in "ab":
        put(tmp_path / place / "x.jpg", make_image())
        put(tmp_path / place / "x.txt", "one")
        put(tmp_path / place / "t.csv", "image,caption\nx.jpg,one\n")
        tar(tmp_path / place / "s.tar", {"x.jpg": make_image(), "x.json": '{"caption": "one"}'})
    os.utime(tmp_path / "b/x.jpg", (0, 0))
    for name in ("", "t.csv", "s.tar"):
        prints = [open_dataset(tmp_path / place / name).fingerprint for place in "ab"]
        assert prints[0] == prints[1]
        assert len(prints[0]) == 32
        assert open_dataset(tmp_path / "a" / name).select([0]).fingerprint != prints[0]
    before = {name: open_dataset(tmp_path / "b" / name).fingerprint for name in ("", "t.csv", "s.tar")}
    put(tmp_path / "b/x.txt", "two")
    put(tmp_path / "b/t.csv", "image,caption\nx.jpg,two\n")
    tar(tmp_path / "b/s.tar", {"x.jpg": make_image(), "x.json": '{"caption": "two"}'})
    for name, old in before.items():
        assert open_dataset(tmp_path / "b" / name).fingerprint != old


def test_missing_empty_and_unknown_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    put(tmp_path / "x.zip", b"PK")
    for source, words in {
        "gone.tar": "no such file",
        "empty": "no images in it",
        "x.zip": "x.zip: unknown kind",
        "*.tar": "matches no files",
        "a-{0..1}.tar": "a-0.tar",
    }.items():
        with pytest.raises(UsageError, match=words):
            open_dataset(str(tmp_path / source))
    for source in ("https://x/y.tar", "pipe:cat x.tar", "s3://b/x.tar"):
        with pytest.raises(UsageError, match="URLs are not supported"):
            open_dataset(source)


def test_a_broken_sample_raises_without_on_skip(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg", make_image())
    put(tmp_path / "a.txt", b"\xff")
    with pytest.raises(ImageError, match=r"a: a\.txt is not UTF-8"):
        list(open_dataset(tmp_path))


def test_streams_are_read_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members: dict[str, bytes | str] = {}
    for number in range(3):
        members |= {f"{number}.jpg": make_image(number), f"{number}.txt": f"no {number}"}
    path = tar(tmp_path / "x.tar", members)
    truth = list(open_dataset(path))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(path.read_bytes())))
    standard = open_dataset("-")
    assert standard.is_stream
    for ask in (lambda: len(standard), lambda: standard[0], lambda: standard.select([0])):
        with pytest.raises(TypeError, match="no length"):
            ask()
    assert list(standard) == truth
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    zipped = open_dataset(tmp_path / "x.tar.gz")
    with pytest.raises(UsageError, match="no fingerprint"):
        _ = zipped.fingerprint
    assert list(zipped) == truth
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(path.read_bytes()))
    writer.start()
    assert list(open_dataset(tmp_path / "pipe")) == truth
    writer.join()
    (tmp_path / "cut.tar.gz").write_bytes(gzip.compress(path.read_bytes(), 0)[:3000])
    good, skipped = streamed(open_dataset(tmp_path / "cut.tar.gz"))
    assert good == truth[: len(good)]
    assert len(good) < 3
    assert list(skipped) == ["cut.tar.gz"]
    with pytest.raises(UsageError, match="alone"):
        open_dataset([tmp_path / "cut.tar.gz", path])


def test_keys_of_a_shard_equal_those_of_tarfile(shared_data: Path) -> None:
    path = shared_data / "flickr8k/dev-000.tar"
    with tarfile.open(path) as file:
        names = [Path(name).stem for name in file.getnames()]
    dataset = open_dataset(path)
    assert [dataset.key(i) for i in range(len(dataset))] == list(dict.fromkeys(names))


@pytest.mark.parametrize("text", ["a\u2028b", "a\x85b", "a\nb\x1c", "\udcff", "ä \U0001f436"])
def test_json_text_is_one_line(text: str) -> None:
    made = json_text({"text": text})
    assert made.encode().decode().splitlines() == [made]
    assert json.loads(made) == {"text": text}
