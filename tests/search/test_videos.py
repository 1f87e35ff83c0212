"""Videos in an index: scenes with their times, hits that say when, and files that change, move, go or are broken."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

pytest.importorskip("av")
pytest.importorskip("lancedb")

import sightloop
from sightloop.apps.cli import main
from sightloop.data.images.decode import decode
from sightloop.data.video.writing import write_video
from sightloop.inference.model import Model
from sightloop.search import videos
from sightloop.search.index import BuildOptions, Index
from tests.tiny_checkpoints.clip_and_blip import write_clip

OPTIONS = BuildOptions(isolate=False, workers=1)
RATE = 10
COLORS = ((200, 30, 30), (30, 180, 40), (40, 60, 220), (220, 200, 40))


def frames_of(colors: Sequence[tuple[int, int, int]], count: int = 15) -> list[NDArray[np.uint8]]:
    """`count` frames 48 x 64 of each color, with a pattern that moves."""
    grain = np.random.default_rng(0).integers(-20, 20, (48, 64, 1))
    scenes = [np.clip(np.array(color) + grain, 0, 255).astype(np.uint8) for color in colors]
    return [np.roll(scene, i % 4, axis=1) for scene in scenes for i in range(count)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "clip"
    write_clip(folder)
    return folder


@pytest.fixture(scope="module")
def clip(checkpoint: Path) -> Model:
    return sightloop.load(checkpoint)


@pytest.fixture(autouse=True)
def _keep_scenes_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """All images are nearly equal to a network that was not trained."""
    monkeypatch.setattr(videos, "SAME", 1.1)


def scenes_in(index: Index) -> dict[str, list[tuple[float, float]]]:
    scenes: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(index.rows(["path", "start", "end"]), key=lambda row: row["start"] or 0):
        scenes.setdefault(row["path"], []).append((row["start"], row["end"]))
    return scenes


def test_a_hit_says_when(clip: Model, tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    frames = frames_of(COLORS)
    write_video(tmp_path / "clips" / "all.mp4", frames, rate=RATE)
    (tmp_path / "clips" / "all.txt").write_text("four walls\n")
    Image.fromarray(frames[0]).save(tmp_path / "clips" / "red.png")
    index = Index.create(tmp_path / "index", model=clip)
    assert index.add(tmp_path / "clips", options=OPTIONS) == Counter(added=2)
    scenes = scenes_in(index)
    assert scenes.pop("red.png") == [(None, None)]
    np.testing.assert_allclose(scenes["all.mp4"], [(1.5 * i, 1.5 * i + 1.5) for i in range(4)], atol=0.11)

    for scene in range(4):
        hits = index.search(image=frames[15 * scene + 7], k=1, where="start>=0")
        assert hits[0].row["start"] == scenes["all.mp4"][scene][0]
        pixels = decode(hits[0].image()).convert("RGB")
        assert np.abs(np.asarray(pixels).mean((0, 1)) - COLORS[scene]).max() < 25
    hit = index.search(words="walls", k=9)[1]
    assert hit.as_json()["end"] - hit.as_json()["start"] == pytest.approx(1.5, abs=0.2)
    assert hit.label.endswith(f"all.mp4 {hit.moment}")
    assert hit.moment in index.search(words="walls", k=9).to_html()
    assert len(index.search(image=frames[0], where=["start>=1", "end<5"])) == 2


def test_the_vector_of_a_scene_is_the_mean_of_its_frames(clip: Model, tmp_path: Path) -> None:
    frames = frames_of(COLORS[:2])
    write_video(tmp_path / "a.avi", frames, rate=RATE, codec="ffv1", pixel_format="bgr0")
    index = Index.create(tmp_path / "index", model=clip, dtype="float32")
    index.add(tmp_path / "a.avi", options=OPTIONS)
    ids, vectors = index.vectors()
    starts = {row["id"]: row["start"] for row in index.rows()}
    for name, vector in zip(ids, vectors, strict=True):
        first = round(starts[name] * RATE)
        own = clip.embed_images([frames[first + offset] for offset in (2, 7, 12)])
        mean = (own / np.linalg.norm(own, axis=1, keepdims=True)).mean(axis=0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


def test_files_that_change_move_and_go(clip: Model, tmp_path: Path) -> None:
    place = tmp_path / "clips"
    place.mkdir()
    for name, colors in (("a", COLORS[:2]), ("b", COLORS[1:3]), ("c", COLORS[2:])):
        write_video(place / f"{name}.mp4", frames_of(colors), rate=RATE)
    (place / "broken.mov").write_bytes(b"no video")
    index = Index.create(tmp_path / "index", model=clip)
    assert index.add(place, options=OPTIONS) == Counter(added=3, failed=1)
    before = index.rows(["path", "start"])
    (place / "broken.mov").unlink()
    assert index.add(place, options=OPTIONS) == Counter(skipped=3)
    assert list(index.duplicates().as_json()) == []

    (place / "moved").mkdir()
    (place / "a.mp4").rename(place / "moved" / "a.mkv")
    (place / "b.txt").write_text("a green wall\n")
    write_video(place / "c.mp4", frames_of(COLORS[1:]), rate=RATE)
    os.utime(place / "c.mp4", ns=(1, 1))
    assert index.add(place, options=OPTIONS) == Counter(moved=1, updated=1, changed=1)
    after = index.rows(["path", "start"])
    paths = {row["id"]: row["path"] for row in after}
    assert {paths[row["id"]] for row in before if row["path"] == "a.mp4"} == {os.path.join("moved", "a.mkv")}
    assert Counter(row["path"] for row in after)["c.mp4"] == 3
    assert set(index.search(words="green", k=9).ids) == {n for n, path in paths.items() if path == "b.mp4"}

    (place / "b.mp4").unlink()
    assert index.add(place, prune=True, options=OPTIONS) == Counter(skipped=2, removed=2)
    assert {row["path"] for row in index.rows()} == {os.path.join("moved", "a.mkv"), "c.mp4"}


def test_near_equal_neighbors_are_one_row(
    clip: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "a.mp4", frames_of(COLORS[:1], 60), rate=RATE)
    monkeypatch.setattr(videos, "LONGEST", 2.0)
    apart = videos.embed_scenes(str(tmp_path / "a.mp4"), [(_space(clip, tmp_path), clip)])
    assert [(scene.start, scene.end) for scene in apart] == [(0, 2), (2, 4), (4, 6)]
    monkeypatch.setattr(videos, "SAME", 0.97)
    joined = videos.embed_scenes(str(tmp_path / "a.mp4"), [(_space(clip, tmp_path), clip)])
    assert [(scene.start, scene.end) for scene in joined] == [(0, 6)]


def _space(model: Model, folder: Path) -> Any:
    folder = folder / f"space{len(list(folder.iterdir()))}"
    return Index.create(folder, model=model).info.space()


def test_keyframes_alone(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(
        tmp_path / "a.mp4", frames_of(COLORS), rate=RATE, options={"x264-params": "keyint=15:scenecut=0"}
    )
    store = tmp_path / "index"
    words = ["index", str(tmp_path / "a.mp4"), "--store", str(store), "-m", str(checkpoint), "--keyframes"]
    assert main.main(words) == 0
    assert "1 added" in capsys.readouterr().err
    assert main.main(["search", str(store), "a wall", "--json", "-k", "9"]) == 0
    hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted((hit["start"], hit["end"]) for hit in hits) == [(1.5 * i, 1.5 * i + 1.5) for i in range(4)]
