"""Worker process that decodes videos, run as `python -m sightloop.data.video.decode_worker`.

A request is a line of JSON, the fields of `VideoRequest`. The answer is messages, each a header of `MESSAGE` and its
body:

    ALIVE    nothing yet, still decoding
    FRAME    time, H, W; body: uint8 [H, W, 3]
    RESULT   body: JSON, of "info" and "scenes"
    WARNING  body: what could not be read, in one line
    FAILED   body: why, in one line; ends the answer
    END      ends the answer

Nothing from the pipe is unpickled or executed. A video that spins, crashes or needs too much memory costs this process
and not its parent.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import BinaryIO, Final

import av.logging
import numpy as np
from av.video.reformatter import VideoReformatter

from sightloop.data.images.reader import limit_memory, open_pipes
from sightloop.data.video.container import VideoFile
from sightloop.data.video.conversion import to_rgb
from sightloop.data.video.cuts import scene_parts
from sightloop.data.video.messages import ALIVE, END, FAILED, FRAME, MESSAGE, RESULT, WARNING, VideoRequest
from sightloop.data.video.selection import OpenVideo, select_frames
from sightloop.data.video.webp import AnimatedWebp, is_animated_webp
from sightloop.errors import ImageError
from sightloop.types import VideoLimits

_ALIVE_SECONDS: Final = 0.5


class _Channel:
    """Pipe to the parent, with the clock of the request."""

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self._sent = 0.0
        self._end = 0.0
        self._seconds = 0.0

    def begin(self, limits: VideoLimits) -> None:
        """Start the budgets of processor time."""
        self._seconds, self._end = limits.max_seconds, time.process_time() + limits.max_total_seconds
        self.tick()

    def tick(self) -> None:
        """Progress: the budget of processor time starts anew, and the parent hears of it now and then."""
        left = self._end - time.process_time()
        if left <= 0:
            raise ImageError("", "took longer than the limit of processor time for one video")
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_PROF, min(self._seconds, left))
        if time.monotonic() - self._sent > _ALIVE_SECONDS:
            self.send(ALIVE)

    def send(
        self, kind: int, body: bytes | memoryview = b"", at: float = 0.0, size: tuple[int, int] = (0, 0)
    ) -> None:
        """One message."""
        self._pipe.write(MESSAGE.pack(kind, at, *size, len(body)))
        self._pipe.write(body)
        self._pipe.flush()
        self._sent = time.monotonic()


def main() -> None:
    """Serve requests until the pipe is closed."""
    requests, answers = open_pipes()
    av.logging.set_level(None)
    channel = _Channel(answers)
    while line := requests.readline():
        request = VideoRequest.parse(line)
        limit_memory(request.limits.max_memory_bytes)
        _answer(request, channel)
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_PROF, 0)


def _answer(request: VideoRequest, channel: _Channel) -> None:
    try:
        channel.begin(request.limits)
        _serve(request, channel)
        channel.send(END)
    except ImageError as error:
        channel.send(FAILED, error.reason.encode("utf-8", "backslashreplace"))
    except MemoryError:
        channel.send(FAILED, b"needs too much memory")
    except Exception as error:  # a decoder raises nearly anything on hostile bytes
        text = f"cannot be decoded: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        channel.send(FAILED, text.encode("utf-8", "backslashreplace"))


def _serve(request: VideoRequest, channel: _Channel) -> None:
    opened = AnimatedWebp if is_animated_webp(request.path) else VideoFile
    file = opened(request.path, request.limits, channel.tick)
    try:
        serve: dict[str, Callable[[OpenVideo, VideoRequest, _Channel], None]] = {
            "info": _serve_info,
            "frames": _serve_frames,
            "scenes": _serve_scenes,
        }
        serve[request.want](file, request, channel)
        for text in file.final_warnings():
            channel.send(WARNING, text.encode("utf-8", "backslashreplace"))
    finally:
        file.close()


def _serve_info(file: OpenVideo, request: VideoRequest, channel: _Channel) -> None:
    channel.send(RESULT, json.dumps(asdict(file.info())).encode())


def _serve_frames(file: OpenVideo, request: VideoRequest, channel: _Channel) -> None:
    reformatter, last, pixels = VideoReformatter(), None, np.empty((0, 0, 3), np.uint8)
    count = 0
    for at, frame in select_frames(file, request.start, request.end, request.sampling):
        if frame is not last:  # a frame that is asked for twice
            pixels = to_rgb(frame, file.display_width(frame.width), request.side, reformatter)
            last = frame
        channel.send(FRAME, pixels.data.cast("B"), at, (pixels.shape[0], pixels.shape[1]))
        channel.tick()
        count += 1
    if not count:
        raise ImageError(request.path, "; ".join(["no frame of it can be decoded", *file.final_warnings()]))


def _serve_scenes(file: OpenVideo, request: VideoRequest, channel: _Channel) -> None:
    parts = scene_parts(file, request.start, request.end, keys_only=request.sampling.kind == "keyframes")
    channel.send(RESULT, json.dumps(parts).encode())


if __name__ == "__main__":
    main()
