"""Scene cuts, where they are known; and the rules of sampling against their published forms."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sightloop.data.video.cuts import find_cuts, frame_distances, frame_features, strongest
from sightloop.data.video.reader import find_scenes, stop_workers
from sightloop.data.video.sampling import blip_indices, clip4clip_indices, sample_times, uniform
from sightloop.data.video.writing import write_video
from sightloop.types import Video
from tests.data.video import clips


def moving_scene(random: np.random.Generator, count: int) -> list[NDArray[np.uint8]]:
    """A square that crosses a plain background, changes its color halfway, and noise."""
    background, first, second = random.integers(0, 256, (3, 3))
    frames: list[NDArray[np.uint8]] = []
    for i in range(count):
        frame = np.tile(background, (72, 96, 1)).astype(np.int64)
        left = 70 * i // count
        frame[20:46, left : left + 26] = first if i < count // 2 else second
        frames.append((frame + random.integers(-3, 4, frame.shape)).clip(0, 255).astype(np.uint8))
    return frames


def test_cuts_are_where_scenes_meet_and_nowhere_else(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(20, 60, 12)
    frames = [frame for length in lengths for frame in moving_scene(random, length)]
    write_video(tmp_path / "s.mp4", frames)
    cuts = [0.0, *np.cumsum(lengths) / 25]
    scenes = find_scenes(tmp_path / "s.mp4")
    stop_workers()
    assert [scene.start for scene in scenes] == pytest.approx(cuts[:-1], abs=0.021)
    assert [scene.end for scene in scenes] == pytest.approx(cuts[1:], abs=0.021)


def test_scenes_of_a_part_and_of_keyframes(tmp_path: Path) -> None:
    frames = [frame for i in range(4) for frame in moving_scene(np.random.default_rng(i), 50)]
    write_video(tmp_path / "s.mp4", frames, options={"g": "25"})
    whole = find_scenes(tmp_path / "s.mp4", keyframes_only=True)
    assert [scene.start for scene in whole] == pytest.approx([0, 2, 4, 6], abs=1.01)
    part = find_scenes(Video(tmp_path / "s.mp4", start=1, end=5))
    stop_workers()
    assert [edge for s in part for edge in (s.start, s.end)] == pytest.approx([1, 2, 2, 4, 4, 5], abs=0.021)


def test_a_flash_and_a_single_frame_are_no_cuts() -> None:
    random = np.random.default_rng(1)
    frames = [random.integers(90, 110, (32, 48, 3)).astype(np.uint8) for _ in range(60)]
    frames[30] = np.full((32, 48, 3), 255, np.uint8)
    features = np.stack([frame_features(frame) for frame in frames])
    times = np.arange(60) / 25
    assert len(find_cuts(times, features, frame_distances(features, 1))) == 0
    for frame in frames[31:]:
        frame[:] = 255 - frame // 4
    features = np.stack([frame_features(frame) for frame in frames])
    assert find_cuts(times, features, frame_distances(features, 1)).tolist() in ([30], [31])
    assert len(find_cuts(times[:1], features[:1], frame_distances(features[:1], 1))) == 0


@given(st.integers(0, 2**32 - 1), st.integers(1, 200))
def test_scenes_are_half_a_second_long_at_least(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    times = np.cumsum(random.uniform(0.01, 0.3, count))
    distances = random.uniform(0, 1, count).astype(np.float32)
    candidates = random.random(count) < 0.5
    cuts = strongest(times, distances, candidates)
    starts = [times[0], *times[cuts]]
    assert all(b - a >= 0.5 for a, b in pairwise(starts))
    # What was passed over is near to a stronger one, or to the start.
    for i in set(np.flatnonzero(candidates).tolist()) - set(cuts.tolist()):
        near = [j for j in cuts if abs(times[i] - times[j]) < 0.5 and distances[j] >= distances[i]]
        assert near or times[i] - times[0] < 0.5


def test_distances_are_symmetric_and_zero_for_equal_frames() -> None:
    random = np.random.default_rng(2)
    a, b = (frame_features(random.integers(0, 256, (32, 48, 3)).astype(np.uint8)) for _ in range(2))
    there, back = (frame_distances(np.stack(pair), 1)[1] for pair in ((a, b), (b, a)))
    assert there == pytest.approx(back)
    assert frame_distances(np.stack([a, a]), 1).tolist() == [0, 0]
    assert a[:48].sum() == pytest.approx(1.0, abs=1e-5)


@given(st.integers(1, 20_000), st.sampled_from([1, 4, 8, 12, 16]))
def test_blips_frames_are_those_of_its_code(frames: int, count: int) -> None:
    # data/video_dataset.py: np.arange(start_idx, end_idx, vlen / self.num_frm, dtype=int)
    published = np.arange(0, frames, frames / count, dtype=int)
    assert blip_indices(frames, count).tolist() == published.tolist()


@given(st.integers(1, 5000), st.floats(1, 120), st.integers(1, 64))
def test_clip4clips_frames_are_those_of_its_code(frames: int, rate: float, count: int) -> None:
    # dataloaders/rawvideo_util.py reads frame sec * fps for each second until a read fails;
    # dataloaders/dataloader_msrvtt_retrieval.py keeps max_frames of them.
    fps = int(rate)
    read = []
    for second in range((frames + fps - 1) // fps + 1):
        if second * fps >= frames:
            break
        read.append(second * fps)
    if len(read) > count:
        read = [read[i] for i in np.linspace(0, len(read) - 1, num=count, dtype=int)]
    assert clip4clip_indices(frames, rate, count).tolist() == read


def test_uniform_times_are_the_middles_of_equal_parts() -> None:
    assert sample_times(uniform(4), 2.0, 10.0) == [3.0, 5.0, 7.0, 9.0]


def test_the_corner_frames_of_the_tests_say_what_they_are() -> None:
    (frame,) = clips.corner_frames(1)
    assert clips.corners_of(frame) == [list(color) for color in clips.CORNERS]
