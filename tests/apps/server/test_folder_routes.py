"""The folder behind HTTP: listing, captions with ETags, replacement and undo, thumbnails, jobs, the page's files."""

from __future__ import annotations

import io
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.apps.server.running import Running, jpeg, running, wait_for

CAPTIONS = {"a.jpg": "a red car", "b.jpg": "a blue car in the rain", "inner/c.jpg": None, "d.jpg": "a dog"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inner").mkdir()
    for i, (name, caption) in enumerate(CAPTIONS.items()):
        (tmp_path / name).write_bytes(jpeg(i, (320, 200)))
        if caption is not None:
            (tmp_path / name).with_suffix(".txt").write_text(caption + "\n")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a JPEG")
    return tmp_path


@pytest.fixture
def server(nano: Any, folder: Path) -> Generator[Running]:
    with running(lambda _source: nano, folder=folder) as one:
        yield one


def rows(server: Running, **query: Any) -> dict[str, dict[str, Any]]:
    answer = server.http.get("/api/images", params=query)
    assert answer.status_code == 200, answer.text
    return {row["path"]: row for row in answer.json()["images"]}


def put(server: Running, row: dict[str, Any], text: str | None, **extra: Any) -> Any:
    headers = {"If-Match": f'"{row["caption"]["etag"]}"'}
    return server.http.put(f"/api/images/{row['id']}/caption", json={"text": text, **extra}, headers=headers)


def test_the_listing_has_every_image_with_its_caption(server: Running) -> None:
    found = rows(server)
    assert {path: row["caption"]["text"] for path, row in found.items()} == CAPTIONS | {"broken.jpg": None}
    assert list(found) == sorted(found)


@pytest.mark.parametrize(
    ("query", "paths"),
    [
        ({"text": "CAR"}, {"a.jpg", "b.jpg"}),
        ({"text": "car", "not": "rain"}, {"a.jpg"}),
        ({"state": "uncaptioned"}, {"inner/c.jpg", "broken.jpg"}),
        ({"state": "captioned", "limit": 1, "offset": 1}, {"b.jpg"}),
        ({"state": "open"}, set()),
    ],
)
def test_the_listing_is_filtered(server: Running, query: dict[str, Any], paths: set[str]) -> None:
    assert set(rows(server, **query)) == paths


def test_what_a_shell_does_is_seen(server: Running, folder: Path) -> None:
    rows(server)
    (folder / "a.txt").write_text("by a shell")
    (folder / "new.jpg").write_bytes(jpeg(7))
    os.remove(folder / "d.jpg")

    wait_for(lambda: "new.jpg" in rows(server), 10)

    found = rows(server)
    assert found["a.jpg"]["caption"]["text"] == "by a shell"
    assert "d.jpg" not in found


def test_an_edit_is_written_once_and_only_over_what_was_seen(server: Running, folder: Path) -> None:
    row = rows(server)["a.jpg"]

    answer = put(server, row, "a red truck")

    assert answer.status_code == 200
    assert (folder / "a.txt").read_text() == "a red truck\n"
    refused = put(server, row, "from another browser")
    assert refused.status_code == 412
    assert refused.json()["current"] == answer.json()["caption"] == rows(server)["a.jpg"]["caption"]
    assert (folder / "a.txt").read_text() == "a red truck\n"
    details = server.http.get(f"/api/images/{row['id']}/info").json()
    assert [(edit["before"], edit["after"]) for edit in details["history"]] == [("a red car", "a red truck")]
    assert (details["width"], details["height"]) == (320, 200)


def test_an_edit_without_an_etag_is_refused(server: Running) -> None:
    row = rows(server)["a.jpg"]
    assert server.http.put(f"/api/images/{row['id']}/caption", json={"text": "x"}).status_code == 428
    assert put(server, row, None).status_code == 400
    assert put(server, {"id": "0" * 16, "caption": row["caption"]}, "x").status_code == 404


def test_replacement_shows_what_it_will_do_and_can_be_undone(server: Running, folder: Path) -> None:
    body = {"find": "car", "replace": "van", "whole_words": True, "filter": {"not": "rain"}, "preview": True}
    preview = server.post("/api/captions/replace", body).json()
    assert [(change["path"], change["after"]) for change in preview["changes"]] == [("a.jpg", "a red van")]
    assert (folder / "a.txt").read_text() == "a red car\n"

    done = server.post("/api/captions/replace", {**body, "filter": {}, "preview": False}).json()
    assert (done["changed"], done["conflicts"]) == (2, [])
    row = rows(server)["b.jpg"]
    assert row["caption"]["text"] == "a blue van in the rain"
    put(server, row, "by hand")

    undone = server.post("/api/captions/undo", {"batch": done["batch"]}).json()

    assert undone == {"undone": 1, "changed_since": [row["id"]]}
    assert {path: r["caption"]["text"] for path, r in rows(server).items()} == CAPTIONS | {
        "broken.jpg": None,
        "b.jpg": "by hand",
    }


def test_what_changed_since_the_preview_is_left(server: Running, folder: Path) -> None:
    body = {"find": "car", "replace": "van", "preview": True}
    preview = server.post("/api/captions/replace", body).json()
    (folder / "a.txt").write_text("another car\n")

    expect = {change["id"]: change["etag"] for change in preview["changes"]}
    done = server.post("/api/captions/replace", {**body, "preview": False, "expect": expect}).json()

    assert done["changed"] == 1
    assert (folder / "a.txt").read_text() == "another car\n"


@pytest.mark.parametrize(("size", "shape"), [(96, (96, 96)), (256, (256, 256)), (640, (1024, 640))])
def test_thumbnails(server: Running, size: int, shape: tuple[int, int]) -> None:
    row = rows(server)["a.jpg"]
    answer = server.http.get(f"/api/images/{row['id']}/thumb", params={"size": size})
    assert Image.open(io.BytesIO(answer.content)).size == shape
    again = server.http.get(
        f"/api/images/{row['id']}/thumb",
        params={"size": size},
        headers={"If-None-Match": answer.headers["etag"]},
    )
    assert again.status_code == 304


def test_a_broken_image_is_a_400_and_an_unknown_one_a_404(server: Running) -> None:
    broken = rows(server)["broken.jpg"]["id"]
    assert server.http.get(f"/api/images/{broken}/thumb").status_code == 400
    for path in (
        "/api/images/ffffffffffffffff",
        "/api/images/..%2f..%2fetc%2fpasswd",
        "/web/../serve.py",
        "/web/x.py",
    ):
        assert server.http.get(path).status_code == 404


def test_the_page_is_sent_under_a_policy(server: Running) -> None:
    page = server.http.get("/")
    assert "text/html" in page.headers["content-type"]
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name in ("app.js", "style.css", "vendor/preact.js", "rooms/captions.js"):
        assert server.http.get(f"/web/{name}").status_code == 200


def wait_for_job(server: Running, job: dict[str, Any]) -> dict[str, Any]:
    wait_for(lambda: server.http.get(f"/api/jobs/{job['id']}").json()["ended"] is not None)
    return server.http.get(f"/api/jobs/{job['id']}").json()


def test_jobs_propose_captions_and_score_those_on_disk(server: Running, folder: Path) -> None:
    job = server.post("/api/jobs", {"kind": "caption"}).json()
    ended = wait_for_job(server, job)

    assert (ended["state"], ended["done"], ended["total"]) == ("done", 2, 2)
    assert [failure["name"] for failure in ended["failures"]] == ["broken.jpg"]
    row = rows(server)["inner/c.jpg"]
    assert row["state"] == "open"
    assert row["proposal"]["text"]
    assert row["caption"]["text"] is None
    assert not (folder / "inner" / "c.txt").exists()

    accepted = put(server, row, row["proposal"]["text"], origin="accepted").json()
    assert accepted["state"] == "accepted"

    ended = wait_for_job(server, server.post("/api/jobs", {"kind": "rank"}).json())
    assert ended["state"] == "done"
    fits = [row["fit"] for row in rows(server, sort="fit").values()]
    scored = [fit for fit in fits if fit is not None]
    assert len(scored) == 4
    assert scored == sorted(scored)
    assert fits[-1] is None


def test_unknown_jobs_are_refused(server: Running) -> None:
    assert server.http.post("/api/jobs/none/cancel").status_code == 404
    assert server.post("/api/jobs", {"kind": "unknown"}).status_code == 400


def test_search_without_an_index_says_what_to_do(server: Running) -> None:
    answer = server.post("/api/search", {"text": "a dog"})
    assert answer.status_code == 404
    assert "build it" in answer.json()["error"]["message"]


def test_search_over_http_is_that_of_python(server: Running, nano: Any, folder: Path) -> None:
    from sightloop.search.index import Index

    index = Index.create(folder / ".sightloop" / "index", model=nano)
    index.add([folder])
    hits = index.search("a dog", 3)

    answer = server.post("/api/search", {"text": "a dog", "k": 3}).json()

    assert [hit["path"] for hit in answer["hits"]] == [os.path.relpath(hit.name, folder) for hit in hits]
    assert [hit["scores"]["itc"] for hit in answer["hits"]] == pytest.approx(
        [hit.itc for hit in hits], abs=1e-5
    )
    like = rows(server)["a.jpg"]["id"]
    similar = server.post("/api/search", {"like": like, "k": 2}).json()["hits"]
    assert like not in [hit["id"] for hit in similar]
    words = server.post("/api/search", {"words": "rain"}).json()["hits"]
    assert [hit["path"] for hit in words] == ["b.jpg"]
    assert server.post("/api/search", {"text": "x", "where": ["nonsense"]}).status_code == 400


def test_explanations_over_http_are_those_of_python(server: Running, nano: Any, folder: Path) -> None:
    answer = server.post("/api/explain", {"images": {"path": "a.jpg"}, "texts": ["a red car", "a dog"]})

    assert answer.status_code == 200, answer.text
    maps = answer.json()["maps"]
    assert len(maps) == 2
    assert sum(map(sum, maps[0])) == pytest.approx(1, abs=1e-2)
    assert max(len(maps[0]), len(maps[0][0])) <= 64
    assert (
        server.post("/api/explain", {"images": {"path": "broken.jpg"}, "texts": "a dog"}).status_code == 400
    )
    own = nano.explain(str(folder / "a.jpg"), "a red car")
    assert len(own.as_rows()) / len(own.as_rows()[0]) == pytest.approx(200 / 320, abs=0.05)
