from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightloop import open_dataset
from sightloop.data.datasets.webdataset import ShardSource, StreamSource
from sightloop.errors import ImageError
from sightloop.types import Sample
from tests.data.datasets.sources import make_image, put, tar
from tests.data.datasets.test_dataset import streamed


def test_webdataset_rules(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {
        "readme": "no ending",
        "a/x.b.jpg": b"not the image: its ending is b.jpg",
        "a/x.JPG": make_image(1),
        "a/x.png": make_image(2, "PNG"),
        "a/x.cls": "7",
        "a/x.txt": "one\ntwo\n",
        "b/x.webp": make_image(3, "WEBP"),
        "b/x.json": '{"caption": "a\\nb", "key": "b/x", "url": "u"}',
        "b/x.txt": "a\nb",
        "b/x.npy": "left out",
        "._b/._x.jpg": "macOS",
        "c.txt": "no image",
    }
    dataset = open_dataset(tar(tmp_path / "x.tar", members))
    good, skipped = streamed(dataset)
    assert [(s.key, s.image, s.captions, s.label, s.extra) for s in good] == [
        ("a/x", members["a/x.JPG"], ("one", "two"), "7", {}),
        ("b/x", members["b/x.webp"], ("a\nb",), None, {"url": "u"}),
    ]
    assert skipped == {"c": "no image among its members: c.txt"}
    assert dataset.notes == ("x.tar: members of other kinds are left out: 1 .b.jpg, 1 .npy",)


def test_a_repeated_extension_begins_another_sample(tmp_path: Path) -> None:
    """Neighboring samples with one key, as in concatenated shards, are not merged."""
    members = [
        ("a.jpg", make_image(1)),
        ("a.txt", b"one"),
        ("a.jpg", make_image(2)),
        ("a.json", b"{}"),
        ("a.txt", b"two"),
    ]
    plain = tar(tmp_path / "x.tar", members)
    zipped = put(tmp_path / "x.tar.gz", gzip.compress(plain.read_bytes()))
    for path in (plain, zipped):
        assert [(s.key, s.image, s.captions) for s in open_dataset(path)] == [
            ("a", make_image(1), ("one",)),
            ("a#2", make_image(2), ("two",)),
        ]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names(tmp_path: Path, format: int) -> None:
    name = "/".join(["d" * 60, "e" * 60, "n" * 60])
    if format != tarfile.USTAR_FORMAT:
        name += "é" * 150
    dataset = open_dataset(tar(tmp_path / "x.tar", {f"{name}.jpg": make_image(), f"{name}.txt": "x"}, format))
    assert [(s.key, s.captions) for s in dataset] == [(name, ("x",))]


def test_links_devices_and_unsafe_names_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        for name, kind in (("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("dev", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(f"{name}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
        for name in ("/abs.jpg", "../up.jpg", "fine.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(make_image())
            file.addfile(info, io.BytesIO(make_image()))
    good, skipped = streamed(open_dataset(tmp_path / "x.tar"))
    assert [s.key for s in good] == ["fine"]
    assert list(skipped) == ["link", "hard", "dev", "/abs", "../up"]
    assert all("not followed" in reason for reason in skipped.values())


def both_ways(path: Path) -> tuple[list[Sample], dict[str, str]]:
    """The samples and errors of a shard by index; those of a stream must be equal."""
    shard = open_dataset(path)
    zipped = path.with_name(path.name + ".gz")
    zipped.write_bytes(gzip.compress(path.read_bytes(), 0))
    samples: list[Sample | ImageError] = list(StreamSource(zipped).samples())
    good, skipped = streamed(shard)
    assert good == [sample for sample in samples if isinstance(sample, Sample)]
    errors = {
        error.name.removesuffix(".gz"): error.reason for error in samples if isinstance(error, ImageError)
    }
    assert errors.keys() == skipped.keys()
    return good, skipped


MEMBERS = {
    f"{i}.{e}": make_image(i) if e == "jpg" else f'{{"caption": "{i}"}}'
    for i in range(4)
    for e in ("jpg", "json")
}
IMAGE_BYTES = 512 + -(-len(make_image()) // 512) * 512  # with its header
SIZE = 4 * (IMAGE_BYTES + 1024)


CUTS = st.one_of(st.integers(0, SIZE + 1024), st.integers(0, SIZE // 512 + 2).map(lambda block: block * 512))


@given(CUTS)
def test_a_truncated_shard_gives_its_complete_samples(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tar(tmp_path_factory.mktemp("cut") / "x.tar", MEMBERS)
    complete = list(open_dataset(path))
    data = path.read_bytes()[:cut]
    path.write_bytes(data)
    good, skipped = both_ways(path)
    number, rest = divmod(min(cut, SIZE), SIZE // 4)
    if rest == IMAGE_BYTES:  # between two members: no sign that the sample is incomplete
        assert [sample.key for sample in good] == [sample.key for sample in complete[: number + 1]]
    elif 0 < rest < 512:  # in a header whose name is not known: the sample before it may be incomplete
        assert good == complete[: max(0, number - 1)]
    else:
        assert good == complete[:number]
    if cut < SIZE + 512:
        assert list(skipped) == ["x.tar"]
        assert f"beyond its first {len(good):,} samples" in skipped["x.tar"]


@given(st.integers(0, SIZE - 1), st.integers(1, 255))
def test_damage_is_reported_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, place: int, flip: int
) -> None:
    path = tar(tmp_path_factory.mktemp("damage") / "x.tar", MEMBERS)
    data = bytearray(path.read_bytes())
    place_in_sample = place % (SIZE // 4)
    in_header = place_in_sample < 512 or 0 <= place_in_sample - IMAGE_BYTES < 512
    data[place] ^= flip
    path.write_bytes(data)
    good, skipped = both_ways(path)
    assert len(good) + len(skipped) <= 5
    if in_header and not skipped:  # a checksum cannot tell blanks from zeros around a number
        assert len(good) == 4
    if in_header and skipped:
        assert good == [s for s in good if s.captions]  # no sample lost its caption


@given(st.binary(max_size=3000))
def test_random_bytes_are_not_a_shard(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    path = tmp_path_factory.mktemp("noise") / "x.tar"
    path.write_bytes(noise)
    shard = ShardSource(path)
    assert len(shard) <= 1


def test_a_bad_or_huge_member_fails_its_sample_only(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "x.tar",
        {"a.jpg": make_image(), "a.json": "[1]", "b.jpg": make_image(), "b.json": "{" * 100_000},
    )
    put = tar(
        tmp_path / "y.tar",
        {"a.jpg": make_image(), "a.txt": b"x" * (16 * 1024 * 1024 + 1), "b.jpg": make_image()},
    )
    assert list(streamed(open_dataset(path))[1]) == ["a", "b"]
    good, skipped = streamed(open_dataset(put))
    assert ([s.key for s in good], list(skipped)) == (["b"], ["a"])


def test_data_after_the_end_mark_is_read_or_reported(tmp_path: Path) -> None:
    one = tar(
        tmp_path / "1.tar", {"a.jpg": make_image(1), "a.txt": "one", "b.jpg": make_image(2)}
    ).read_bytes()
    two = tar(tmp_path / "2.tar", {"c.jpg": make_image(3), "c.txt": "three"}).read_bytes()
    (tmp_path / "joined.tar").write_bytes(one + two)  # as cat does
    joined = open_dataset(tmp_path / "joined.tar")
    assert [(s.key, s.image, s.captions) for s in joined] == [
        ("a", make_image(1), ("one",)),
        ("b", make_image(2), ()),
        ("c", make_image(3), ("three",)),
    ]
    assert joined.fingerprint != open_dataset(tmp_path / "1.tar").fingerprint
    wiped = bytearray(one)
    wiped[1024:2048] = bytes(1024)
    for name, data in (
        ("wiped", bytes(wiped)),
        ("junk", one + b"junk" * 200),
        ("zeros", bytes(3 << 20)),
        ("short", one + b"x"),
    ):
        (tmp_path / f"{name}.tar").write_bytes(data)
        skipped = streamed(open_dataset(tmp_path / f"{name}.tar"))[1]
        assert "cannot be read beyond" in skipped[f"{name}.tar"]
    (tmp_path / "padded.tar").write_bytes(one + bytes(100_100))
    assert [s.key for s in open_dataset(tmp_path / "padded.tar")] == ["a", "b"]
