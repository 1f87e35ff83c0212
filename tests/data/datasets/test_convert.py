from __future__ import annotations

import csv
import gzip
import json
import os
import tarfile
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sightloop import open_dataset
from sightloop.data.datasets import convert as convert_module
from sightloop.data.datasets.convert import convert
from sightloop.data.datasets.schema import key_hash
from sightloop.errors import UsageError
from sightloop.types import Failed, Question, Region, Sample
from tests.data.datasets.sources import make_image, put, tar

TARGETS = {
    "folder": "out",
    "tar": "out.tar",
    "shards": "out-{00..}.tar",
    "parquet": "out.parquet",
    "csv": "out.csv",
    "tsv": "out.tsv",
    "jsonl": "out.jsonl",
    "coco": "out.json",
}
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # many small writes
AWKWARD = st.text(st.sampled_from("ab \"',;\t\n\r[]{}\\é漢🐕\u2028\x85\x00\ufeff%#"), max_size=12)
TEXTS = st.one_of(AWKWARD, st.text(max_size=20), st.sampled_from(["", " ", "[1]", '{"a": 1}', "null", "nan"]))
KEYS = st.lists(
    st.one_of(
        st.text(st.sampled_from("ab./%#é \\:A0_-\n"), min_size=1, max_size=8),
        st.sampled_from(
            [
                "a",
                "a.jpg",
                "a.txt",
                "a/b",
                "../x",
                "/abs",
                ".hidden",
                "__",
                "%5F_",
                "a//b",
                "%2E",
                "con:",
                "a.json/b",
            ]
        ),
    ),
    min_size=1,
    max_size=5,
    unique_by=str.casefold,
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**40), 2**40), TEXTS),
    lambda inner: st.lists(inner, max_size=2),
)
NAMES = st.sampled_from(
    ["url", "caption", "Label", "key", "extra", "image", "id", "width", "score", "qa", "crowd"]
)
HUNDREDTHS = st.integers(0, 10**5).map(lambda number: number / 100)
REGIONS = st.builds(
    lambda label, x, y, w, h, *rest: Region(label, (x, y, x + w, y + h), *rest),
    TEXTS, HUNDREDTHS, HUNDREDTHS, HUNDREDTHS, HUNDREDTHS,
    st.lists(st.lists(HUNDREDTHS, min_size=6, max_size=6).map(tuple), max_size=2).map(tuple),
    st.none() | HUNDREDTHS,
)  # fmt: skip
QUESTIONS = st.builds(Question, TEXTS, st.lists(TEXTS, min_size=1, max_size=3).map(tuple))
SAMPLES = st.builds(
    lambda keys, fields: [
        Sample(key, make_image(number), *fields[number % len(fields)]) for number, key in enumerate(keys)
    ],
    KEYS,
    st.lists(
        st.tuples(
            st.lists(TEXTS, max_size=3).map(tuple),
            st.lists(QUESTIONS, max_size=2).map(tuple),
            st.lists(REGIONS, max_size=2).map(tuple),
            st.one_of(st.none(), TEXTS.filter(bool)),
            st.dictionaries(NAMES, JSON, max_size=3),
        ),
        min_size=1,
        max_size=5,
    ),
)  # fmt: skip


class ListSource:
    """A `SampleSource` over a list of samples."""

    name, notes = "list", ()

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def key_hashes(self) -> list[int]:
        return [key_hash(sample.key) for sample in self.samples]

    def key(self, index: int) -> str:
        return self.samples[index].key

    def sample(self, index: int, key: str) -> Sample:
        return self.samples[index]

    def digest(self) -> str:
        return ""


def dataset(samples: Sequence[Sample]) -> Any:
    from sightloop import Dataset

    return Dataset([ListSource(samples)])


def read(source: Any) -> dict[str, Sample]:
    """The samples by key, their images as bytes."""
    samples = list(open_dataset(source))
    plain = [
        replace(s, image=s.image if isinstance(s.image, bytes) else s.image.read_bytes()) for s in samples
    ]
    assert len({sample.key for sample in plain}) == len(plain)
    return {sample.key: sample for sample in plain}


def where(folder: Path, kind: str) -> Any:
    return str(folder / TARGETS[kind]).replace("{00..}", "*")


def expected(sample: Sample, kind: str) -> Sample:
    if kind in ("csv", "tsv"):
        return replace(sample, captions=tuple(caption for caption in sample.captions if caption))
    return sample


