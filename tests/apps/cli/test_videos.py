"""Commands over folders that hold images and videos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sightloop
from sightloop.apps.cli.main import main
from sightloop.data.video.reader import stop_workers
from sightloop.data.video.writing import write_video
from sightloop.inference.model import Model
from sightloop.types import Pixels
from tests.data.video.clips import noise_frames
from tests.tiny_checkpoints.clip_and_blip import write_blip, write_clip


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder of two images, two videos and a broken one."""
    folder, random = tmp_path / "mixed", np.random.default_rng(0)
    folder.mkdir()
    for name in ("a.mp4", "c.mkv"):
        write_video(folder / name, noise_frames(random, 30, 32, 48))
    for name in ("b.png", "d.png"):
        Image.fromarray(noise_frames(random, 1, 32, 48)[0]).save(folder / name)
    (folder / "broken.mp4").write_bytes(b"nothing")
    return folder


def test_embed_takes_images_and_videos(
    tmp_path: Path, mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_clip(tmp_path / "clip")
    out = tmp_path / "vectors.npy"
    status = main(["embed", str(mixed), "-m", str(tmp_path / "clip"), "--device", "cpu", "--out", str(out)])
    assert status == 1
    assert "broken.mp4" in capsys.readouterr().err
    names = [Path(line).name for line in out.with_suffix(".names.txt").read_text().splitlines()]
    assert names == ["a.mp4", "b.png", "c.mkv", "d.png"]
    model = sightloop.load(tmp_path / "clip", device="cpu")
    sources = [sightloop.Video(mixed / n) if n[-3:] != "png" else mixed / n for n in names]
    assert np.abs(np.load(out) - model.embed_images(sources)).max() < 1e-6
    stop_workers()


def test_captions_answers_and_classes_of_videos(
    tmp_path: Path, mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mixed / "broken.mp4").unlink()
    write_blip(tmp_path / "caption", head="caption")
    write_blip(tmp_path / "answer", head="answer")
    common = ["--device", "cpu", "--json"]
    assert main(["caption", str(mixed), "-m", str(tmp_path / "caption"), "--keep-all", *common]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(row["name"]).name for row in rows] == ["a.mp4", "b.png", "c.mkv", "d.png"]
    assert (mixed / "a.mp4.txt").read_text().strip() == rows[0]["caption"]
    assert main(["caption", str(mixed), "-m", str(tmp_path / "caption"), *common]) == 0
    assert capsys.readouterr().out == ""  # all have captions
    asked = ["ask", str(mixed), "-m", str(tmp_path / "answer"), "-q", "what is red?"]
    assert main([*asked, *common]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    stop_workers()


def test_ask_reads_as_many_frames_as_it_is_told(
    tmp_path: Path, mixed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (mixed / "broken.mp4").unlink()
    write_blip(tmp_path / "answer", head="answer")
    model = sightloop.load(tmp_path / "answer", device="cpu")
    read: list[dict[str, int]] = []
    answer = Model.answer

    def watched(self: Model, images: list[Pixels], *arguments: Any, **options: Any) -> list[str]:
        read[-1] |= {Path(image.name).name: image.frames for image in images}
        return answer(self, images, *arguments, **options)

    monkeypatch.setattr(Model, "answer", watched)
    command = ["ask", str(mixed), "-m", str(tmp_path / "answer"), "-q", "what is red?", "--device", "cpu"]
    for options, frames in (((), 16), (("--frames", "3"), 3)):
        read.append({})
        assert main([*command, "--json", *options]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert read[-1] == {"a.mp4": frames, "b.png": 1, "c.mkv": frames, "d.png": 1}
        videos = [sightloop.Video(mixed / name, frames=frames) for name in ("a.mp4", "c.mkv")]
        assert [rows[0]["answer"], rows[2]["answer"]] == answer(model, videos, "what is red?")
    assert main([*command, "--frames", "0"]) == 2
    assert "--frames 0: must be at least 1" in capsys.readouterr().err
    assert len(read) == 2
    stop_workers()


def test_scenes_become_subtitles_and_are_not_overwritten(
    tmp_path: Path, mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_blip(tmp_path / "caption", head="caption")
    out = tmp_path / "c.vtt"
    command = [
        "caption",
        str(mixed / "a.mp4"),
        "-m",
        str(tmp_path / "caption"),
        "--device",
        "cpu",
        "--scenes",
    ]
    assert main([*command, "--keep-all", "--out", str(out)]) == 0
    assert out.read_text().startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.200\n")
    before = out.read_text()
    out.write_text("edited by a person")
    assert main([*command, "--out", str(out)]) == 2
    assert "--write overwrite replaces it" in capsys.readouterr().err
    assert out.read_text() == "edited by a person"
    assert main([*command, "--keep-all", "--out", str(out), "--write", "overwrite"]) == 0
    assert out.read_text() == before
    assert main(command) == 2
    assert "--out FILE.srt" in capsys.readouterr().err
    stop_workers()


def test_commands_for_images_alone_leave_videos_out(
    tmp_path: Path, mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sightloop.annotation.inputs import find_images

    assert [Path(str(item)).name for item in find_images([mixed])] == ["b.png", "d.png"]
    assert [Path(str(item)).name for item in find_images([mixed], "video")] == [
        "a.mp4",
        "broken.mp4",
        "c.mkv",
    ]


def test_synthetic_videos_are_written(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    assert main(["synthetic", str(folder), "--count", "2", "--video-scenes", "2", "--size", "32"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["000000.mp4", "000001.mp4", "clips.jsonl"]
    assert main(["synthetic", str(folder), "--video-scenes", "2", "--shuffled"]) == 2
