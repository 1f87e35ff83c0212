"""Scene cuts by color: where the colors of a frame differ from those of the frame before far more than nearby.

Each frame is reduced to 48 x 32 pixels. The distance of two frames is the geometric mean of

    histogram  half the L1 distance of their color histograms (16 bins a channel, linear between two bins), and
    blocks     the median over 24 blocks of the greatest difference of a channel's mean, as a share of 255:

a thing that moves or changes color changes few blocks, a pan changes few colors, a cut changes both. A cut is where the
distance exceeds three times the median of those within 12 frames by 0.06, still does so between frames three apart (a
flash does not), and half a second or more after the cut before it. Among keyframes, seconds apart, it must be
0.12.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise
from typing import Final

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from sightloop.data.video.selection import OpenVideo, span
from sightloop.errors import ImageError
from sightloop.types import Floats, Floats32, Integers

_SIZE: Final = (32, 48)
_BLOCKS: Final = (4, 6)
_BINS: Final = 16
_EXCESS: Final = 0.06
_TIMES_MEDIAN: Final = 3.0
_NEARBY: Final = 12  # frames before and after
_FLASH: Final = 3  # frames
_KEYFRAME_DISTANCE: Final = 0.12
_LEAST_SECONDS: Final = 0.5
_FRAME_SECONDS: Final = 1 / 31  # of faster videos some frames are left out


def scene_parts(
    file: OpenVideo, start: float | None, end: float | None, *, keys_only: bool
) -> dict[str, list[tuple[float, float]]]:
    """Beginning and end in seconds of each scene, under "parts".

    Args:
        file: the video.
        start: of the part to look at.
        end: likewise, exclusive.
        keys_only: look at keyframes alone.
    """
    timeline = file.timeline(by_index=False)
    first, last = span(file, timeline, start, end)
    if first > 0:
        file.seek(first)
    reformatter, times, features = VideoReformatter(), list[float](), list[Floats32]()
    for time, frame in file.decode(keys_only=keys_only):
        if time >= last:
            break
        if time >= first and (not times or time - times[-1] >= _FRAME_SECONDS):
            times.append(time)
            features.append(frame_features(_thumbnail(frame, reformatter)))
    if not times:
        raise ImageError(file.path, f"no frame between {first:g} s and {last:g} s can be decoded")
    distances = frame_distances(np.stack(features), 1)
    if keys_only:
        cuts = strongest(np.array(times), distances, distances > _KEYFRAME_DISTANCE)
    else:
        cuts = find_cuts(np.array(times), np.stack(features), distances)
    # A file that ends early ends with its last frame.
    edges = [first, *(times[i] for i in cuts), max(last, times[-1] + 1e-3)]
    return {"parts": [(a, b) for a, b in pairwise(edges) if b > a]}


def find_cuts(times: Floats, features: Floats32, distances: Floats32) -> Integers:
    """Numbers of the frames that begin a scene, int64 `[n]`, ascending, without the first one.

    Args:
        times: of N frames in seconds, `[N]`.
        features: of `frame_features`, `[N, F]`.
        distances: of each frame to the one before, `[N]`, the first 0.
    """
    if len(times) < 2:
        return np.zeros(0, np.int64)
    padded = np.pad(distances[1:], _NEARBY, mode="reflect" if len(times) > _NEARBY + 1 else "edge")
    nearby = np.concatenate([[0.0], np.median(sliding_window_view(padded, 2 * _NEARBY + 1), axis=1)])
    least = _TIMES_MEDIAN * nearby + _EXCESS
    lasting = _across(features, 1, _FLASH), _across(features, _FLASH, 0)
    return strongest(times, distances, np.min([distances, *lasting], axis=0) > least)


def strongest(times: Floats, distances: Floats32, candidates: NDArray[np.bool_]) -> Integers:
    """Of cuts nearer to each other than half a second, the strongest; int64 `[n]`.

    Args:
        times: of N frames, `[N]`.
        distances: `[N]`.
        candidates: which are cuts, `[N]`; cuts within half a second of the first frame are none.
    """
    kept: list[float] = [float(times[0])]
    chosen: list[int] = []
    indices = np.flatnonzero(candidates)
    for i in indices[np.argsort(-distances[indices], kind="stable")].tolist():
        place = bisect_left(kept, float(times[i]))
        neighbors = kept[max(0, place - 1) : place + 1]
        if all(abs(times[i] - other) >= _LEAST_SECONDS for other in neighbors):
            kept.insert(place, float(times[i]))
            chosen.append(i)
    return np.array(sorted(chosen), np.int64)


def frame_features(pixels: NDArray[np.uint8]) -> Floats32:
    """Color histogram and block means of a small frame: uint8 `[32, 48, 3]` -> float32 `[48 + 72]`."""
    scaled = pixels.reshape(-1, 3).astype(np.float32) * np.float32((_BINS - 1) / 255)
    low = np.minimum(scaled.astype(np.int64), _BINS - 2)
    share = (scaled - low).ravel()
    cells = (low + np.arange(3) * _BINS).ravel()
    counts = np.bincount(cells, 1 - share, 3 * _BINS) + np.bincount(cells + 1, share, 3 * _BINS)
    rows, columns = _SIZE[0] // _BLOCKS[0], _SIZE[1] // _BLOCKS[1]
    means = pixels.reshape(_BLOCKS[0], rows, _BLOCKS[1], columns, 3).mean((1, 3), dtype=np.float32)
    return np.concatenate([counts / share.size, means.ravel() / 255]).astype(np.float32)


def frame_distances(features: Floats32, step: int) -> Floats32:
    """Distance of each frame to the one `step` frames before: `[N, F]` -> `[N]`, the first `step` 0."""
    bins = 3 * _BINS
    before, after = features[:-step], features[step:]
    histogram = np.abs(after[:, :bins] - before[:, :bins]).sum(1) / 2
    blocks = np.abs(after[:, bins:] - before[:, bins:]).reshape(len(after), _BLOCKS[0] * _BLOCKS[1], 3).max(2)
    distances = np.sqrt(histogram * np.median(blocks, axis=1))
    return np.concatenate([np.zeros(min(step, len(features))), distances]).astype(np.float32)


def _across(features: Floats32, before: int, after: int) -> Floats32:
    """`[N]`: for each frame, the distance of the one so many before to the one so many after; ends are repeated."""
    first, last = np.repeat(features[:1], before, axis=0), np.repeat(features[-1:], after, axis=0)
    return frame_distances(np.concatenate([first, features, last]), before + after)[before + after :]


def _thumbnail(frame: av.VideoFrame, reformatter: VideoReformatter) -> NDArray[np.uint8]:
    """uint8 `[32, 48, 3]`; neither upright nor in the right colors, as neither matters here."""
    small = reformatter.reformat(
        frame, width=_SIZE[1], height=_SIZE[0], format="rgb24", interpolation=Interpolation.AREA, threads=1
    )
    return np.asarray(small.to_ndarray(), np.uint8)
