"""Many images, decoded and resized beside the model: on threads, or in child processes that may die.

Threads are quickest and share the process. Isolation is for files of unknown origin: a decoder that crashes, hangs or
eats memory costs one image, not the run. Imports no torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice
from typing import IO, Final, Literal, cast

import numpy as np

from sightloop.data.images import decode, decode_worker, preprocess
from sightloop.errors import ImageError, UsageError
from sightloop.types import ImageSource, ImageSpec, Limits, Pixels

_NO_LIMITS: Final = Limits()
_OBITUARIES: Final = ("took longer than", "the decoder process did not start", "crashed the decoder")
_START_SECONDS: Final = 60.0  # for a child to come up on a busy machine; 0.15 s on an idle one
_PATIENCE: Final = 30.0  # seconds by the clock for one of the processor's, which the child counts
_OVERTIME: Final = -27  # exit status: SIGPROF


def read_images(
    sources: Iterable[ImageSource],
    spec: ImageSpec,
    *,
    mode: Literal["exact", "fast"] = "exact",
    limits: Limits = _NO_LIMITS,
    workers: int = 2,
    isolate: bool = False,
) -> Iterator[Pixels | ImageError]:
    """One result per source, in order: its pixels, or the error that says what is wrong with it.

    `sources` is read lazily, a few items (4 per worker) ahead of the results. Closing the iterator stops the workers.

    isolate=False: threads of this process; of `limits`, time and memory are not enforced.
    isolate=True: child processes decode paths and bytes. One that takes more than `limits.max_seconds` of the
    processor's time for an image (or thirty times as long by the clock) or dies is replaced, and that image becomes
    an ImageError; `limits.max_memory_bytes` caps each. Images that are already in memory (PIL images, arrays, Pixels)
    are prepared in this process. Children always resize in "exact" mode.

    Raises UsageError for wrong arguments, and whatever iterating `sources` raises.
    """
    if workers < 1:
        raise UsageError(f"workers={workers}: must be at least 1")
    if mode not in ("exact", "fast"):
        raise UsageError(f"mode={mode!r}: must be 'exact' or 'fast'")
    return _stream(
        sources, _Isolated(spec, mode, limits) if isolate else _InProcess(spec, mode, limits), workers
    )


def worker_died(error: ImageError) -> bool:
    """Whether a child ended at this image, or for want of memory might have: it may go better a second time."""
    return error.reason.startswith((*_OBITUARIES, "needs too much memory"))


def _stream(
    sources: Iterable[ImageSource], work: _InProcess | _Isolated, workers: int
) -> Generator[Pixels | ImageError]:
    pool = ThreadPoolExecutor(workers, thread_name_prefix="sightloop-reader")
    waiting: deque[Future[Pixels | ImageError]] = deque()
    try:
        upcoming = iter(sources)
        waiting.extend(pool.submit(work, source) for source in islice(upcoming, 4 * workers))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(work, source) for source in islice(upcoming, 1))
            yield result
    finally:
        for future in waiting:
            future.cancel()
        work.stop()
        pool.shutdown()
        work.bury()


class _InProcess:
    def __init__(self, spec: ImageSpec, mode: Literal["exact", "fast"], limits: Limits) -> None:
        self.spec = spec
        self.mode: Literal["exact", "fast"] = mode
        self.limits = limits

    def __call__(self, source: ImageSource) -> Pixels | ImageError:
        try:
            return preprocess.preprocess(source, self.spec, mode=self.mode, limits=self.limits)
        except ImageError as error:
            return error.with_traceback(None)

    def stop(self) -> None:
        """Nothing to stop: running decodes end by themselves."""

    def bury(self) -> None:
        """Nothing is left behind."""


class _Isolated:
    """Called on several threads; each has a child of its own, started when it first needs one."""

    def __init__(self, spec: ImageSpec, mode: Literal["exact", "fast"], limits: Limits) -> None:
        self._here = _InProcess(spec, mode, limits)
        settings = json.dumps({"spec": asdict(spec), "limits": asdict(limits)})
        self._start: Callable[[], _Child] = lambda: _Child(settings, limits.max_seconds)
        self._own = threading.local()
        self._lock = threading.Lock()
        self._children: set[_Child] = set()
        self._closed = False

    def __call__(self, source: ImageSource) -> Pixels | ImageError:
        if not isinstance(source, str | bytes | os.PathLike):
            return self._here(source)
        name = decode.name_of(source)
        kind, payload = (1, source) if isinstance(source, bytes) else (0, os.fsencode(os.fspath(source)))
        try:
            return self._child().ask(name, kind, payload)
        except ImageError as error:
            return error.with_traceback(None)

    def _child(self) -> _Child:
        child = cast("_Child | None", getattr(self._own, "child", None))
        if child is None or child.dead:
            with self._lock:
                if child is not None:
                    self._children.discard(child)
                if self._closed:
                    raise ImageError("<closed>", "the reader was closed")
                child = self._start()
                self._children.add(child)
            self._own.child = child
        return child

    def stop(self) -> None:
        """Kills the children; calls in progress end with an error that nobody sees."""
        with self._lock:
            self._closed = True
            for child in self._children:
                child.stop()

    def bury(self) -> None:
        """After `stop`, when no thread uses a child any more: leaves no zombie and no open pipe."""
        for child in self._children:
            child.bury()


class _Child:
    """One decoder process, asked for one image at a time."""

    def __init__(self, settings: str, seconds: float) -> None:
        self._seconds = seconds
        self.dead = False
        self._late = False
        # The parent's import path, but not the working directory: nobody's numpy.py lying among images is run.
        path = os.pathsep.join(item for item in sys.path if item)
        # One thread: the pools that numpy's BLAS reserves would count against the memory cap.
        environment = {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sightloop.data.images.decode_worker", settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        self._ready = False

    def ask(self, name: str, kind: int, payload: bytes) -> Pixels | ImageError:
        """The child's answer; whatever goes wrong with the child is this image's error."""
        to_child, from_child = cast("IO[bytes]", self._process.stdin), cast("IO[bytes]", self._process.stdout)
        try:
            if not self._ready:
                with self._within(_START_SECONDS):
                    self._read(from_child, 1)
                self._ready = True
            with self._within(_START_SECONDS + self._seconds):
                to_child.write(decode_worker.REQUEST.pack(kind, len(payload)))
                to_child.write(payload)
                to_child.flush()
                self._read(from_child, 1)
            with self._within(_PATIENCE * self._seconds):
                head = self._read(from_child, decode_worker.RESPONSE.size)
                status, height, width, *size, length = decode_worker.RESPONSE.unpack(head)
                body = self._read(from_child, length)
        except (OSError, EOFError):
            return ImageError(name, self._obituary())
        if status:
            return ImageError(name, body.decode("utf-8"))
        values = np.frombuffer(body, np.uint8).reshape(3, height, width)
        return Pixels(name, values, (size[0], size[1]))

    def stop(self) -> None:
        """Kills the process; safe from any thread, and twice."""
        self.dead = True
        self._process.kill()

    def bury(self) -> int:
        """Ends the process and closes its pipes; its exit status."""
        self.stop()
        code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                _close_quietly(pipe)
        return code

    def _obituary(self) -> str:
        code = self.bury()
        if self._late or code == _OVERTIME:
            return f"{_OBITUARIES[0]} the limit of {self._seconds:g} s"
        return f"{_OBITUARIES[2 if self._ready else 1]} (exit status {code})"

    def _within(self, seconds: float) -> _Alarm:
        return _Alarm(seconds, self._too_late)

    def _too_late(self) -> None:
        self._late = True
        self.stop()

    @staticmethod
    def _read(pipe: IO[bytes], length: int) -> bytearray:
        data = bytearray(length)
        view = memoryview(data)
        while view:
            count = cast("int | None", pipe.readinto(view))  # pyright: ignore[reportAttributeAccessIssue]
            if not count:
                raise EOFError
            view = view[count:]
        return data


class _Alarm:
    """Calls `action` on another thread if the block takes longer than `seconds`."""

    def __init__(self, seconds: float, action: Callable[[], None]) -> None:
        self._timer = threading.Timer(seconds, action)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def _close_quietly(pipe: IO[bytes]) -> None:
    try:
        pipe.close()
    except OSError:  # unsent bytes for a child that is gone
        return
