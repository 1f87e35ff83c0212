"""Animated WebP as a video, decoded with Pillow, as FFmpeg cannot; in the child process only.

A RIFF file of chunks (https://developers.google.com/speed/webp/docs/riff_container): VP8X has the size of the canvas
and says whether it moves, each ANMF is a frame with its duration. Times come from these headers, without decoding.
"""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from time import process_time
from typing import Final

import av
import numpy as np
from PIL import WebPImagePlugin

from sightloop.data.video.container import Timeline, check_file
from sightloop.errors import ImageError
from sightloop.types import VideoInfo, VideoLimits

_HEAD_BYTES: Final = 30  # RIFF, its size, WEBP; VP8X, its size, flags and canvas
_ANIMATED: Final = 0x02  # flag of VP8X
_REPLACES: Final = 0x02  # flag of ANMF: not blended with what is below
_SHORTEST: Final = 10  # milliseconds; frames that are to last so long or less last _DEFAULT, as in browsers
_DEFAULT: Final = 100
_SAME_SECONDS: Final = 1e-6


def is_animated_webp(path: str) -> bool:
    """Whether a file begins as an animated WebP; False where it cannot be read."""
    if not os.path.isfile(path):  # to open a pipe would wait for what is written to it
        return False
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
    except (OSError, ValueError):
        return False
    is_extended = head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and len(head) == _HEAD_BYTES
    return is_extended and bool(head[20] & _ANIMATED)


