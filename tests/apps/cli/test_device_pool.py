"""A model on two devices: the results of one, in order; a killed run resumes; a dead process is named. With `nano`.

The folder holds images and videos.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sightloop.annotation import runner
from sightloop.annotation.runner import LoaderConfig
from sightloop.annotation.scene_captions import SceneFile, caption_scenes
from sightloop.apps.cli.device_pool import DevicePool
from sightloop.data.video.reader import stop_workers
from sightloop.data.video.writing import write_video
from sightloop.errors import CheckpointError, SightloopError
from sightloop.inference.load import load
from sightloop.inference.model import Model
from sightloop.tasks.caption_filter import CaptionFilter
from sightloop.types import Done, Failed, Video
from tests.data.video.clips import noise_frames


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(13):
        coarse = rng.integers(0, 256, (4, 5, 3), np.uint8)
        Image.fromarray(coarse).resize((80, 64)).save(folder / f"{i:02}.png")
    (folder / "05.png").write_bytes(b"torn")
    for name in ("03.mp4", "07.mp4"):
        write_video(folder / name, noise_frames(rng, 30, 32, 48))
    (folder / "08.mp4").write_bytes(b"torn")
    return folder


def test_two_processes_give_the_results_of_one(photos: Path, tmp_path: Path) -> None:
    paths = sorted(str(path) for path in photos.glob("*.[pm]*"))
    assert len(paths) == 16
    model = load(device="cpu")
    with DevicePool("nano", ["cpu", "cpu"], 2) as pool:
        assert pool.image_spec == model.image_spec
        assert pool.capabilities == model.capabilities
        for verb in ("caption", "embed_images"):
            runs = [
                list(
                    runner.run(
                        [reader],
                        paths,
                        getattr(reader, verb),
                        LoaderConfig(2, isolate=False, parallel=parallel, videos=True),
                    )
                )
                for reader, parallel in ((model, 1), (pool, 2))
            ]
            assert [Path(event.name).name for event in runs[0] if isinstance(event, Failed)] == [
                "05.png",
                "08.mp4",
            ]
            for one, two in zip(*runs, strict=True):
                assert one.name == two.name
                if isinstance(one, Done):
                    assert isinstance(two, Done)
                    if verb == "caption":
                        assert one.value == two.value
                    else:  # sums in another order, by the number of threads
                        np.testing.assert_allclose(one.value, two.value, atol=1e-6)
                else:
                    assert isinstance(two, Failed)
        rng = np.random.default_rng(1)
        scenes = [np.tile(rng.integers(0, 256, 3, np.uint8), (32, 48, 1)) for _ in range(9)]  # three batches
        video = tmp_path / "v.mp4"
        write_video(video, [scene for scene in scenes for _ in range(8)], rate=10)
        one = scene_captions(model, video, tmp_path / "one.srt", 1)
        assert one.count("-->") == 9
        assert scene_captions(pool, video, tmp_path / "two.srt", 2) == one
        with pytest.raises(SightloopError, match="prompt"):
            pool.caption([], ["one", "two"])  # type: ignore[arg-type]
        for process in pool._processes:
            process._process.kill()
        with pytest.raises(SightloopError, match="on cpu ended"):
            pool.embed_images([next(iter(model.read(paths[:1], isolate=False)))])  # type: ignore[list-item]
    stop_workers()


def test_what_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        DevicePool(str(tmp_path / "absent"), ["cpu", "cpu"])


def command(photos: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "sightloop", "caption", str(photos)),
        *("--devices", "cpu,cpu", "--batch-size", "1", "--num-beams", "1"),
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="kills by a signal")
def test_a_killed_run_resumes(photos: Path) -> None:
    run = subprocess.Popen(command(photos), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while len(list(photos.glob("*.txt"))) < 2 and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    early = {path: (path.read_text(), path.stat().st_mtime_ns) for path in photos.glob("*.txt")}
    assert early
    again = subprocess.run(command(photos), capture_output=True, text=True, check=False)
    assert "2 failed" in again.stderr, again.stderr
    assert len(list(photos.glob("*.txt"))) == 14
    # Nothing that was written is written again.
    assert all((path.read_text(), path.stat().st_mtime_ns) == was for path, was in early.items())
    model = load(device="cpu")
    for path in photos.glob("*.txt"):
        # 03.mp4.txt of a video, 04.txt of an image.
        own = path.with_suffix("")
        source = Video(own) if own.suffix else own.with_suffix(".png")
        assert path.read_text().strip() == model.caption(source, num_beams=1)[0]
    stop_workers()


def scene_captions(captioner: Model | DevicePool, video: Path, out: Path, parallel: int) -> str:
    rules = CaptionFilter(keep_all=True, decoding={"num_beams": 1})
    with SceneFile(out, {}) as file:
        events = caption_scenes(
            captioner, [str(video)], file, rules, lambda *_: None, lambda _: None, parallel=parallel
        )
        assert [event.value for event in events if isinstance(event, Done)] == [9]
    return out.read_text()
