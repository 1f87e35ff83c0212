"""Reader of videos: properties, frames and scenes, decoded by a child process that a hostile file may take down.

    info = video_info("clip.mp4")
    for frame in read_frames("clip.mp4", uniform(8)):
        frame.time, frame.pixels  # seconds, uint8 [H, W, 3]
    find_scenes(Video("clip.mp4", start=10, end=60))

Child processes serve one request after another; up to two that are idle wait for the next. Needs the extra "video"
(PyAV). Sound is never read.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import math
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import IO, Final, Literal

import numpy as np

from sightloop.data.video.messages import ALIVE, END, FAILED, FRAME, MESSAGE, RESULT, WARNING, VideoRequest
from sightloop.data.video.sampling import Sampling, keyframes
from sightloop.errors import ImageError, UnsupportedError, UsageError, install_command
from sightloop.types import JsonDict, Video, VideoFrame, VideoInfo, VideoLimits, VideoScene

VideoInput = str | os.PathLike[str] | Video
Warn = Callable[[str], None]

_DEFAULT_LIMITS: Final = VideoLimits()
_WALL_CLOCK_FACTOR: Final = 30.0  # wall-clock seconds without a sign of life per second of processor time
_START_SECONDS: Final = 60.0
_WATCH_SECONDS: Final = 0.5
_DYING_SECONDS: Final = 5.0
_IDLE_WORKERS: Final = 2
_SIGPROF_STATUS: Final = -27
_EVERY_FRAME: Final = Sampling("interval", seconds=1.0)


def check_installed() -> None:
    """Check that this machine can read videos, before the model that they are for is loaded.

    Raises:
        UnsupportedError: PyAV is not installed.
    """
    if importlib.util.find_spec("av") is None:
        raise UnsupportedError(f"videos need one more package, PyAV: {install_command('video')}")


def video_info(
    video: VideoInput, *, limits: VideoLimits = _DEFAULT_LIMITS, warn: Warn | None = None
) -> VideoInfo:
    """Size, duration, rate, rotation and codec of a video; decodes its first frame.

    Args:
        video: a file; the part of a `Video` is ignored.
        limits: bounds.
        warn: called with what could not be read, in one line that names the file; by default `warnings.warn`.

    Raises:
        ImageError: it is no video, nothing of it decodes, or it is beyond the limits; the message names the file.
        UnsupportedError: PyAV is not installed.
    """
    fields = _result(_request("info", as_video(video), _EVERY_FRAME, None, limits), warn)
    fields["size"] = tuple(fields["size"])
    return VideoInfo(**fields)


def read_frames(
    video: VideoInput,
    sampling: Sampling,
    *,
    side: int | None = None,
    limits: VideoLimits = _DEFAULT_LIMITS,
    warn: Warn | None = None,
) -> Iterator[VideoFrame]:
    """Frames of a video, upright, RGB `[H, W, 3]` each, in order of time.

    Args:
        video: a file, or a part of one.
        sampling: which frames; see `sightloop.data.video.sampling`.
        side: shorter side in pixels that suffices; larger frames are reduced to it, by area averaging.
        limits: bounds.
        warn: as in `video_info`.

    Raises:
        ImageError: as in `video_info`; also while iterating.
        UnsupportedError: PyAV is not installed.
    """
    request = _request("frames", as_video(video), sampling, side, limits)
    return (item for item in _answers(request, warn) if isinstance(item, VideoFrame))


def find_scenes(
    video: VideoInput,
    *,
    keyframes_only: bool = False,
    limits: VideoLimits = _DEFAULT_LIMITS,
    warn: Warn | None = None,
) -> list[VideoScene]:
    """Scenes of a video, without gaps: what is between two cuts. A video without cuts is one scene.

    Args:
        video: a file, or a part of one.
        keyframes_only: look at keyframes alone, many times faster: encoders begin most scenes with one.
        limits: bounds.
        warn: as in `video_info`.

    Raises:
        ImageError: as in `video_info`.
    """
    sampling = keyframes() if keyframes_only else _EVERY_FRAME
    parts = _result(_request("scenes", as_video(video), sampling, None, limits), warn)["parts"]
    return [VideoScene(start, end) for start, end in parts]


def as_video(video: VideoInput) -> Video:
    """A path as a whole video.

    Raises:
        UsageError: a part that ends before it begins.
    """
    if not isinstance(video, Video):
        return Video(video)
    start, end = 0.0 if video.start is None else video.start, math.inf if video.end is None else video.end
    if not 0 <= start < end:
        raise UsageError(
            f"start={video.start}, end={video.end}: must be seconds, 0 or more, and start below end"
        )
    return video


def _request(
    want: Literal["info", "frames", "scenes"],
    video: Video,
    sampling: Sampling,
    side: int | None,
    limits: VideoLimits,
) -> VideoRequest:
    check_installed()
    if side is not None and side < 1:
        raise UsageError(f"side={side}: must be at least 1")
    return VideoRequest(want, os.fspath(video.path), video.start, video.end, sampling, side, limits)


def _result(request: VideoRequest, warn: Warn | None) -> JsonDict:
    results = [item for item in _answers(request, warn) if isinstance(item, dict)]
    return results[0]


def _answers(request: VideoRequest, warn: Warn | None) -> Iterator[VideoFrame | JsonDict]:
    """What a child process answers. One that is left in the middle of an answer is ended."""
    worker, complete = _take(), False
    try:
        worker.ask(request)
        while True:
            kind, at, height, width, body = worker.receive(request)
            if kind == FRAME:
                yield VideoFrame(at, np.frombuffer(body, np.uint8).reshape(height, width, 3))
            elif kind == RESULT:
                yield json.loads(body)
            elif kind == WARNING:
                _say(f"{request.path}: {body.decode('utf-8')}", warn)
            elif kind == FAILED:
                complete = True
                raise ImageError(request.path, body.decode("utf-8"))
            elif kind == END:
                complete = True
                return
    finally:
        _give_back(worker, complete)


def _say(text: str, warn: Warn | None) -> None:
    if warn is None:
        warnings.warn(text, stacklevel=2)
    else:
        warn(text)


class _VideoWorker:
    """A child process that decodes videos, one request at a time."""

    def __init__(self) -> None:
        # The parent's import path without the working directory: a numpy.py among the videos must not be imported.
        path = os.pathsep.join(item for item in sys.path if item)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sightloop.data.video.decode_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
        )
        self._deadline = math.inf
        self._timed_out = False
        self._answered = False
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="sightloop-video-watchdog", daemon=True).start()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: VideoRequest) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended, as its first answer will tell
            self._process.stdin.write(request.line())
            self._process.stdin.flush()

    def receive(self, request: VideoRequest) -> tuple[int, float, int, int, bytearray]:
        """Kind, time, height, width and body of the next message that is more than a sign of life."""
        pipe = self._process.stdout
        assert pipe is not None
        seconds = request.limits.max_seconds
        while True:
            start = 0.0 if self._answered else _START_SECONDS
            self._deadline = time.monotonic() + start + _WALL_CLOCK_FACTOR * seconds
            try:
                kind, at, height, width, length = MESSAGE.unpack(_read_exactly(pipe, MESSAGE.size))
                body = _read_exactly(pipe, length)
            except (OSError, EOFError):
                raise ImageError(request.path, self._failure_reason(seconds)) from None
            finally:
                self._deadline = math.inf
            self._answered = True
            if kind != ALIVE:
                return kind, at, height, width, body

    def _failure_reason(self, seconds: float) -> str:
        status = self.close(dying=True)
        if self._timed_out or status == _SIGPROF_STATUS:
            return f"took longer than the limit of processor time ({seconds:g} s a frame)"
        if not self._answered:
            return f"the decoder process did not start (exit status {status})"
        return f"crashed the decoder (exit status {status})"

    def _watch(self) -> None:
        """End the process when it is past its deadline."""
        while not self._closed.wait(_WATCH_SECONDS):
            if time.monotonic() > self._deadline:
                self._timed_out = True
                self._process.kill()

    def close(self, *, dying: bool = False) -> int:
        """End the process; returns its exit status.

        Args:
            dying: whether it ends by itself just now, and its status tells why.
        """
        self._closed.set()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_DYING_SECONDS if dying else 0)
        self._process.kill()
        status = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        return status


_idle: list[_VideoWorker] = []
_lock = threading.Lock()


def _take() -> _VideoWorker:
    with _lock:
        while _idle:
            worker = _idle.pop()
            if worker.is_alive:
                return worker
            worker.close()
    return _VideoWorker()


def _give_back(worker: _VideoWorker, complete: bool) -> None:
    with _lock:
        if complete and worker.is_alive and len(_idle) < _IDLE_WORKERS:
            _idle.append(worker)
            return
    worker.close()


@atexit.register
def stop_workers() -> None:
    """End the child processes that wait for a request."""
    with _lock:
        workers, _idle[:] = list(_idle), []
    for worker in workers:
        worker.close()


def _read_exactly(pipe: IO[bytes], length: int) -> bytearray:
    """`length` bytes from a pipe, without copies. Raises EOFError where it ends before."""
    body = bytearray(length)
    view = memoryview(body)
    while view:
        count = pipe.readinto(view)  # pyright: ignore[reportAttributeAccessIssue]
        if not count:
            raise EOFError
        view = view[count:]
    return body
