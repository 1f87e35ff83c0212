"""Frames of an open video by a sampling, within a part of it; in the child process only."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Protocol

import av

from sightloop.data.video.container import Timeline
from sightloop.data.video.sampling import Sampling, sample_indices, sample_times
from sightloop.errors import ImageError
from sightloop.types import VideoInfo


class OpenVideo(Protocol):
    """An open video: `container.VideoFile`, or `webp.AnimatedWebp`."""

    path: str

    def info(self) -> VideoInfo:
        """Its properties."""
        ...

    def rate(self, timeline: Timeline) -> float:
        """Frames a second, on average."""
        ...

    def display_width(self, width: int) -> int:
        """Width of its frames in square pixels."""
        ...

    def timeline(self, *, by_index: bool) -> Timeline:
        """Where the frames are; all of them are counted with `by_index`."""
        ...

    def seek(self, time: float) -> None:
        """To a frame at a time or before it, from which `decode` goes on."""
        ...

    def decode(self, *, keys_only: bool = False) -> Iterator[tuple[float, av.VideoFrame]]:
        """Frames with their times."""
        ...

    def frames_at(
        self, times: list[float], timeline: Timeline, *, keep: bool
    ) -> Iterator[tuple[float, av.VideoFrame]]:
        """The frame that is shown at each time, with the time at which it begins."""
        ...

    def final_warnings(self) -> list[str]:
        """What could not be read."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


def select_frames(
    file: OpenVideo, start: float | None, end: float | None, sampling: Sampling
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Frames with the times at which they begin, ascending.

    Args:
        file: the video.
        start: of the part, in seconds; None for the beginning.
        end: of the part, exclusive; None for the end.
        sampling: which frames.

    Raises:
        ImageError: the part is outside of the video, or nothing of it decodes.
    """
    if sampling.kind == "keyframes":
        return _keyframes(file, start or 0.0, end, sampling.seconds)
    timeline = file.timeline(by_index=sampling.by_index)
    first, last = span(file, timeline, start, end)
    if sampling.by_index:
        part = timeline.times[bisect_left(timeline.times, first) : bisect_left(timeline.times, last)]
        if not part:
            raise ImageError(file.path, f"no frame begins between {first:g} s and {last:g} s")
        indices = sample_indices(sampling, len(part), file.rate(timeline))
        return file.frames_at([part[i] for i in indices], timeline, keep=True)
    return file.frames_at(sample_times(sampling, first, last), timeline, keep=False)


def span(file: OpenVideo, timeline: Timeline, start: float | None, end: float | None) -> tuple[float, float]:
    """Beginning and end of a part in seconds, within the video."""
    first, last = start or 0.0, timeline.end if end is None else min(end, timeline.end)
    if first >= timeline.end:
        raise ImageError(
            file.path, f"the part starts at {first:g} s, and the video ends at {timeline.end:.2f} s"
        )
    return first, last


def _keyframes(
    file: OpenVideo, start: float, end: float | None, gap: float
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Keyframes of a part; where none begins in it, the last one before it."""
    if start > 0:
        file.seek(start)
    before, last = None, None
    for time, frame in file.decode(keys_only=True):
        if end is not None and time >= end:
            break
        if time < start:
            before = time, frame
        elif last is None or time - last >= gap:
            last = time
            yield time, frame
    if last is None and before is not None:
        yield before
