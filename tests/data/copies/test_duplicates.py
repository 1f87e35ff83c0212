"""Duplicates: kinds with their evidence, clusters, which image is kept; conversion without copies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from sightloop.data.copies.duplicates import Duplicates, ImageFacts, find_duplicates
from sightloop.data.copies.image_hash import pixels_digest
from sightloop.data.datasets.convert import convert
from sightloop.data.datasets.dataset import open_dataset
from sightloop.data.datasets.dedupe import without_copies
from sightloop.data.images.decode import decode
from sightloop.errors import UsageError
from tests.data.copies.scenes import encoded, scene


@pytest.fixture
def images() -> dict[str, bytes]:
    """Three originals; of "a" the same bytes, the same pixels, a small and a mirrored copy."""
    a = scene(1)
    return {
        "a.png": encoded(a),
        "b.png": encoded(scene(2)),
        "same bytes.png": encoded(a),
        "same pixels.bmp": encoded(a, "BMP"),
        "small.jpg": encoded(a.resize((60, 60)), "JPEG", quality=80),
        "mirrored.jpg": encoded(ImageOps.mirror(a), "JPEG", quality=90),
        "c.png": encoded(scene(3)),
        "flat.png": encoded(Image.new("RGB", (96, 96), "white")),
        "flat too.png": encoded(Image.new("RGB", (90, 90), "white")),
    }


def found_in(images: dict[str, bytes], **options: object) -> Duplicates:
    facts = [ImageFacts.of(name, data, float(time)) for time, (name, data) in enumerate(images.items())]
    files = list(images.values())

    def pixels(rows: object) -> dict[int, bytes]:
        return {row: pixels_digest(decode(files[row])) for row in rows}  # pyright: ignore

    return find_duplicates(facts, pixels=pixels, **options)  # pyright: ignore


def test_each_kind_has_its_evidence(images: dict[str, bytes]) -> None:
    found = found_in(images, kinds=("identical", "copy"))
    (cluster,) = found.clusters
    assert cluster.images == (0, 2, 3, 4, 5)
    evidence = {edge.second: (edge.kind, edge.evidence) for edge in cluster.edges}
    assert evidence[2] == ("identical", "the same bytes (SHA-256)")
    assert evidence[3] == ("identical", "the same pixels (SHA-256)")
    assert evidence[4][0] == evidence[5][0] == "copy"
    assert "mirrored" in evidence[5][1]
    assert "of 64 bits apart" in evidence[4][1]
    assert all(edge.similarity >= 0.9 for edge in cluster.edges)


def test_kinds_are_found_alone(images: dict[str, bytes]) -> None:
    (identical,) = found_in(images, kinds=("identical",)).clusters
    assert identical.images == (0, 2, 3)
    assert identical.kinds == ("identical",)
    assert found_in(images, kinds=("look-alike",)).clusters == ()
    assert "model" in found_in(images, kinds=("look-alike",)).notes[0]


def test_the_largest_then_least_compressed_then_oldest_is_kept(images: dict[str, bytes]) -> None:
    found = found_in(images, kinds=("identical", "copy"))
    best = found.extras("best")
    assert set(best.values()) == {3}  # as many pixels as the others, in the largest file
    assert set(best) == {0, 2, 4, 5}
    assert set(found.extras("oldest").values()) == set(found.extras("first").values()) == {0}
    equal = found_in({"young": images["a.png"], "old": images["a.png"]})
    assert equal.extras() == {1: 0}


def test_look_alikes_stay() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(250, 32)).astype(np.float32)
    vectors[1] = vectors[0] + 0.01
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    facts = [ImageFacts(str(i), str(i), 9, 9, 9, None, np.zeros((16, 16), np.int8)) for i in range(250)]
    found = find_duplicates(facts, vectors=vectors)
    (cluster,) = found.clusters
    assert (cluster.images, cluster.kinds, cluster.copies) == ((0, 1), ("look-alike",), ())
    assert "once in a million" in cluster.edges[0].evidence
    assert not found.extras()


def test_nothing_to_compare() -> None:
    assert find_duplicates([]).clusters == ()


@pytest.fixture
def folder(tmp_path: Path, images: dict[str, bytes]) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    for name, data in images.items():
        (source / name).write_bytes(data)
    (source / "broken.jpg").write_bytes(images["small.jpg"][:300])
    return source


def test_conversion_leaves_copies_out(folder: Path, tmp_path: Path) -> None:
    summary = convert(folder, tmp_path / "x.tar", dedupe=True)
    kept = [sample.key for sample in open_dataset(tmp_path / "x.tar").stream(lambda key, reason: None)]
    assert sorted(kept) == ["b", "broken", "c", "flat", "flat too", "same pixels"]
    assert summary.samples == 6
    assert any("4 images were left out, 0 with the same bytes" in note for note in summary.notes)
    assert convert(folder, tmp_path / "y.tar").samples == 10


def test_a_dataset_without_copies_stays_as_it_is(folder: Path) -> None:
    for name in ("same bytes.png", "same pixels.bmp", "small.jpg", "mirrored.jpg"):
        (folder / name).unlink()
    dataset, left_out = without_copies(open_dataset(folder))
    assert (len(dataset), left_out) == (6, ())


def test_a_stream_is_refused(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "x.tar")
    shutil.make_archive(str(tmp_path / "z"), "gztar", folder)
    with pytest.raises(UsageError, match="stream"):
        convert(tmp_path / "z.tar.gz", tmp_path / "z.jsonl", dedupe=True)
    assert not (tmp_path / "z.jsonl").exists()


def test_the_facts_are_those_of_the_file(images: dict[str, bytes]) -> None:
    facts = ImageFacts.of("small", images["small.jpg"])
    assert (facts.width, facts.height, facts.file_bytes) == (60, 60, len(images["small.jpg"]))
    assert json.dumps(facts.sha256)
