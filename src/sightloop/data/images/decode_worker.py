"""Worker process that decodes images, run as `python -m sightloop.data.images.decode_worker SETTINGS`.

SETTINGS is JSON: the fields of an ImageSpec under "spec" and of Limits under "limits". Messages on the pipes,
big-endian:

    request   kind (1 byte: 0 path, 1 encoded bytes), length (8), payload
    started   1 byte: a request was received and work begins; one more is sent when the worker is ready for the first
    response  status (1 byte: 0 pixels, 1 error), H, W, original height and width (4 each), length (8), payload

Nothing from the pipe is unpickled or executed, and torch is not imported: a worker starts in about 0.15 s.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import struct
import sys
from typing import BinaryIO

import numpy as np

from sightloop.data.images import decode, preprocess
from sightloop.errors import ImageError
from sightloop.types import ImageSpec, JsonDict, Limits

REQUEST = struct.Struct(">BQ")
RESPONSE = struct.Struct(">BIIIIQ")
STARTED = b"\x06"


def main() -> None:
    """Serve requests until the pipe is closed."""
    settings: dict[str, JsonDict] = json.loads(sys.argv[1])
    limits = Limits(**settings["limits"])
    fields: JsonDict = {key: tuple(v) if isinstance(v, list) else v for key, v in settings["spec"].items()}
    spec = ImageSpec(**fields)
    # The pipes move to new descriptors, so that a C library that prints to 1 does not write between the messages.
    requests, responses = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    devnull = os.open(os.devnull, os.O_RDWR)
    os.dup2(devnull, 0)
    os.dup2(devnull, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    _exit_with_parent()
    _limit_memory(limits.max_memory_bytes)
    _send(responses, STARTED)
    while (head := requests.read(REQUEST.size)) and len(head) == REQUEST.size:
        kind, length = REQUEST.unpack(head)
        payload = requests.read(length)
        if len(payload) < length:
            break
        _send(responses, STARTED)
        _limit_cpu_time(limits.max_seconds)
        _send(responses, *_response(payload if kind else os.fsdecode(payload), spec, limits))


def _response(source: str | bytes, spec: ImageSpec, limits: Limits) -> tuple[bytes, bytes]:
    """Header and payload of the response for one image."""
    try:
        pixels = preprocess.preprocess(source, spec, limits=limits)
    except ImageError as error:
        reason = error.reason
    except MemoryError:
        reason = decode.OUT_OF_MEMORY
    else:
        _, height, width = pixels.values.shape
        body = np.ascontiguousarray(pixels.values).tobytes()
        return RESPONSE.pack(0, height, width, *pixels.size, len(body)), body
    body = reason.encode("utf-8", "backslashreplace")
    return RESPONSE.pack(1, 0, 0, 0, 0, len(body)), body


def _send(responses: BinaryIO, *parts: bytes) -> None:
    for part in parts:
        responses.write(part)
    responses.flush()


def _limit_cpu_time(seconds: float) -> None:
    """Restart the budget of CPU time, after which SIGPROF ends the process; not on Windows.

    CPU time, because wall-clock time would count the work of other processes.
    """
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _exit_with_parent() -> None:
    """On Linux, end the process when the parent ends, even during a decode; elsewhere the closed pipe ends it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _limit_memory(budget: int) -> None:
    """Limit address space to `budget` bytes more than now (Linux), and disable core files (not on Windows)."""
    if sys.platform == "win32":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux":  # others reject a limit of address space, or count shared libraries in it
        return
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + budget
    resource.setrlimit(
        resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )


if __name__ == "__main__":
    main()
