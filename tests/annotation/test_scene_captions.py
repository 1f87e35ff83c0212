"""Captions of scenes: files that libav, which players are made of, reads back; a killed run goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sightloop.annotation.captioning import SceneCaption, SceneFile, caption_scenes
from sightloop.annotation.scene_captions import subrip, webvtt
from sightloop.data.video.reader import stop_workers
from sightloop.data.video.writing import write_video
from sightloop.errors import UsageError
from sightloop.tasks.caption_filter import CaptionFilter
from sightloop.types import Done, Failed, ImageSpec, Pixels


class Captioner:
    """A captioner that says the color of the first frame; it breaks after some scenes where told to."""

    image_spec = ImageSpec(resize=(16, 16))

    def __init__(self, breaks_after: int = 10**9) -> None:
        self.left, self.calls = breaks_after, 0

    def caption(self, images: Sequence[Pixels], prompt: str | None = None, **_: Any) -> list[str]:
        self.left -= len(images)
        if self.left < 0:
            raise KeyboardInterrupt
        self.calls += len(images)
        assert all(pixels.values.shape == (3, 16 * pixels.frames, 16) for pixels in images)
        return [f"color {pixels.values[:, 8, 8].astype(int) // 16 * 16}" for pixels in images]


def write_colors(path: Path, scenes: int, seed: int) -> list[str]:
    """A video of plain scenes of a second each; the caption of each."""
    colors = np.random.default_rng(seed).permutation(16)[:scenes] * 16 + 8
    frames = [np.full((32, 32, 3), color, np.uint8) for color in colors for _ in range(10)]
    write_video(path, frames, rate=10, codec="ffv1", pixel_format="bgr0")
    return [f"color {np.full(3, color) // 16 * 16}" for color in colors]


def cues(path: Path) -> list[tuple[float, float, str]]:
    """Start, end and text of every cue, by libav's reader of subtitles."""
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(subtitles=0) if p.size]
        return [
            (float(p.pts * p.time_base), float((p.pts + p.duration) * p.time_base), bytes(p).decode())
            for p in packets
        ]


def run(out: Path, videos: list[Path], captioner: Captioner, **options: Any) -> list[object]:
    with SceneFile(out, {"model": "m"}, **options) as file:
        names = [str(video) for video in videos]
        return list(caption_scenes(captioner, names, file, CaptionFilter(), lambda *_: None, lambda _: None))


@pytest.mark.parametrize("kind", ["srt", "vtt"])
def test_players_read_what_is_written(tmp_path: Path, kind: str) -> None:
    wanted = write_colors(tmp_path / "a.mkv", 5, seed=1)
    events = run(tmp_path / f"out.{kind}", [tmp_path / "a.mkv"], Captioner())
    stop_workers()
    assert events == [Done(str(tmp_path / "a.mkv"), 5)]
    read = cues(tmp_path / f"out.{kind}")
    assert [text for _, _, text in read] == wanted
    assert [start for start, _, _ in read] == pytest.approx([0, 1, 2, 3, 4], abs=0.002)
    assert [end for _, end, _ in read] == pytest.approx([1, 2, 3, 4, 5], abs=0.002)
    assert list(tmp_path.glob("*.partial")) == []


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.integers(1, 5_000_000), st.text(st.characters(codec="utf-8"), max_size=40)), max_size=6
    ),
    st.sampled_from(["srt", "vtt"]),
)
def test_any_caption_keeps_its_times(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[tuple[int, str]], kind: str
) -> None:
    path, end, captions = tmp_path_factory.mktemp("cues") / f"a.{kind}", 0, list[SceneCaption]()
    for length, text in lengths:
        start, end = end, end + length
        captions.append(SceneCaption(start / 1000, end / 1000, f"x{text}"))
    path.write_text((subrip if kind == "srt" else webvtt)(captions), "utf-8")
    if captions:
        read = cues(path)
        assert [(round(a * 1000), round(b * 1000)) for a, b, _ in read] == [
            (round(c.start * 1000), round(c.end * 1000)) for c in captions
        ]


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    videos = [tmp_path / "a.mkv", tmp_path / "b.mkv"]
    wanted = {str(video): write_colors(video, 9, seed=i) for i, video in enumerate(videos)}
    out, first, second = tmp_path / "out.jsonl", Captioner(breaks_after=13), Captioner()
    with pytest.raises(KeyboardInterrupt):
        run(out, videos, first)
    assert first.calls == 13
    assert not out.exists()
    with pytest.raises(UsageError, match="other options"), SceneFile(out, {"model": "another"}):
        pass
    events = run(out, videos, second)
    stop_workers()
    assert [type(event) for event in events] == [Done, Done]
    assert second.calls == 18 - 13
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["name"], row["caption"]) for row in rows] == [(n, c) for n in wanted for c in wanted[n]]
    assert list(tmp_path.glob("*.partial")) == []
    with pytest.raises(UsageError, match="--write overwrite replaces it"):
        run(out, videos, Captioner())
    run(out, videos[:1], Captioner(), overwrite=True)
    stop_workers()
    assert len(out.read_text().splitlines()) == 9


def test_several_videos_have_a_file_each_and_broken_ones_are_named(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    videos = [tmp_path / "a.mkv", tmp_path / "broken.mp4", tmp_path / "x" / "a.mkv"]
    for video in (videos[0], videos[2]):
        write_colors(video, 2, seed=3)
    videos[1].write_bytes(b"none")
    events = run(tmp_path / "c.srt", videos, Captioner())
    stop_workers()
    assert [type(event) for event in events] == [Done, Failed, Done]
    assert sorted(path.name for path in tmp_path.glob("c.*")) == ["c.a-2.srt", "c.a.srt"]
    assert len(cues(tmp_path / "c.a-2.srt")) == 2


@pytest.mark.parametrize("name", ["c.txt", "missing/c.srt"])
def test_an_output_that_cannot_be_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="--out"):
        SceneFile(tmp_path / name, {})
