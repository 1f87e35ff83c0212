"""Frames of good, odd and hostile videos, against a reference that decodes them one after another with PyAV alone."""

from __future__ import annotations

import itertools
import os
import resource
import signal
import warnings
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from sightloop.data.video.reader import find_scenes, read_frames, stop_workers, video_info
from sightloop.data.video.sampling import Sampling, at_times, blip, clip4clip, every, keyframes, uniform
from sightloop.data.video.writing import write_video
from sightloop.errors import ImageError, UsageError
from sightloop.types import Video, VideoLimits
from tests.data.video import clips


@pytest.fixture(scope="module", autouse=True)
def _workers_end() -> Iterator[None]:
    yield
    stop_workers()


def shown_at(times: list[float], moment: float) -> int:
    return max(0, bisect_right(times, moment + 1e-6) - 1)


CONTAINERS = {
    "mp4": ("a.mp4", "libx264", "yuv420p"),
    "mkv": ("a.mkv", "libx264", "yuv420p"),
    "webm": ("a.webm", "libvpx-vp9", "yuv420p"),
    "avi": ("a.avi", "mpeg4", "yuv420p"),
    "mov of 10 bits": ("a.mov", "libx265", "yuv420p10le"),
    "gif": ("a.gif", "gif", "rgb8"),
    "a wrong ending": ("a.avi", "libx264", "yuv420p"),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_every_container_yields_the_frames_at_their_times(tmp_path: Path, kind: str) -> None:
    name, codec, pixel_format = CONTAINERS[kind]
    path, random = tmp_path / name, np.random.default_rng(len(kind))
    container = "mp4" if kind == "a wrong ending" else None
    frames = clips.noise_frames(random, 60, 48, 64)
    options = {"x265-params": "log-level=none:keyint=10"} if codec == "libx265" else {"g": "9"}
    write_video(path, frames, codec=codec, pixel_format=pixel_format, container=container, options=options)
    times, pixels = clips.reference_frames(path)
    info = video_info(path)
    assert (info.size, info.frames, info.rotation, info.has_audio) == ((48, 64), 60, 0, False)
    assert info.duration == pytest.approx(60 / 25, abs=0.05)
    wanted = sorted(random.uniform(0, 2.39, 9).tolist())
    for frame, moment in itertools.zip_longest(read_frames(path, at_times(wanted)), wanted):
        index = shown_at(times, moment)
        assert frame.time == pytest.approx(times[index], abs=1e-6)
        # rgb24 of the reference is made by the default filter, ours by a sharper one for colors.
        assert np.abs(frame.pixels.astype(int) - pixels[index]).mean() < 5
    numbered = [round(frame.time * 25) for frame in read_frames(path, blip(8))]
    assert numbered == [0, 7, 14, 21, 28, 35, 42, 49]
    assert [round(frame.time * 25) for frame in read_frames(path, clip4clip(12))] == [0, 25, 50]


def test_frames_of_a_variable_rate_are_those_shown_at_a_time(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    starts = np.cumsum([0.0, *random.uniform(0.01, 0.6, 39)]).round(3)
    write_video(tmp_path / "v.mp4", clips.noise_frames(random, 40, 32, 32), times=starts, options={"g": "8"})
    for seconds in (0.1, 0.7, 3.0):
        moments = np.arange(0, starts[-1], seconds)
        read = [frame.time for frame in read_frames(tmp_path / "v.mp4", every(seconds))]
        assert read[: len(moments)] == pytest.approx([starts[shown_at(list(starts), m)] for m in moments])
    part = Video(tmp_path / "v.mp4", start=float(starts[10]), end=float(starts[20]))
    assert [frame.time for frame in read_frames(part, blip(10))] == pytest.approx(starts[10:20])


@pytest.mark.parametrize("clockwise", [0, 90, 180, 270])
def test_rotation_by_metadata_is_applied(tmp_path: Path, clockwise: int) -> None:
    path = tmp_path / "r.mp4"
    clips.write_rotated(path, clips.corner_frames(3), clockwise)
    info = video_info(path)
    assert info.rotation == clockwise
    (frame,) = read_frames(path, at_times([0.0]))
    assert frame.pixels.shape == (*info.size, 3) == ((64, 48, 3) if clockwise in (90, 270) else (48, 64, 3))
    upright = np.rot90(np.array(clips.CORNERS).reshape(2, 2, 3), -clockwise // 90).reshape(4, 3)
    assert np.abs(np.array(clips.corners_of(frame.pixels)) - upright).max() < 25


@pytest.mark.parametrize(("height", "width"), [(47, 63), (33, 17), (1, 16), (720, 1281)])
def test_odd_sizes_keep_their_colors(tmp_path: Path, height: int, width: int) -> None:
    frames = clips.corner_frames(2, height, width)
    write_video(tmp_path / "o.mkv", frames, codec="ffv1", pixel_format="yuv444p")
    (frame,) = read_frames(tmp_path / "o.mkv", at_times([0.0]))
    assert frame.pixels.shape == (height, width, 3)
    if height > 8:
        assert np.abs(np.array(clips.corners_of(frame.pixels)) - np.array(clips.CORNERS)).max() < 30


def test_large_frames_are_reduced_to_the_side_that_suffices(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", clips.corner_frames(2, 96, 160))
    for side, size in ((24, (24, 40)), (96, (96, 160)), (500, (96, 160))):
        (frame,) = read_frames(tmp_path / "a.mp4", at_times([0.0]), side=side)
        assert frame.pixels.shape[:2] == size
        assert np.abs(np.array(clips.corners_of(frame.pixels)) - np.array(clips.CORNERS)).max() < 25


def test_keyframes_are_the_frames_that_the_encoder_marked(tmp_path: Path) -> None:
    frames = clips.noise_frames(np.random.default_rng(1), 60, 32, 32)
    for name, codec in (("k.mp4", "libx264"), ("k.webm", "libvpx-vp9"), ("k.avi", "mpeg4")):
        options = {"x264-params": "keyint=10:min-keyint=10:scenecut=0"} if codec == "libx264" else {"g": "10"}
        write_video(tmp_path / name, frames, codec=codec, options=options)
        with av.open(str(tmp_path / name)) as container:
            packets = [p for p in container.demux(video=0) if p.size and p.is_keyframe]
            marked = [float((p.dts if p.pts is None else p.pts) * p.time_base) for p in packets]
        assert 6 <= len(marked) <= 30
        times = [frame.time for frame in read_frames(tmp_path / name, keyframes())]
        assert times == pytest.approx(marked), name
        spaced = [frame.time for frame in read_frames(tmp_path / name, keyframes(gap=0.7))]
        assert set(spaced) <= set(times)
        assert all(b - a >= 0.7 for a, b in itertools.pairwise(spaced))
        part = Video(tmp_path / name, start=1.0, end=1.7)
        inside = [frame.time for frame in read_frames(part, keyframes())]
        assert inside == pytest.approx([time for time in marked if 1.0 <= time < 1.7])


def write_cut(path: Path, share: float) -> None:
    write_video(path, clips.noise_frames(np.random.default_rng(2), 200, 48, 64), codec="mpeg4")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize("name", ["t.mp4", "t.mkv", "t.avi"])
def test_a_truncated_video_yields_what_is_there_and_says_what_is_missing(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_cut(path, 0.4)
    notes: list[str] = []
    frames = list(read_frames(path, uniform(10), warn=notes.append))
    assert len(frames) >= 9
    assert 1 < frames[-1].time < 5
    assert len(notes) >= 1
    assert str(path) in notes[0]
    assert "cut short" in notes[0]
    with pytest.warns(UserWarning, match="cut short"):
        assert len(list(read_frames(path, blip(8)))) == 8


def test_damage_in_the_middle_costs_what_is_damaged(tmp_path: Path) -> None:
    path, random = tmp_path / "d.mp4", np.random.default_rng(3)
    write_video(path, clips.noise_frames(random, 200, 48, 64), options={"g": "20"})
    content = bytearray(path.read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + len(content) // 10)
    content[middle] = random.bytes(middle.stop - middle.start)
    path.write_bytes(content)
    notes: list[str] = []
    frames = list(read_frames(path, every(0.04), warn=notes.append))
    assert 150 <= len(frames) <= 200
    assert any("did not decode" in note for note in notes)


def hostile(folder: Path, kind: str) -> Path:
    path = folder / "h.mp4"
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "zeros":
            path.write_bytes(bytes(9999))
        case "an image":
            Image.new("RGB", (9, 9)).save(path, "JPEG")
        case "sound":
            clips.write_sound(path)
        case "a playlist":
            path.write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")
        case "a list of files":
            path.write_text("ffconcat version 1.0\nfile h.mp4\n")
        case "8K header":
            clips.write_header_bomb(path)
        case "8K in WebP":
            clips.write_webp(path, clips.corner_frames(2), [100, 100])
            content = bytearray(path.read_bytes())
            content[24:30] = (7679).to_bytes(3, "little") + (4319).to_bytes(3, "little")
            path.write_bytes(content)
        case "a still WebP":
            Image.new("RGB", (9, 9)).save(path, "WEBP")
        case "a pipe":
            os.mkfifo(path)
        case "without index":
            whole = path.with_suffix(".whole")
            write_video(whole, clips.corner_frames(9), container="mov")  # its index is at its end
            path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        case "a folder":
            path.mkdir()
        case "endless gif":
            clips.write_endless_gif(path, 20_000)
        case _:
            pass
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "no such file"),
        ("empty", "an empty file"),
        ("zeros", "nothing but zeros"),
        ("an image", r"it is an image \(JPEG\)"),
        ("sound", "sound only"),
        ("a playlist", "not a video"),
        ("a list of files", "not a video"),
        ("8K header", "7680 x 4320 pixels, over the limit"),
        ("8K in WebP", "7680 x 4320 pixels, over the limit"),
        ("a still WebP", r"it is an image \(WEBP\)"),
        ("a pipe", "no regular file"),
        ("without index", "moov"),
        ("a folder", "a folder"),
    ],
)
def test_what_is_no_video_is_named_with_the_reason(tmp_path: Path, kind: str, reason: str) -> None:
    path = hostile(tmp_path, kind)
    for read in (video_info, find_scenes, lambda name: list(read_frames(name, uniform(4)))):
        with pytest.raises(ImageError, match=reason) as error:
            read(path)
        assert error.value.name == str(path)


@pytest.mark.parametrize("before", [None, (64, 64)])
def test_8k_h264_in_a_small_file_is_refused_at_little_cost(
    tmp_path: Path, before: tuple[int, int] | None
) -> None:
    path = tmp_path / ("h.h264" if before else "h.mp4")
    clips.write_large_h264(path, 4320, 7680, before)
    assert path.stat().st_size < 100_000
    stop_workers()
    seconds = children_seconds()
    for read in (video_info, find_scenes, lambda name: list(read_frames(name, uniform(4)))):
        with pytest.raises(ImageError, match="7680 x 4320 pixels, over the limit"):
            read(path)
    stop_workers()
    assert children_seconds() - seconds < 8


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_8k_h264_is_read_where_the_limits_are_raised(tmp_path: Path) -> None:
    path = tmp_path / "h.mp4"
    clips.write_large_h264(path, 4320, 7680)
    limits = VideoLimits(max_pixels=7680 * 4320)
    (frame,) = read_frames(path, at_times([0.0]), side=54, limits=limits)
    assert frame.pixels.shape == (54, 96, 3)
    with pytest.raises(ImageError, match=r"memory|can be decoded"):
        list(
            read_frames(
                path, at_times([0.0]), limits=VideoLimits(max_pixels=1 << 30, max_memory_bytes=1 << 26)
            )
        )


def test_an_endless_gif_ends_at_the_limit_of_processor_time(tmp_path: Path) -> None:
    path, notes = hostile(tmp_path, "endless gif"), list[str]()
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    stop_workers()
    limits = VideoLimits(max_seconds=1.5)
    frames = list(read_frames(path, every(0.1), limits=limits, warn=notes.append))
    stop_workers()
    assert 0 < len(frames) < 20_000
    assert any("over the limits" in note for note in notes)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 10


def test_limits_of_pixels_frames_bytes_time_and_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, clips.noise_frames(np.random.default_rng(4), 50, 144, 256))
    with pytest.raises(ImageError, match="over the limit of 1000"):
        list(read_frames(path, uniform(2), limits=VideoLimits(max_pixels=1000)))
    with pytest.raises(ImageError, match="over the limit of 99"):
        video_info(path, limits=VideoLimits(max_file_bytes=99))
    notes: list[str] = []
    limits = VideoLimits(max_frames=5)
    assert len(list(read_frames(path, keyframes(), limits=limits, warn=notes.append))) <= 5
    assert len(list(read_frames(path, every(0.04), limits=limits, warn=notes.append))) == 5
    assert "only the first 5 of its frames" in notes[-1]
    large = tmp_path / "large.mp4"
    write_video(large, clips.corner_frames(2, 1440, 2560), codec="mpeg4")
    with pytest.raises(ImageError, match=r"memory|can be decoded"):
        list(read_frames(large, uniform(2), limits=VideoLimits(max_memory_bytes=100_000), warn=notes.append))
    with pytest.raises(ImageError, match="limit of processor time"):
        list(read_frames(path, every(0.04), limits=VideoLimits(max_total_seconds=1e-9)))
    assert len(list(read_frames(path, uniform(2)))) == 2  # the next request is served as ever


def test_a_process_that_dies_costs_its_video_only(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, clips.noise_frames(np.random.default_rng(6), 60, 144, 256), codec="mpeg4")
    stop_workers()
    stream = read_frames(path, every(0.04))
    next(stream)
    (child,) = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and is_child_decoder(entry)
    ]
    os.kill(child, signal.SIGKILL)
    with pytest.raises(ImageError, match=r"crashed the decoder \(exit status -9\)"):
        list(stream)
    assert video_info(path).frames == 60


def is_child_decoder(process: Path) -> bool:
    try:
        parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
        return parent == str(os.getpid()) and b"video.decode_worker" in (process / "cmdline").read_bytes()
    except OSError:
        return False


def test_frames_left_unread_end_their_process(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, clips.noise_frames(np.random.default_rng(5), 100, 144, 256))
    stream = read_frames(path, every(0.04))
    next(stream)
    del stream
    assert len(list(read_frames(path, uniform(3)))) == 3


@pytest.mark.parametrize(("start", "end"), [(-1.0, None), (2.0, 1.0), (1.0, 1.0), (float("nan"), None)])
def test_a_part_that_is_none_is_refused(start: float, end: float | None) -> None:
    with pytest.raises(UsageError, match="start below end"):
        read_frames(Video("a.mp4", start, end), uniform(1))


def test_a_part_after_the_end_is_named(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", clips.corner_frames(25))
    with pytest.raises(ImageError, match=r"starts at 7 s, and the video ends at 1\.00 s"):
        list(read_frames(Video(tmp_path / "a.mp4", start=7), uniform(1)))


@pytest.mark.parametrize(
    "make", [lambda: uniform(0), lambda: blip(0), lambda: every(0.0), lambda: at_times([])]
)
def test_samplings_without_frames_are_refused(make: type[Sampling]) -> None:
    with pytest.raises(UsageError):
        make()


def test_good_videos_warn_of_nothing(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", clips.corner_frames(30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert video_info(tmp_path / "a.mp4").duration == pytest.approx(1.2)
        assert len(list(read_frames(tmp_path / "a.mp4", uniform(30)))) == 30
