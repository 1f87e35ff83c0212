"""Animated WebP as a video: frames and times as Pillow and the durations have them; cut off, damaged, endless."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sightloop.annotation.inputs import find_images
from sightloop.data.video.reader import find_scenes, read_frames, stop_workers, video_info
from sightloop.data.video.sampling import at_times, blip, every, keyframes, uniform
from sightloop.errors import ImageError
from sightloop.types import Video, VideoLimits
from tests.data.video import clips


@pytest.fixture(scope="module", autouse=True)
def _workers_end() -> Iterator[None]:
    yield
    stop_workers()


def decoded(path: Path) -> list[np.ndarray]:
    """All frames by Pillow, over white."""
    frames: list[np.ndarray] = []
    with Image.open(path) as image:
        for number in range(image.n_frames):
            image.seek(number)
            frame = image.convert("RGBA")
            over = Image.alpha_composite(Image.new("RGBA", frame.size, "white"), frame)
            frames.append(np.asarray(over.convert("RGB")))
    return frames


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    durations=st.lists(st.integers(0, 900), min_size=2, max_size=8),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    alpha=st.booleans(),
    seed=st.integers(0, 99),
)
def test_frames_are_those_of_pillow_at_the_times_of_the_durations(
    tmp_path: Path, durations: list[int], size: tuple[int, int], alpha: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    shape = (len(durations), *size, 4 if alpha else 3)
    path = tmp_path / "a.webp"
    clips.write_webp(path, list(random.integers(0, 256, shape, np.uint8)), durations)
    # Browsers show frames of 10 ms or less for 100 ms.
    lasting = [duration if duration > 10 else 100 for duration in durations]
    starts = np.cumsum([0, *lasting]) / 1000
    info = video_info(path)
    assert (info.size, info.frames, info.container, info.rotation) == (size, len(durations), "webp", 0)
    assert info.duration == starts[-1]
    assert info.rate == 1000 * len(durations) / sum(lasting)
    expected = decoded(path)
    middles = ((starts[1:] + starts[:-1]) / 2).tolist()
    for number, frame in enumerate(read_frames(path, at_times(middles))):
        assert frame.time == pytest.approx(starts[number])
        assert np.abs(frame.pixels.astype(int) - expected[number]).max() <= 1
    numbers = [int(i) for i in np.arange(8) * (len(durations) // 8)]
    assert [frame.time for frame in read_frames(path, blip(8))] == pytest.approx(starts[numbers])


def test_scenes_parts_and_keyframes(tmp_path: Path) -> None:
    path, random = tmp_path / "s.webp", np.random.default_rng(0)
    scenes = [np.tile(color, (32, 48, 1)).astype(np.uint8) for color in ((200, 30, 30), (30, 60, 200))]
    dots = random.integers(0, 40, (20, 2)) % (32, 48)
    frames = [scenes[i // 10].copy() for i in range(20)]
    for frame, (y, x) in zip(frames, dots, strict=True):
        frame[y, x] = 255
    clips.write_webp(path, frames, [100] * 20)
    first, second = find_scenes(path)
    assert [first.start, first.end, second.start, second.end] == pytest.approx([0, 1, 1, 2])
    read = [frame.time for frame in read_frames(Video(path, start=0.95, end=1.5), every(0.2))]
    assert read == pytest.approx([0.9, 1.1, 1.3])
    times = [frame.time for frame in read_frames(path, keyframes())]
    assert times[0] == 0
    assert len(times) < 20


def test_it_is_an_image_in_a_folder_and_a_video_where_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.webp"
    clips.write_webp(path, clips.corner_frames(3), [100] * 3)
    assert list(find_images([tmp_path])) == [str(path)]
    assert list(find_images([path], "video")) == [str(path)]
    assert len(list(read_frames(path, uniform(3)))) == 3


def test_what_is_there_of_a_cut_or_damaged_file_is_read(tmp_path: Path) -> None:
    path, random = tmp_path / "c.webp", np.random.default_rng(1)
    clips.write_webp(path, list(random.integers(0, 256, (10, 24, 24, 3), np.uint8)), [100] * 10)
    content, expected = path.read_bytes(), decoded(path)
    path.write_bytes(content[: len(content) * 6 // 10])
    notes: list[str] = []
    frames = list(read_frames(path, every(0.1), warn=notes.append))
    assert 4 <= len(frames) <= 6
    assert all(np.array_equal(frame.pixels, own) for frame, own in zip(frames, expected, strict=False))
    assert any(str(path) in note and "cut short" in note for note in notes)

    for place in (32, 50):  # the header of the sixth frame, or its bits
        damaged = bytearray(content)
        start = [i for i in range(len(content)) if content.startswith(b"ANMF", i)][5] + place
        damaged[start : start + 60] = bytes(60)
        path.write_bytes(damaged)
        notes.clear()
        frames = list(read_frames(path, every(0.1), warn=notes.append))
        assert [frame.time for frame in frames] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
        assert all(np.array_equal(f.pixels, own) for f, own in zip(frames, expected, strict=False))
        assert any("damaged: only the first 5 of its frames decode" in note for note in notes)
    path.write_bytes(content[:40])
    with pytest.raises(ImageError, match="no frame in it"):
        video_info(path)


def test_an_endless_one_ends_at_the_limits(tmp_path: Path) -> None:
    path, notes = tmp_path / "e.webp", list[str]()
    clips.write_endless_webp(path, 50_000)
    limits = VideoLimits(max_seconds=1.5)
    frames = list(read_frames(path, every(100.0), side=40, limits=limits, warn=notes.append))
    assert 0 < len(frames) < 20
    assert any("over the limits" in note for note in notes)
    clips.write_webp(path, clips.corner_frames(9), [100] * 9)
    notes.clear()
    assert len(list(read_frames(path, every(0.1), limits=VideoLimits(max_frames=5), warn=notes.append))) == 5
    assert "only the first 5 of its frames" in notes[0]
    clips.write_webp(path, clips.corner_frames(2, 1440, 2560), [100] * 2)
    with pytest.raises(ImageError, match="too much memory"):
        list(read_frames(path, uniform(2), limits=VideoLimits(max_memory_bytes=100_000)))
