"""Parallel image reader: decodes and resizes beside the model, on threads or in isolated worker processes.

Threads are fastest. Worker processes are for files of unknown origin: a decoder that crashes, hangs or exhausts memory
costs one image, not the run. Where torch is imported they only decode, and the threads of this process resize what they
leave in shared memory, to the same bits in half of the time. Imports no torch itself.
"""

from __future__ import annotations

import io
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain, islice
from typing import IO, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sightloop.data.images import decode, decode_worker, preprocess
from sightloop.data.images.batch_size import BatchSize as BatchSize
from sightloop.data.images.batch_size import BatchSizer as BatchSizer
from sightloop.data.images.batch_size import Memory as Memory
from sightloop.data.images.batch_size import ProcessMemory as ProcessMemory
from sightloop.data.images.decode_worker import limit_memory as limit_memory
from sightloop.data.images.decode_worker import open_pipes as open_pipes
from sightloop.data.images.worker_process import SHARED_BYTES, start_worker
from sightloop.data.images.worker_process import start_early as start_early
from sightloop.data.images.worker_process import stop_early as stop_early
from sightloop.errors import ImageError, UsageError
from sightloop.types import ImageSource, ImageSpec, JsonDict, Limits, Pixels

_TIMED_OUT: Final = "took longer than"
_NOT_STARTED: Final = "the decoder process did not start"
_CRASHED: Final = "crashed the decoder"
_START_SECONDS: Final = 60.0  # wall-clock time for a worker to start on a busy machine; 0.15 s on an idle one
_WALL_CLOCK_FACTOR: Final = 30.0  # wall-clock seconds allowed per second of CPU time, which the worker counts
_SIGPROF_STATUS: Final = -27  # exit status of a worker that used up its CPU time
_WATCH_SECONDS: Final = 0.2  # between two looks at the clock
_AHEAD_BYTES: Final = 1 << 28  # of results that wait
_FEW: Final = 2  # images that one process has decoded before a second one has started