@pytest.mark.parametrize("kind", TARGETS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(samples=SAMPLES)
def test_every_format_round_trips(kind: str, samples: list[Sample]) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        done = convert(dataset(samples), Path(folder) / TARGETS[kind], shard_size=2)
        assert (done.samples, done.failed) == (len(samples), 0)
        back = read(where(Path(folder), kind))
    if kind == "coco":  # `image_id` is added
        back = {
            k: replace(s, extra={n: v for n, v in s.extra.items() if n != "image_id"})
            for k, s in back.items()
        }
    assert back == {sample.key: expected(sample, kind) for sample in samples}
    empty = sum(caption == "" for sample in samples for caption in sample.captions)
    if kind in ("csv", "tsv") and empty:
        assert done.notes == (f"{empty} empty captions, which {kind} cannot hold",)
    elif kind == "coco" and any(s.captions for s in samples) and any(s.regions for s in samples):
        assert "out.captions.json" in done.notes[0]
    else:
        assert done.notes == ()


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SAMPLES, st.permutations([kind for kind in TARGETS if kind not in ("csv", "tsv", "coco")]))
def test_a_chain_of_conversions_loses_nothing(samples: list[Sample], kinds: list[str]) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        source: Any = dataset(samples)
        for number, kind in enumerate(kinds):
            convert(source, Path(name) / str(number) / TARGETS[kind], shard_size=2)
            source = where(Path(name) / str(number), kind)
        assert read(source) == {sample.key: sample for sample in samples}


def test_published_data_sets_round_trip(shared_data: Path, tmp_path: Path) -> None:
    coco = [
        shared_data / "coco_mini/annotations" / f"{name}_train2017.json" for name in ("captions", "instances")
    ]
    flickr, daquar = (
        open_dataset(shared_data / name) for name in ("flickr8k/dev-000.tar", "daquar/train-000.tar")
    )
    sources = {
        "coco": open_dataset(coco),
        "flickr": flickr.select(range(40)),
        "daquar": daquar.select(range(0, 794, 20)),
    }
    sources["clothing"] = open_dataset(shared_data / "clothing").select(range(0, 1000, 25))
    for name, source in sources.items():
        truth = {
            s.key: replace(s, image=s.image if isinstance(s.image, bytes) else s.image.read_bytes())
            for s in source
        }
        for kind, target in TARGETS.items():
            place = tmp_path / name / kind
            done = convert(source, place / target, shard_size=17)
            assert (
                done.samples,
                done.failed,
                [n for n in done.notes if "cannot hold" in n and "captions.json" not in n],
            ) == (
                len(truth),
                0,
                [],
            )
            back = read(where(place, kind))
            if kind == "coco" and name != "coco":
                for key, sample in back.items():
                    assert isinstance(dict(sample.extra).pop("image_id"), int)
                    back[key] = replace(
                        sample, extra={n: v for n, v in sample.extra.items() if n != "image_id"}
                    )
            assert back == truth


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number, name in enumerate(["b.jpg", "a.png", "sub/c.jpg"]):
        put(tmp_path / "photos" / name, make_image(number, "PNG" if name.endswith("png") else "JPEG"))
    put(tmp_path / "photos/b.txt", "one\ntwo\n")
    put(tmp_path / "photos/sub/c.txt", "three\n")
    return tmp_path / "photos"


