"""Decoder processes of the parallel reader: how one is started, also before it is known what it will decode.

A process takes 0.15 s to start, as it imports NumPy and Pillow. `start_early` lets that pass while a model is loaded.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Final, NamedTuple

from sightloop.types import JsonDict

SHARED_BYTES: Final = 1 << 24  # of a decoded image in shared memory; larger ones are resized by the worker


class WorkerProcess(NamedTuple):
    """A process that waits for its settings, memory that it shares, and its descriptor of that, -1 without any."""

    process: subprocess.Popen[bytes]
    shared: mmap.mmap | None
    descriptor: int

    def end(self) -> None:
        """Kill the process, and wait for it."""
        self.process.kill()
        self.process.communicate()


_early: list[WorkerProcess] = []
_lock = threading.Lock()


def start_early() -> None:
    """Start the process that the next reader takes, where none waits already."""
    with _lock:
        if not _early:
            _early.append(_start())


def stop_early() -> None:
    """End the process that no reader has taken."""
    with _lock:
        while _early:
            _early.pop().end()


def start_worker(settings: JsonDict, *, share: bool) -> WorkerProcess:
    """A decoder process with its settings: the one that was started early, else a new one.

    Args:
        settings: "spec" and "limits", see `decode_worker`.
        share: whether decoded images are left in shared memory, where the system has it.
    """
    with _lock:
        worker = _early.pop() if _early else None
    if worker is not None and worker.process.poll() is not None:
        worker.end()
        worker = None
    worker = worker or _start()
    place = {"descriptor": worker.descriptor, "size": SHARED_BYTES if share else 0}
    line = json.dumps({**settings, "shared": place})
    assert worker.process.stdin is not None
    with suppress(OSError):  # it has ended, as its first answer will tell
        worker.process.stdin.write(line.encode() + b"\n")
        worker.process.stdin.flush()
    return worker if share else worker._replace(shared=None)


def _start() -> WorkerProcess:
    descriptor = _shared_memory()
    # The parent's import path without the working directory: a numpy.py among the images must not be imported.
    path = os.pathsep.join(item for item in sys.path if item)
    # One thread: the thread pools that numpy's BLAS reserves would count against the memory limit.
    environment = {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
    try:
        shared = None if descriptor < 0 else mmap.mmap(descriptor, SHARED_BYTES)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sightloop.data.images.decode_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            pass_fds=() if descriptor < 0 else (descriptor,),
        )
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return WorkerProcess(process, shared, descriptor)


def _shared_memory() -> int:
    """Descriptor of `SHARED_BYTES` of memory for a child, of which only what is used is taken; -1 without any."""
    with suppress(AttributeError, OSError):  # not Linux, or forbidden
        descriptor = os.memfd_create("sightloop")
        os.truncate(descriptor, SHARED_BYTES)
        return descriptor
    return -1