def read_images(
    sources: Iterable[ImageSource],
    spec: ImageSpec,
    *,
    mode: Literal["exact", "fast"] = "exact",
    limits: Limits = decode.DEFAULT_LIMITS,
    workers: int = 2,
    isolate: bool = False,
    ahead: int = 0,
) -> Iterator[Pixels | ImageError]:
    """Read and preprocess images in parallel; one result per source, in order.

    Args:
        sources: Iterated lazily, up to `ahead` items ahead of the results.
        spec: Preprocessing.
        mode: As in `preprocess`. Worker processes that resize do so in "exact" mode.
        limits: Limits of one image. Time and memory are enforced in worker processes only.
        workers: Number of threads, each with its own process where `isolate` is set.
        isolate: Decode paths and bytes in worker processes. A process that uses more than `limits.max_seconds` of CPU
            time for an image (or 30 times that on the wall clock) or crashes is replaced, and the image becomes an
            ImageError. `limits.max_memory_bytes` is per process. PIL images, arrays and Pixels are preprocessed in
            this process.
        ahead: Results that are made ready while the caller works on earlier ones, at least 4 per worker: those of one
            batch, so that the next is complete when a model has done one. No more than 256 MB of them.

    Yields:
        Pixels, or the ImageError of this image. Closing the iterator stops the workers.

    Raises:
        UsageError: A wrong argument. Exceptions of iterating `sources` pass through.
    """
    if workers < 1:
        raise UsageError(f"workers={workers}: must be at least 1")
    if mode not in ("exact", "fast"):
        raise UsageError(f"mode={mode!r}: must be 'exact' or 'fast'")
    backend = _ProcessBackend(spec, mode, limits) if isolate else _ThreadBackend(spec, mode, limits)
    return _stream(
        sources, backend, workers, max(4 * workers, min(ahead, _AHEAD_BYTES // _result_bytes(spec)))
    )


def _result_bytes(spec: ImageSpec) -> int:
    """Bytes of an image that is preprocessed; where its size is not fixed, as many as may be."""
    side = spec.crop or spec.resize
    if spec.patches is not None:
        return 3 * spec.patches[0] ** 2 * spec.patches[1]
    if side is None:
        return _AHEAD_BYTES
    whole = 3 * side[0] * side[1]
    return whole * (1 + max((math.prod(grid) // math.prod(side) for grid in spec.tiles), default=0))


def is_retryable(error: ImageError) -> bool:
    """Whether a second attempt may succeed: the worker was killed, timed out or ran out of memory at this image."""
    return error.reason.startswith((_TIMED_OUT, _NOT_STARTED, _CRASHED, decode.OUT_OF_MEMORY))


class ImagePool:
    """Decoder of single images on request, in worker processes that stay for the next ones.

    Args:
        spec: Preprocessing.
        limits: Limits of one image.
        workers: Number of processes; each starts when it is first needed.
    """

    def __init__(self, spec: ImageSpec, *, limits: Limits = decode.DEFAULT_LIMITS, workers: int = 2) -> None:
        if workers < 1:
            raise UsageError(f"workers={workers}: must be at least 1")
        self._backend = _ProcessBackend(spec, "exact", limits)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="sightloop-decoder")

    def submit(self, source: ImageSource) -> Future[Pixels | ImageError]:
        """The pixels of an image, or why it cannot be read, when they are there; first come, first served."""
        return self._threads.submit(self._backend, source)

    def close(self) -> None:
        """Ends the processes; what waits is cancelled."""
        self._backend.stop()
        self._threads.shutdown(cancel_futures=True)
        self._backend.close()


class _Backend(Protocol):
    """Reads one image per call, on several threads at once."""

    def __call__(self, source: ImageSource) -> Pixels | ImageError: ...

    def stop(self) -> None:
        """Make calls in progress end soon."""

    def close(self) -> None:
        """Release resources, after the last call has ended."""


def _stream(
    sources: Iterable[ImageSource], backend: _Backend, workers: int, ahead: int
) -> Generator[Pixels | ImageError]:
    upcoming = iter(sources)
    if isinstance(backend, _ProcessBackend):
        first = list(islice(upcoming, _FEW + 1))
        workers = 1 if len(first) <= _FEW else workers
        upcoming = chain(first, upcoming)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="sightloop-reader")
    pending: deque[Future[Pixels | ImageError]] = deque()
    try:
        pending.extend(pool.submit(backend, source) for source in islice(upcoming, ahead))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(backend, source) for source in islice(upcoming, 1))
            yield result
    finally:
        for future in pending:
            future.cancel()
        backend.stop()
        pool.shutdown()
        backend.close()


class _ThreadState(threading.local):
    worker: _Worker | None = None
    alone = False


_thread_state = _ThreadState()


def _use_one_thread() -> None:
    """Keep torch, once it is imported, from a team of threads for each reader: the model needs the cores.

    `set_num_threads` is of the calling thread, but also what threads that come later begin with: another thread sets
    that back.
    """
    if _thread_state.alone or "torch" not in sys.modules:
        return
    import torch

    count = torch.get_num_threads()
    torch.set_num_threads(1)
    restore = threading.Thread(target=torch.set_num_threads, args=(count,))
    restore.start()
    restore.join()
    _thread_state.alone = True


class _ThreadBackend:
    def __init__(self, spec: ImageSpec, mode: Literal["exact", "fast"], limits: Limits) -> None:
        self.spec = spec
        self.mode: Literal["exact", "fast"] = mode
        self.limits = limits

    def __call__(self, source: ImageSource) -> Pixels | ImageError:
        _use_one_thread()
        try:
            return preprocess.preprocess(source, self.spec, mode=self.mode, limits=self.limits)
        except ImageError as error:
            return error.with_traceback(None)

    def stop(self) -> None:
        """A decode in progress cannot be stopped; it ends by itself."""

    def close(self) -> None:
        """No resources."""


class _ProcessBackend:
    """One worker process per calling thread, started when the thread needs it."""

    def __init__(self, spec: ImageSpec, mode: Literal["exact", "fast"], limits: Limits) -> None:
        self._in_process = _ThreadBackend(spec, mode, limits)
        settings: JsonDict = {"spec": asdict(spec), "limits": asdict(limits)}
        self._start_worker: Callable[[], _Worker] = lambda: _Worker(
            settings, limits.max_seconds, share=preprocess.resizes_packed(spec)
        )
        self._thread_state = _ThreadState()
        self._lock = threading.Lock()
        self._workers: set[_Worker] = set()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="sightloop-watchdog", daemon=True).start()

    def __call__(self, source: ImageSource) -> Pixels | ImageError:
        if not isinstance(source, str | bytes | os.PathLike):
            return self._in_process(source)
        name = decode.source_name(source)
        kind, payload = (1, source) if isinstance(source, bytes) else (0, os.fsencode(os.fspath(source)))
        _use_one_thread()
        try:
            decoded = self._worker().request(name, kind, payload)
            if isinstance(decoded, np.ndarray):
                near = self._in_process
                return preprocess.preprocess_packed(name, decoded, near.spec, near.mode, near.limits)
            return decoded
        except ImageError as error:
            return error.with_traceback(None)

    def _worker(self) -> _Worker:
        """The running worker of this thread."""
        worker = self._thread_state.worker
        if worker is None or worker.stopped:
            with self._lock:
                if worker is not None:
                    self._workers.discard(worker)
                if self._closed.is_set():
                    raise ImageError("<closed>", "the reader was closed")
                worker = self._start_worker()
                self._workers.add(worker)
            self._thread_state.worker = worker
        return worker

    def _watch(self) -> None:
        """Stop workers that are past their deadline, until the backend is closed."""
        while not self._closed.wait(_WATCH_SECONDS):
            with self._lock:
                workers = list(self._workers)
            for worker in workers:
                worker.stop_if_late()

    def stop(self) -> None:
        """Kill the workers; calls in progress return an error, which `_stream` drops."""
        with self._lock:
            self._closed.set()
            for worker in self._workers:
                worker.stop()

    def close(self) -> None:
        """Wait for the workers and close their pipes."""
        for worker in self._workers:
            worker.close()


class _Worker:
    """A decoder process that serves one request at a time."""

    def __init__(self, settings: JsonDict, seconds: float, share: bool = False) -> None:
        self._seconds = seconds
        self.stopped = False
        self._timed_out = False
        self._deadline = math.inf
        self._process, self._shared, _ = start_worker(settings, share=share)
        self._ready = False

    def request(self, name: str, kind: int, payload: bytes) -> Pixels | NDArray[np.uint8] | ImageError:
        """Decode one image; a failure of the worker is returned as this image's error.

        An array is the decoded image, uint8 `[H, W, 4]` in shared memory, valid until the next request.

        Args:
            name: Name of the image in messages.
            kind: 0 for a path, 1 for encoded bytes.
            payload: The path or the bytes.
        """
        requests, responses = self._process.stdin, self._process.stdout
        assert requests is not None
        assert responses is not None
        try:
            if not self._ready:
                with self._time_limit(_START_SECONDS):
                    _read_exactly(responses, 1)
                self._ready = True
            with self._time_limit(_START_SECONDS + self._seconds):
                requests.write(decode_worker.REQUEST.pack(kind, len(payload)))
                requests.write(payload)
                requests.flush()
                _read_exactly(responses, 1)
            with self._time_limit(_WALL_CLOCK_FACTOR * self._seconds):
                head = _read_exactly(responses, decode_worker.RESPONSE.size)
                status, height, width, *size, length = decode_worker.RESPONSE.unpack(head)
                body = _read_exactly(responses, length)
        except (OSError, EOFError):
            return ImageError(name, self._failure_reason())
        if status == decode_worker.FAILED:
            return ImageError(name, body.decode("utf-8"))
        if (
            status == decode_worker.SHARED
            and self._shared is not None
            and 0 < height * width * 4 <= SHARED_BYTES
        ):
            return np.frombuffer(self._shared, np.uint8, height * width * 4).reshape(height, width, 4)
        values = np.frombuffer(body, np.uint8).reshape(3, height, width)
        return Pixels(name, values, (size[0], size[1]))

    def stop(self) -> None:
        """Kill the process; safe from any thread, and twice."""
        self.stopped = True
        self._process.kill()

    def close(self) -> int:
        """Kill the process, wait for it and close its pipes; returns the exit status."""
        self.stop()
        status = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                _close_pipe(pipe)
        return status

    def _failure_reason(self) -> str:
        status = self.close()
        if self._timed_out or status == _SIGPROF_STATUS:
            return f"{_TIMED_OUT} the limit of {self._seconds:g} s"
        return f"{_CRASHED if self._ready else _NOT_STARTED} (exit status {status})"

    @contextmanager
    def _time_limit(self, seconds: float) -> Generator[None]:
        self._deadline = time.monotonic() + seconds
        try:
            yield
        finally:
            self._deadline = math.inf

    def stop_if_late(self) -> None:
        """Kill the process if it has not answered in time."""
        if time.monotonic() > self._deadline:
            self._timed_out = True
            self.stop()


def _read_exactly(pipe: IO[bytes], length: int) -> bytearray:
    """`length` bytes from a pipe, without copies. Raises EOFError where it ends before."""
    assert isinstance(pipe, io.BufferedReader)
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = pipe.readinto(view)
        if not count:
            raise EOFError
        view = view[count:]
    return data


def _close_pipe(pipe: IO[bytes]) -> None:
    try:
        pipe.close()
    except OSError:  # unsent bytes for a worker that has ended
        return
