"""Serving an index or a dataset: only its images are shown and read; captions of a dataset are edited beside images."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from sightloop.apps.server.image_sets import open_image_set
from sightloop.errors import UsageError
from tests.apps.fake_model import FakeModel
from tests.apps.server.running import jpeg, running


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Five images, two of them in a folder, beside a file that is no image."""
    folder = tmp_path / "images"
    (folder / "inner").mkdir(parents=True)
    for number, name in enumerate(("a", "b", "c", "inner/d", "inner/e")):
        (folder / f"{name}.jpg").write_bytes(jpeg(number))
    (folder / "secret.txt").write_text("private")
    return folder


def coco(images: Path) -> Path:
    """Captions of a.jpg (two) and inner/d.jpg, and an image that is not there."""
    names = {1: "a.jpg", 2: "inner/d.jpg", 3: "gone.jpg"}
    document = {
        "images": [{"id": i, "file_name": name, "width": 40, "height": 30} for i, name in names.items()],
        "annotations": [
            {"id": n, "image_id": i, "caption": text}
            for n, (i, text) in enumerate([(1, "a red hat"), (1, "a hat"), (2, "a blue bag")])
        ],
    }
    path = images / "captions.json"
    path.write_text(json.dumps(document))
    return path


def serve(source: Path) -> Any:
    return running(lambda _source: FakeModel(), models={"fake": "fake"}, folder=source)


def listed(server: Any) -> dict[str, Any]:
    return {row["path"]: row for row in server.http.get("/api/images").json()["images"]}


def test_captions_of_coco_are_edited_beside_the_images(images: Path) -> None:
    with serve(coco(images)) as server:
        rows = listed(server)
        assert {name: row["caption"]["text"] for name, row in rows.items()} == {
            "a.jpg": "a red hat\na hat",
            "inner/d.jpg": "a blue bag",
        }
        info = server.http.get("/api/info").json()
        assert (info["given"], info["editable"], info["captioned"], info["left_out"]) == (True, True, 2, 1)
        row = rows["inner/d.jpg"]
        path = f"/api/images/{row['id']}/caption"
        edit = {"json": {"text": "a green bag"}, "headers": {"X-Sightloop": "1"}}
        edit["headers"]["If-Match"] = row["caption"]["etag"]

        answer = server.http.put(path, **edit)

        assert answer.status_code == 200
        assert (images / "inner" / "d.txt").read_text() == "a green bag\n"
        assert listed(server)["inner/d.jpg"]["caption"]["text"] == "a green bag"
        assert server.http.put(path, **edit).status_code == 412
        (images / "inner" / "d.txt").unlink()
        assert listed(server)["inner/d.jpg"]["caption"] == row["caption"]
        found = server.http.get("/api/images", params={"text": "blue"}).json()
        assert found["total"] == 1


def test_only_the_images_of_the_set_are_read(images: Path) -> None:
    (images / "outside.jpg").symlink_to(images.parent)
    with serve(coco(images)) as server:
        for name in ("b.jpg", "secret.txt", "captions.json", "../images/a.jpg", "/etc/passwd", ""):
            answer = server.post("/api/match", {"images": {"path": name}, "texts": ["a"]})
            assert answer.status_code in (400, 404), name
        assert server.post("/api/match", {"images": {"path": "a.jpg"}, "texts": ["a"]}).status_code == 200
        # A file that became a link is not followed.
        (images / "a.jpg").rename(images / "moved.jpg")
        (images / "a.jpg").symlink_to(images / "b.jpg")
        assert server.post("/api/match", {"images": {"path": "a.jpg"}, "texts": ["a"]}).status_code == 404


