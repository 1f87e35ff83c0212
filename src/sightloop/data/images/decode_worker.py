"""Worker process that decodes images, run as `python -m sightloop.data.images.decode_worker`.

The first line of its input is JSON: the fields of an ImageSpec under "spec" and of Limits under "limits"; under
"shared" the "descriptor" and "size" of memory for decoded images that the parent resizes (-1 or 0: none). Messages on
the pipes follow, big-endian:

    request   kind (1 byte: 0 path, 1 encoded bytes), length (8), payload
    started   1 byte: a request was received and work begins; one more is sent when the worker is ready for the first
    response  status (1 byte), H, W, original height and width (4 each), length (8), payload
              0: pixels [3, H, W]; 1: an error; 2: nothing, the decoded image [H, W, 4] is in the shared memory

Nothing from the pipe is unpickled or executed, and torch is not imported: a worker starts in about 0.15 s.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import struct
import sys
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from sightloop.data.images import decode, preprocess
from sightloop.errors import ImageError
from sightloop.types import ImageSpec, JsonDict, Limits

REQUEST = struct.Struct(">BQ")
RESPONSE = struct.Struct(">BIIIIQ")
STARTED = b"\x06"
FAILED, SHARED = 1, 2


def main() -> None:
    """Serve requests until the pipe is closed."""
    requests, responses = open_pipes()
    if not (line := requests.readline()):
        return  # no image came
    settings: dict[str, JsonDict] = json.loads(line)
    limits = Limits(**settings["limits"])
    fields: JsonDict = {key: tuple(v) if isinstance(v, list) else v for key, v in settings["spec"].items()}
    spec = ImageSpec(**fields)
    place = settings.get("shared", {"descriptor": -1, "size": 0})
    shared = _open_shared(int(place["descriptor"]), int(place["size"]))
    limit_memory(limits.max_memory_bytes)
    _send(responses, STARTED)
    while (head := requests.read(REQUEST.size)) and len(head) == REQUEST.size:
        kind, length = REQUEST.unpack(head)
        payload = requests.read(length)
        if len(payload) < length:
            break
        _send(responses, STARTED)
        _limit_cpu_time(limits.max_seconds)
        _send(responses, *_response(payload if kind else os.fsdecode(payload), spec, limits, shared))


def open_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Pipes of a worker process, requests and responses; from here on it ignores Ctrl-C and ends with its parent."""
    # The pipes move to new descriptors, so that a C library that prints to 1 does not write between the messages.
    requests, responses = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    devnull = os.open(os.devnull, os.O_RDWR)
    os.dup2(devnull, 0)
    os.dup2(devnull, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    exit_with_parent()
    return requests, responses


def _response(
    source: str | bytes, spec: ImageSpec, limits: Limits, shared: mmap.mmap | None
) -> tuple[bytes, bytes]:
    """Header and payload of the response for one image."""
    try:
        image: str | bytes | NDArray[np.uint8] = source
        if shared is not None:
            packed = decode.decode_packed(source, limits)  # [H, W, 4]
            height, width, _ = packed.shape
            if packed.nbytes <= len(shared):
                np.frombuffer(shared, np.uint8, packed.size)[:] = packed.reshape(-1)
                return RESPONSE.pack(SHARED, height, width, height, width, 0), b""
            image = np.ascontiguousarray(packed[:, :, :3])
        pixels = preprocess.preprocess(image, spec, limits=limits)
    except ImageError as error:
        reason = error.reason
    except MemoryError:
        reason = decode.OUT_OF_MEMORY
    else:
        _, height, width = pixels.values.shape
        body = np.ascontiguousarray(pixels.values).tobytes()
        return RESPONSE.pack(0, height, width, *pixels.size, len(body)), body
    body = reason.encode("utf-8", "backslashreplace")
    return RESPONSE.pack(FAILED, 0, 0, 0, 0, len(body)), body


def _open_shared(descriptor: int, size: int) -> mmap.mmap | None:
    if descriptor < 0:
        return None
    shared = mmap.mmap(descriptor, size) if size else None
    os.close(descriptor)
    return shared


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


def exit_with_parent() -> None:
    """On Linux, end the process when the parent ends, even during a decode; elsewhere the closed pipe ends it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def limit_memory(budget: int) -> None:
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
