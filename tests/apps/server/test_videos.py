"""Videos on the server: listed, streamed in parts, thumbnails at times, hits of an index with their time."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("av")

from sightloop.data.video.writing import write_video
from tests.apps.fake_model import FakeModel
from tests.apps.server.running import jpeg, running

COLORS = ((200, 30, 30), (30, 180, 40), (40, 60, 220))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image, and a video of three scenes of two seconds in a subfolder."""
    place = tmp_path / "home"
    (place / "clips").mkdir(parents=True)
    (place / "a.jpg").write_bytes(jpeg(0))
    grain = np.random.default_rng(0).integers(-20, 20, (48, 64, 1))
    scenes = [np.clip(np.array(color) + grain, 0, 255).astype(np.uint8) for color in COLORS]
    write_video(place / "clips" / "b.mp4", [scene for scene in scenes for _ in range(20)], rate=10)
    (place / "clips" / "b.txt").write_text("three walls\n")
    return place


def listed(server: Any) -> dict[str, Any]:
    return {row["path"]: row for row in server.http.get("/api/images").json()["images"]}


def color_of(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).mean((0, 1))


def test_a_video_is_listed_and_streamed_in_parts(folder: Path) -> None:
    content = (folder / "clips" / "b.mp4").read_bytes()
    (folder / "outside.mp4").symlink_to("/etc/hostname")
    with running(lambda _source: FakeModel(), models={"fake": "fake"}, folder=folder) as server:
        rows = listed(server)
        assert {name: row["video"] for name, row in rows.items()} == {"a.jpg": False, "clips/b.mp4": True}
        row = rows["clips/b.mp4"]
        assert row["caption"]["text"] == "three walls"
        path = f"/api/images/{row['id']}"
        whole = server.http.get(path)
        assert (whole.content, whole.headers["content-type"]) == (content, "video/mp4")
        part = server.http.get(path, headers={"Range": "bytes=100-299"})
        assert (part.status_code, part.content) == (206, content[100:300])
        assert part.headers["content-range"] == f"bytes 100-299/{len(content)}"
        assert server.http.get(path, headers={"Range": "bytes=99999999-"}).status_code == 416

        for at, color in ((0, 0), (3, 1), (5.5, 2)):
            thumb = server.http.get(f"{path}/thumb", params={"at": at})
            assert np.abs(color_of(thumb.content) - COLORS[color]).max() < 25
        assert server.http.get(f"{path}/thumb", params={"at": 100}).status_code == 400
        assert server.http.get(f"{path}/thumb", params={"at": -1}).status_code == 400
        info = server.http.get(f"{path}/info").json()
        assert (info["video"], info["width"], info["height"]) == (True, 64, 48)
        assert info["duration"] == pytest.approx(6, abs=0.05)
        image = server.http.get(f"/api/images/{rows['a.jpg']['id']}/info").json()
        assert image["duration"] is None
        counts = server.http.get("/api/info").json()
        assert (counts["images"], counts["videos"]) == (1, 1)
        with_caption = server.http.get("/api/images", params={"text": "walls"}).json()
        assert (with_caption["total"], with_caption["videos"]) == (1, 1)
        answer = server.post("/api/match", {"images": {"path": "clips/b.mp4"}, "texts": ["a"]})
        assert answer.status_code == 404


def test_a_hit_has_its_time(folder: Path, nano: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lancedb")
    from sightloop.search import videos
    from sightloop.search.index import Index

    monkeypatch.setattr(videos, "SAME", 1.1)
    Index.create(folder.parent / "all.index", model=nano).add(folder)
    with running(lambda _source: nano, folder=folder.parent / "all.index") as server:
        assert set(listed(server)) == {"a.jpg", "clips/b.mp4"}
        assert server.http.get("/api/info").json()["left_out"] == 0
        hits = server.post("/api/search", {"text": "a green wall", "k": 9}).json()["hits"]
        assert len(hits) == 4
        scenes = [hit for hit in hits if hit["video"]]
        assert sorted(round(hit["start"]) for hit in scenes) == [0, 2, 4]
        assert {hit["id"] for hit in scenes} == {listed(server)["clips/b.mp4"]["id"]}
        middle = (scenes[0]["start"] + scenes[0]["end"]) / 2
        thumb = server.http.get(f"/api/images/{scenes[0]['id']}/thumb", params={"at": middle})
        assert np.abs(color_of(thumb.content) - COLORS[round(scenes[0]["start"] / 2)]).max() < 25
        assert (
            server.http.get(f"/api/images/{scenes[0]['id']}", headers={"Range": "bytes=0-9"}).status_code
            == 206
        )