def write_shard(path: Path, numbers: Iterable[int]) -> Path:
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            for name, data in ((f"{number}.jpg", jpeg(number)), (f"{number}.txt", b"a cap")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def test_images_in_a_tar_are_shown_and_not_edited(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "part.tar", range(3))
    with serve(shard) as server:
        rows = listed(server)
        assert sorted(rows) == ["part.tar/0", "part.tar/1", "part.tar/2"]
        row = rows["part.tar/1"]
        assert row["caption"]["text"] == "a cap"
        assert server.http.get(f"/api/images/{row['id']}").content == jpeg(1)
        assert server.http.get(f"/api/images/{row['id']}/thumb").headers["content-type"] == "image/jpeg"
        info = server.http.get(f"/api/images/{row['id']}/info").json()
        assert (info["width"], info["height"]) == (40, 30)
        headers = {"X-Sightloop": "1", "If-Match": row["caption"]["etag"]}
        answer = server.http.put(f"/api/images/{row['id']}/caption", json={"text": "x"}, headers=headers)
        assert answer.status_code == 403
        assert "archive" in answer.json()["error"]["message"]
        assert not (tmp_path / ".sightloop").exists()


def test_an_index_shows_its_images_wherever_they_are(images: Path, nano: Any) -> None:
    pytest.importorskip("lancedb")
    from sightloop.search.index import Index

    other = images.parent / "other"
    other.mkdir()
    (other / "f.jpg").write_bytes(jpeg(8))
    index = Index.create(images.parent / "both.index", model=nano)
    index.add([str(images / "inner"), str(other)])
    with running(lambda _source: nano, folder=images.parent / "both.index") as server:
        assert sorted(listed(server)) == ["images/inner/d.jpg", "images/inner/e.jpg", "other/f.jpg"]
        hits = server.post("/api/search", {"text": "a photo", "k": 2}).json()["hits"]
        assert len(hits) == 2
        assert server.http.get(f"/api/images/{hits[0]['id']}").status_code == 200
        answer = server.post("/api/jobs", {"kind": "index"})
        assert answer.status_code == 409
        assert (
            server.post("/api/match", {"images": {"path": "images/a.jpg"}, "texts": ["a"]}).status_code == 404
        )


def test_an_index_shows_its_images_inside_archives(images: Path, nano: Any) -> None:
    pytest.importorskip("lancedb")
    from sightloop.data.datasets.convert import convert
    from sightloop.search.index import Index

    write_shard(images.parent / "part-0.tar", range(2))
    write_shard(images.parent / "part-1.tar", range(2, 4))
    convert([str(images.parent / "part-1.tar")], images.parent / "rows.parquet")
    index = Index.create(images.parent / "all.index", model=nano)
    index.add(
        [str(images / "inner"), str(images.parent / "part-{0..1}.tar"), str(images.parent / "rows.parquet")]
    )
    with running(lambda _source: nano, folder=images.parent / "all.index") as server:
        rows = listed(server)
        inside = {f"part-{n // 2}.tar/{n}": n for n in range(4)} | {f"rows.parquet/{n}": n for n in (2, 3)}
        files = {"images/inner/d.jpg": 3, "images/inner/e.jpg": 4}
        assert set(rows) == {*files, *inside}
        for name, number in (files | inside).items():
            assert server.http.get(f"/api/images/{rows[name]['id']}").content == jpeg(number)
        thumbs = [server.http.get(f"/api/images/{rows[name]['id']}/thumb") for name in inside]
        assert {thumb.headers["content-type"] for thumb in thumbs} == {"image/jpeg"}
        assert {rows[name]["caption"]["text"] for name in inside} == {"a cap"}

        hits = server.post("/api/search", {"like": rows["part-0.tar/1"]["id"], "k": 20}).json()["hits"]
        assert {hit["path"] for hit in hits} | {"part-0.tar/1"} == set(rows)
        assert server.http.get("/api/info").json()["left_out"] == 0

        def edit(name: str) -> int:
            headers = {"X-Sightloop": "1", "If-Match": rows[name]["caption"]["etag"]}
            path = f"/api/images/{rows[name]['id']}/caption"
            return server.http.put(path, json={"text": "x"}, headers=headers).status_code

        assert [edit("part-0.tar/1"), edit("images/inner/e.jpg")] == [403, 200]


def test_what_is_no_source_is_refused(images: Path) -> None:
    assert open_image_set(images) is None
    (images / "empty.json").write_text('{"images": [], "annotations": []}')
    for name in ("secret.txt", "empty.json", "a.jpg"):
        with pytest.raises(UsageError):
            open_image_set(images / name)