def test_shards_are_reproducible_and_readable_by_tarfile(photos: Path, tmp_path: Path) -> None:
    convert(photos, tmp_path / "x/s-{000..}.tar", shard_size=2)
    convert(photos, tmp_path / "y", to="tar", shard_size=2)
    first, second = sorted((tmp_path / "x").glob("*.tar")), sorted((tmp_path / "y").glob("*.tar"))
    assert [p.name for p in first] == ["s-000.tar", "s-001.tar"]
    assert [p.name for p in second] == ["00000.tar", "00001.tar"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    with tarfile.open(first[0]) as file:
        names = file.getnames()
        assert names == ["a.json", "a.png", "a.txt", "b.jpg", "b.json", "b.txt"]  # the same for every sample
        assert {(m.mtime, m.uid, m.uname, m.mode) for m in file} == {(0, 0, "", 0o644)}
        assert file.extractfile("a.png").read() == (photos / "a.png").read_bytes()  # type: ignore[union-attr]
        assert json.load(file.extractfile("b.json")) == {"captions": ["one", "two"]}  # type: ignore[arg-type]
        assert [file.extractfile(f"{n}.txt").read() for n in "ab"] == [b"", b"one"]  # type: ignore[union-attr]
    with tarfile.open(first[1]) as file:
        assert file.extractfile("sub/c.txt").read() == b"three"  # type: ignore[union-attr]


def test_tables_refer_to_files_where_they_are(photos: Path, tmp_path: Path) -> None:
    convert(photos, tmp_path / "lists/x.csv")
    with open(tmp_path / "lists/x.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["key"], row["image"], row["caption"]) for row in rows] == [
        ("a", "../photos/a.png", ""),
        ("b", "../photos/b.jpg", "one"),
        ("b", "../photos/b.jpg", "two"),
        ("sub/c", "../photos/sub/c.jpg", "three"),
    ]
    assert [path.name for path in (tmp_path / "lists").iterdir()] == ["x.csv"]


def test_broken_samples_are_named_and_the_rest_is_written(photos: Path, tmp_path: Path) -> None:
    put(photos / "broken.jpg", b"<html>not found")
    put(photos / "bad.jpg", make_image(9))
    put(photos / "bad.txt", b"\xff\xfe not utf-8")
    put(photos / ("x" * 245 + ".jpg"), make_image(10))
    events = []
    done = convert(photos, tmp_path / "x.tar", notify=events.append)
    assert (done.samples, done.failed) == (3, 3)
    failed = {event.name: event.reason for event in events if isinstance(event, Failed)}
    assert set(failed) == {"broken", "bad", "x" * 245}
    assert "HTML" in failed["broken"]
    assert "not UTF-8" in failed["bad"]


def test_targets_are_replaced_as_a_whole_and_only_with_overwrite(photos: Path, tmp_path: Path) -> None:
    def everything() -> dict[str, bytes]:
        return {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    for target in ("x.tar", "x.csv", "x-{0..}.tar", "x"):
        convert(photos, tmp_path / target, shard_size=1)
    before = everything()
    for target in ("x.tar", "x.csv", "x-{0..}.tar", "x"):
        with pytest.raises(UsageError, match="--overwrite"):
            convert(photos, tmp_path / target)
    with pytest.raises(UsageError, match="no conversion wrote it"):
        convert(tmp_path / "x", photos, overwrite=True)  # a folder of a person
    put(tmp_path / "only.jpg/x.jpg", b"broken")
    with pytest.raises(UsageError, match="none of 1 samples can be read"):
        convert(tmp_path / "only.jpg", tmp_path / "x.csv", overwrite=True)
    (tmp_path / "only.jpg/x.jpg").unlink()
    assert everything() == before
    put(photos / "d.jpg", make_image(5))
    for target in ("x.tar", "x.csv", "x"):
        assert convert(photos, tmp_path / target, overwrite=True).samples == 4
    convert(photos, tmp_path / "x-{0..}.tar", overwrite=True)
    assert [path.name for path in tmp_path.glob("x-*.tar")] == [
        "x-0.tar"
    ]  # shards with higher numbers are removed
    assert not list(tmp_path.glob(".sightloop*"))
    assert (tmp_path / "x/d.jpg").is_file()


def test_an_interrupted_run_leaves_the_old_file(photos: Path, tmp_path: Path) -> None:
    put(tmp_path / "x.tar", b"old")

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(photos, tmp_path / "x.tar", overwrite=True, notify=stop)
    assert (tmp_path / "x.tar").read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "x.tar"}
    put(tmp_path / ".sightloop-x.tar.tmp/x.tar", b"what a killed run left")
    convert(photos, tmp_path / "x.tar", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "x.tar"}


def test_a_folder_can_be_converted_into_itself(photos: Path, tmp_path: Path) -> None:
    convert(photos, tmp_path / "x")
    truth = read(tmp_path / "x")
    convert(tmp_path / "x", tmp_path / "x", overwrite=True)
    assert read(tmp_path / "x") == truth


def test_the_kind_must_be_known(photos: Path, tmp_path: Path) -> None:
    for target, to in (("x.zip", None), ("folder", "csv")):
        with pytest.raises(UsageError, match=r"kind|one file"):
            convert(photos, tmp_path / target, to=to)  # type: ignore[arg-type]
    assert convert(photos, tmp_path / "x.list", to="jsonl").kind == "jsonl"
    with pytest.raises(UsageError, match="shard_size"):
        convert(photos, tmp_path / "x.tar", shard_size=0)


def test_repeated_keys_of_shards_are_numbered(tmp_path: Path) -> None:
    shards = [tar(tmp_path / f"{i}.tar", {"0.jpg": make_image(i), "0.txt": f"number {i}"}) for i in range(3)]
    convert(shards, tmp_path / "all")
    assert {k: s.captions for k, s in read(tmp_path / "all").items()} == {
        "0": ("number 0",),
        "0#2": ("number 1",),
        "0#3": ("number 2",),
    }


KINDS = [kind for kind in TARGETS if kind != "shards"]


@pytest.mark.parametrize("kind", KINDS)
def test_keys_that_look_numbered_lose_no_sample(tmp_path: Path, kind: str) -> None:
    """From shards and from a stream; the record between two equal keys is broken, so that they become neighbors."""
    keys = ["0", "broken", "0", "0#2", "0", "0#2"]
    members = [(f"{key}.jpg", make_image(i) if i != 1 else b"") for i, key in enumerate(keys)]
    shards = [tar(tmp_path / f"{i}.tar", [member]) for i, member in enumerate(members)]
    stream = put(tmp_path / "x.tar.gz", gzip.compress(tar(tmp_path / "x.tar", members).read_bytes()))
    for source, names in (
        (shards, ["0", "0#3", "0#2", "0#4", "0#2#2"]),
        (stream, ["0", "0#2", "0#2#2", "0#3", "0#2#3"]),
    ):
        done = convert(source, tmp_path / "made" / TARGETS[kind], overwrite=True)
        back = read(where(tmp_path / "made", kind))
        assert done.samples == 5
        assert sorted(back) == sorted(names)
        assert [back[name].image for name in names] == [make_image(i) for i in range(6) if i != 1]


@pytest.mark.parametrize("target", ["out.tar", "out"])
def test_a_concurrent_run_is_refused(tmp_path: Path, target: str) -> None:
    pytest.importorskip("fcntl")
    for name in ("a.png", "b.png"):
        put(tmp_path / "in" / name, make_image())
    events: list[Any] = []

    def meanwhile(event: Any) -> None:
        events.append(event)
        for _ in range(2):
            with pytest.raises(UsageError, match="another run is writing it now"):
                convert(tmp_path / "in", tmp_path / target)

    assert convert(tmp_path / "in", tmp_path / target, notify=meanwhile).samples == 2
    assert len(events) == 2
    assert len(open_dataset(tmp_path / target)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in", target])


@pytest.mark.parametrize("target", ["out.csv", "out.json"])
def test_a_folder_behind_a_link(tmp_path: Path, target: str) -> None:
    put(tmp_path / "in" / "a.png", make_image())
    put(tmp_path / "in" / "a.txt", "a dog\n")
    real = tmp_path / "far" / "away"
    real.mkdir(parents=True)
    (tmp_path / "link").symlink_to(real)
    convert(tmp_path / "in", tmp_path / "link" / target)
    (sample,) = open_dataset(tmp_path / "link" / target)
    assert isinstance(sample.image, Path)
    assert sample.image.samefile(tmp_path / "in" / "a.png")
    put(real / "b.png", make_image())
    convert(tmp_path / "link", tmp_path / "link" / "own.csv")
    assert "../" not in (real / "own.csv").read_text()


def test_parquet_is_images_for_hugging_face(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    convert(dataset([Sample("a", make_image(), ("x",))]), tmp_path / "x.parquet")
    schema = pq.read_schema(tmp_path / "x.parquet")
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features == {"image": {"_type": "Image"}}
    assert [field.name for field in schema.field("image").type] == ["bytes", "path"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_killed_replacement_leaves_the_old_folder_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    class Killed(BaseException):
        pass

    target = tmp_path / "out"
    convert(dataset([Sample("old", make_image(1))]), target)
    if not can_exchange:
        monkeypatch.setattr(convert_module, "exchange_paths", lambda *_: False)
    rename, calls = os.rename, 0

    def killed_rename(source: Path, final: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Killed
        rename(source, final)

    new = [Sample("new", make_image(2))]
    with monkeypatch.context() as patch, suppress(Killed):
        patch.setattr(os, "rename", killed_rename)
        convert(dataset(new), target, overwrite=True)
    if can_exchange:
        assert [sample.key for sample in open_dataset(target)] == ["new"]
    # Recovers the old folder, and fails for a reason of its own.
    with pytest.raises(UsageError, match="none of 1 samples"):
        convert(dataset([Sample("bad", b"no image")]), target, overwrite=True)
    assert [sample.key for sample in open_dataset(target)] == (["new"] if can_exchange else ["old"])
    convert(dataset(new), target, overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert [sample.key for sample in open_dataset(target)] == ["new"]