class AnimatedWebp:
    """An open animated WebP, as `selection.OpenVideo`.

    Args:
        path: a regular file that `is_animated_webp`.
        limits: bounds; memory and processor time are up to the process.
        tick: called for each frame.

    Attributes:
        warnings: what could not be read.

    Raises:
        ImageError: it holds no frame, or is beyond the limits.
    """

    def __init__(self, path: str, limits: VideoLimits, tick: Callable[[], None] = lambda: None) -> None:
        self.path, self.limits, self.tick = path, limits, tick
        self.warnings: list[str] = []
        self._missing = 0
        check_file(path, limits)
        with open(path, "rb") as file:
            content = bytearray(file.read())
        self.width, self.height = (1 + int.from_bytes(content[at : at + 3], "little") for at in (24, 27))
        if self.width * self.height > limits.max_pixels:
            size = f"{self.width} x {self.height} pixels"
            raise ImageError(path, f"frames of {size}, over the limit of {limits.max_pixels}")
        self._keys: list[bool] = []
        self._ends: list[int] = []  # of the frames in the file
        self._timeline, self._milliseconds = Timeline(), 0  # which are added without rounding
        self._read_chunks(content)
        if not self._keys:
            raise ImageError(path, "no frame in it: its video is empty, or cut off before the first one")
        # Small files can hold endlessly many frames of a large canvas, and each one needs those before it.
        self._processor_end = process_time() + limits.max_seconds / 2
        image = self._open(content)
        if image is None:
            raise ImageError(path, "no frame of it decodes: it is damaged, or needs too much memory")
        self._image = image

    def _read_chunks(self, content: bytearray) -> None:
        """Times of the frames; a chunk that is not there whole is cut off, as the decoder takes none or all."""
        stated = 8 + int.from_bytes(content[4:8], "little")
        position, end = 12, min(len(content), stated)
        while position + 8 <= end and len(self._keys) < self.limits.max_frames:
            body = position + 8
            size = int.from_bytes(content[position + 4 : body], "little")
            if body + size > end:
                break
            if content.startswith(b"ANMF", position) and size >= 16:
                self._note_frame(content[body : body + 16])
                self._ends.append(body + size + size % 2)
            position = body + size + size % 2
        if position + 8 <= end and len(self._keys) >= self.limits.max_frames:
            self._warn_limit(len(self._keys))
        elif position < end or end < stated:
            self.warnings.append(f"cut short or damaged: it ends at {self._timeline.end:.1f} s")
        content[position:] = bytes(max(0, position - len(content)))

    def _open(self, content: bytearray) -> WebPImagePlugin.WebPImageFile | None:
        """The decoder with as many frames as it takes: of a damaged header of one it takes none of the file."""
        if image := _decoder(content):
            return image
        least, most = 0, len(self._ends) - 1  # frames: so many open, or none; more than so many do not
        while least < most:
            count = (least + most + 1) // 2
            if _decoder(content[: self._ends[count - 1]]):
                least = count
            else:
                most = count - 1
        if least:
            self._warn_damage(least)
            self._timeline = Timeline(
                self._timeline.times[:least],
                [time for time in self._timeline.keys if time < self._timeline.times[least]],
                self._timeline.times[least],
            )
            del self._keys[least:]
        return _decoder(content[: self._ends[least - 1]]) if least else None

    def _warn_damage(self, count: int) -> None:
        self.warnings.append(f"damaged: only the first {count:,} of its frames decode")

    def _warn_limit(self, count: int) -> None:
        text = f"only the first {count:,} of its frames were read: more are over the limits"
        if text not in self.warnings:
            self.warnings.append(text)

    def _note_frame(self, header: bytearray) -> None:
        left, top, width, height, duration = (
            int.from_bytes(header[at : at + 3], "little") for at in (0, 3, 6, 9, 12)
        )
        is_whole = (left, top, width + 1, height + 1) == (0, 0, self.width, self.height)
        is_key = not self._keys or (is_whole and bool(header[15] & _REPLACES))
        self._keys.append(is_key)
        self._timeline.times.append(self._milliseconds / 1000)
        if is_key:
            self._timeline.keys.append(self._milliseconds / 1000)
        self._milliseconds += duration if duration > _SHORTEST else _DEFAULT
        self._timeline.end = self._milliseconds / 1000

    def close(self) -> None:
        """Close the file."""
        self._image.close()

    def info(self) -> VideoInfo:
        """Its properties; decodes one frame.

        Raises:
            ImageError: no frame decodes.
        """
        if next(self.decode(), None) is None:
            raise ImageError(self.path, "no frame of it can be decoded")
        size, times = (self.height, self.width), self._timeline.times
        return VideoInfo(
            size=size,
            duration=self._timeline.end,
            rate=self.rate(self._timeline),
            frames=len(times),
            rotation=0,
            container="webp",
            codec="webp",
            has_audio=False,
        )

    def rate(self, timeline: Timeline) -> float:
        """Frames a second, on average."""
        return 1000 * len(timeline.times) / round(1000 * timeline.end)

    def display_width(self, width: int) -> int:
        """Width in square pixels, which all are."""
        return width

    def timeline(self, *, by_index: bool) -> Timeline:
        """Where the frames are; all are counted, whether they must be or not (`by_index`)."""
        return self._timeline

    def seek(self, time: float) -> None:
        """Nothing: `decode` begins at the first frame, without which none decodes."""

    def decode(self, *, keys_only: bool = False) -> Iterator[tuple[float, av.VideoFrame]]:
        """Frames from the first one on, with their times; of keys_only those that need no other."""
        for number, (time, is_key) in enumerate(zip(self._timeline.times, self._keys, strict=True)):
            self.tick()
            if number and process_time() > self._processor_end:
                self._warn_limit(number)
                return
            try:
                self._image.seek(number)
                self._image.load()
            except (EOFError, OSError):
                self._warn_damage(number)
                return
            if is_key or not keys_only:
                alpha = self._image.mode == "RGBA"
                pixels = np.asarray(self._image if alpha else self._image.convert("RGB"))
                yield time, av.VideoFrame.from_ndarray(pixels, format="rgba" if alpha else "rgb24")

    def frames_at(
        self, times: list[float], timeline: Timeline, *, keep: bool
    ) -> Iterator[tuple[float, av.VideoFrame]]:
        """The frame that is shown at each time, with the time at which it begins; as of `VideoFile`."""
        frames = self.decode()
        shown, following = None, next(frames, None)
        for time in times:
            while following is not None and following[0] <= time + _SAME_SECONDS:
                shown, following = following, next(frames, None)
            expected = timeline.times[max(0, bisect_right(timeline.times, time + _SAME_SECONDS) - 1)]
            if shown is not None and (keep or shown[0] == expected):
                yield shown
            else:
                self._missing += 1

    def final_warnings(self) -> list[str]:
        """`warnings`, and how many frames did not decode."""
        texts = list(self.warnings)
        if self._missing:
            texts.append(f"{self._missing} of the frames asked for did not decode and are missing")
        return texts


def _decoder(content: bytearray) -> WebPImagePlugin.WebPImageFile | None:
    """The decoder of a file, whose header is made to state its size; None where it takes none of it."""
    try:
        return WebPImagePlugin.WebPImageFile(
            io.BytesIO(content[:4] + (len(content) - 8).to_bytes(4, "little") + content[8:])
        )
    except (OSError, SyntaxError):
        return None
