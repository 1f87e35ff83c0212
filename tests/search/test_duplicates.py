"""Reports of duplicates: of images and of an index, as JSON, as a page and as a list."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import ImageOps

from sightloop.errors import UsageError
from sightloop.search.duplicates import (
    DuplicateReport,
    check_kinds,
    hash_columns,
    read_facts,
    read_places,
    report_duplicates,
)
from sightloop.search.sources import list_entries
from sightloop.types import Done, Failed
from tests.data.copies.scenes import encoded, scene


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    photos = tmp_path / "photos"
    photos.mkdir()
    for n in range(3):
        (photos / f"{n}.png").write_bytes(encoded(scene(n)))
    (photos / "0 again.png").write_bytes(encoded(scene(0)))
    (photos / "0 <b>.bmp").write_bytes(encoded(scene(0), "BMP"))
    (photos / "1 mirrored.jpg").write_bytes(encoded(ImageOps.mirror(scene(1)), "JPEG", quality=70))
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    return photos


def report_of(folder: Path) -> tuple[DuplicateReport, list[Failed]]:
    events = list(read_facts(list_entries([str(folder)])))
    done = [event.value for event in events if isinstance(event, Done)]
    failed = [event for event in events if isinstance(event, Failed)]
    return report_duplicates([f for f, _ in done], [p for _, p in done], kinds=("identical", "copy")), failed


def test_a_report_of_a_folder(folder: Path) -> None:
    report, failed = report_of(folder)
    assert [Path(event.name).name for event in failed] == ["broken.jpg"]
    first, second = report.as_json()
    names = [{Path(image["name"]).name: image["keep"] for image in c["images"]} for c in (first, second)]
    assert names == [
        {"0 <b>.bmp": True, "0 again.png": False, "0.png": False},
        {"1 mirrored.jpg": False, "1.png": True},
    ]
    assert first["kinds"] == ["identical"]
    assert {edge["evidence"] for edge in first["edges"]} == {
        "the same bytes (SHA-256)",
        "the same pixels (SHA-256)",
    }
    assert [Path(name).name for name in report.extras()] == ["0 again.png", "0.png", "1 mirrored.jpg"]
    assert "6 images: 5 in 2 clusters (1 with identical images, 1 with copies)" in str(report)


def test_the_page_shows_images_side_by_side_and_escapes_names(folder: Path) -> None:
    report, _ = report_of(folder)
    page = report.to_html()
    assert page.count("data:image/jpeg;base64") == 5
    assert page.count('class="kept"') == 2
    assert "0 &lt;b&gt;.bmp" in page
    assert "<b>.bmp" not in page
    (folder / "1.png").unlink()
    assert "it is gone" in report.to_html()
    assert report._repr_html_().count("data:image/jpeg;base64") == 4  # pyright: ignore[reportPrivateUsage]


def test_images_of_an_archive_are_read_in_one_pass(folder: Path, tmp_path: Path) -> None:
    from sightloop.data.datasets.convert import convert

    (folder / "broken.jpg").unlink()
    convert(folder, tmp_path / "x.tar")
    events = list(read_facts(list_entries([str(tmp_path / "x.tar")])))
    places = [event.value[1] for event in events if isinstance(event, Done)]
    assert len(read_places(places)) == 6
    report = report_duplicates(
        [event.value[0] for event in events if isinstance(event, Done)], places, kinds=("identical", "copy")
    )
    assert [cluster.kinds for cluster in report.clusters] == [("identical",), ("copy",)]
    assert report.to_html().count("data:image/jpeg;base64") == 5


def test_kinds_are_checked() -> None:
    assert check_kinds(["copy", "identical", "copy"]) == ("identical", "copy")
    for kinds in ([], ["same"]):
        with pytest.raises(UsageError, match="kinds"):
            check_kinds(kinds)


def test_an_index_finds_them_without_its_images(tmp_path: Path) -> None:
    pytest.importorskip("lancedb")
    from sightloop.search.index import Index

    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(230, 24)).astype(np.float32)
    vectors[9] = vectors[8] + 0.01
    rows = [{"path": f"{n}.png", "sha256": f"{n}"} for n in range(230)]
    for n, image in ((0, scene(0)), (1, ImageOps.mirror(scene(0))), (2, scene(2))):
        rows[n] |= hash_columns(encoded(image)) | {"width": 96, "height": 96}  # pyright: ignore
    rows[4]["sha256"] = rows[3]["sha256"]
    index = Index.create(tmp_path / "index", dim=24, dtype="float32")
    index.add_vectors(vectors, rows, ids=[f"i{n}" for n in range(230)])
    report = index.duplicates()
    assert {cluster.kinds: {report.ids[row] for row in cluster.images} for cluster in report.clusters} == {
        ("copy",): {"i0", "i1"},
        ("identical",): {"i3", "i4"},
        ("look-alike",): {"i8", "i9"},
    }
    assert [c.kinds for c in index.duplicates(["copy"]).clusters] == [("copy",)]
    assert not index.duplicates(where="path=0.png")
