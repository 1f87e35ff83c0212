"""Which frames of a video are read: at times, uniformly, once in a while, keyframes, and by published protocols."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sightloop.errors import UsageError
from sightloop.types import Integers

SamplingKind = Literal["times", "uniform", "interval", "keyframes", "blip", "clip4clip"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Choice of frames; made by the functions of this module.

    Args:
        kind: how they are chosen.
        count: number of frames, for "uniform", "blip" and "clip4clip".
        seconds: between two frames, for "interval"; the least time between two, for "keyframes".
        times: in seconds from the beginning of the video, for "times".
    """

    kind: SamplingKind
    count: int = 0
    seconds: float = 0.0
    times: tuple[float, ...] = ()

    @property
    def by_index(self) -> bool:
        """Whether frames are chosen by their numbers, for which all are counted first."""
        return self.kind in ("blip", "clip4clip")


def at_times(times: Sequence[float]) -> Sampling:
    """The frame that is shown at each of these times, in seconds from the beginning of the video, in order."""
    if not times or not all(math.isfinite(time) and time >= 0 for time in times):
        raise UsageError(f"times={list(times)}: must be at least one number of seconds, none negative")
    if list(times) != sorted(times):
        raise UsageError(f"times={list(times)}: must ascend")
    return Sampling("times", times=tuple(float(time) for time in times))


def uniform(count: int) -> Sampling:
    """The frames in the middle of `count` equal parts of the video's time."""
    return Sampling("uniform", count=_at_least_one("count", count))


def every(seconds: float) -> Sampling:
    """A frame each `seconds`, the first one at the start: 1.0 is one frame a second."""
    if not (math.isfinite(seconds) and seconds > 0):
        raise UsageError(f"seconds={seconds}: must be above 0")
    return Sampling("interval", seconds=float(seconds))


def keyframes(gap: float = 0.0) -> Sampling:
    """The keyframes, which decode alone, and many times faster than all frames.

    Args:
        gap: least time between two, in seconds.
    """
    if not (math.isfinite(gap) and gap >= 0):
        raise UsageError(f"gap={gap}: must be at least 0")
    return Sampling("keyframes", seconds=float(gap))


def blip(count: int = 8) -> Sampling:
    """The frames of BLIP's video retrieval, by their numbers; see `blip_indices`."""
    return Sampling("blip", count=_at_least_one("count", count))


def clip4clip(count: int = 12) -> Sampling:
    """The frames of CLIP4Clip, by their numbers; see `clip4clip_indices`."""
    return Sampling("clip4clip", count=_at_least_one("count", count))


def blip_indices(frames: int, count: int = 8) -> Integers:
    """Numbers of the frames that BLIP's code takes (data/video_dataset.py, "uniform"), int64 `[count]`.

    `np.arange(0, frames, frames / count, dtype=int)`. With an integer type NumPy rounds the step down, so that the
    frames are 0, s, 2s, ... for s = frames // count: the starts of eighths where count divides frames, and somewhat
    before them elsewhere. Of videos shorter than count, frame 0 is repeated.

    Args:
        frames: number of frames of the video.
        count: number of frames wanted.
    """
    return np.arange(count, dtype=np.int64) * (frames // count)


def clip4clip_indices(frames: int, rate: float, count: int = 12) -> Integers:
    """Numbers of the frames that CLIP4Clip's code takes (dataloaders/rawvideo_util.py), int64 `[n]`, n <= count.

    One frame a second, at multiples of the frame rate rounded down; of more than `count` of those, `count` uniformly,
    the first and the last among them (its `slice_framepos=2`).

    Args:
        frames: number of frames of the video.
        rate: frames a second.
        count: the most frames.
    """
    chosen = np.arange(0, frames, max(1, int(rate)), dtype=np.int64)
    if len(chosen) > count:
        chosen = chosen[np.linspace(0, len(chosen) - 1, num=count, dtype=np.int64)]
    return chosen


def sample_times(sampling: Sampling, start: float, end: float) -> list[float]:
    """Times in seconds of a sampling by time, in a part of a video.

    Args:
        sampling: "times", "uniform" or "interval".
        start: of the part, in seconds.
        end: of the part.
    """
    if sampling.kind == "times":
        return [time for time in sampling.times if start <= time < end]
    if sampling.kind == "uniform":
        step = (end - start) / sampling.count
        return [start + (i + 0.5) * step for i in range(sampling.count)]
    count = max(1, math.ceil((end - start) / sampling.seconds - 1e-9))
    return [start + i * sampling.seconds for i in range(count)]


def sample_indices(sampling: Sampling, frames: int, rate: float) -> Integers:
    """Numbers of the frames of a sampling by index, int64 `[n]`.

    Args:
        sampling: "blip" or "clip4clip".
        frames: number of frames of the part.
        rate: frames a second.
    """
    if sampling.kind == "blip":
        return blip_indices(frames, sampling.count)
    return clip4clip_indices(frames, rate, sampling.count)


def _at_least_one(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(f"{name}={value!r}: must be a whole number, at least 1")
    return value
