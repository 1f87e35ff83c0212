"""The child process that decodes images: run as `python -m sightloop.data.images.decode_worker SETTINGS`.

SETTINGS is JSON: the fields of an ImageSpec under "spec" and of Limits under "limits". Frames on the pipes, big-endian:

    request   kind (1 byte: 0 path, 1 bytes), length (8), payload
    started   1 byte: the request is here and work begins; one more is sent when the child is ready for its first
    response  status (1 byte: 0 pixels, 1 reason), H, W, original height and width (4 each), length (8), payload

No pickle, nothing executed, no torch: a child starts in about 0.15 s and cannot do more harm than to die.
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

from sightloop.data.images import preprocess
from sightloop.errors import ImageError
from sightloop.types import ImageSpec, JsonDict, Limits

REQUEST = struct.Struct(">BQ")
RESPONSE = struct.Struct(">BIIIIQ")
STARTED = b"\x06"


def main() -> None:
    """Serves requests until the pipe is closed."""
    settings: dict[str, JsonDict] = json.loads(sys.argv[1])
    limits = Limits(**settings["limits"])
    fields: JsonDict = {key: tuple(v) if isinstance(v, list) else v for key, v in settings["spec"].items()}
    spec = ImageSpec(**fields)
    # Whatever a C library prints must not get between the frames.
    requests, responses = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _die_with_parent()
    _cap_memory(limits.max_memory_bytes)
    _send(responses, STARTED)
    while (head := requests.read(REQUEST.size)) and len(head) == REQUEST.size:
        kind, length = REQUEST.unpack(head)
        payload = requests.read(length)
        if len(payload) < length:
            break
        _send(responses, STARTED)
        _allow(limits.max_seconds)
        _send(responses, *_answer(payload if kind else os.fsdecode(payload), spec, limits))


def _answer(source: str | bytes, spec: ImageSpec, limits: Limits) -> tuple[bytes, bytes]:
    try:
        done = preprocess.preprocess(source, spec, limits=limits)
    except ImageError as error:
        reason = error.reason
    except MemoryError:
        reason = "needs too much memory"
    else:
        _, height, width = done.values.shape
        body = np.ascontiguousarray(done.values).tobytes()
        return RESPONSE.pack(0, height, width, *done.size, len(body)), body
    body = reason.encode("utf-8", "backslashreplace")
    return RESPONSE.pack(1, 0, 0, 0, 0, len(body)), body


def _send(responses: BinaryIO, *parts: bytes) -> None:
    for part in parts:
        responses.write(part)
    responses.flush()


def _allow(seconds: float) -> None:
    """Processor time from now until SIGPROF ends the process: the clock would count others' work too."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _die_with_parent() -> None:
    """Linux: be killed when the parent is, even in the middle of a decode. Elsewhere the closed pipe must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _cap_memory(allowed: int) -> None:
    """At most `allowed` bytes of address space more than now; no core files. Not on Windows."""
    if sys.platform == "win32":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux":  # others refuse to limit address space, or count shared libraries in it
        return
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = now + allowed
    resource.setrlimit(
        resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
    )


if __name__ == "__main__":
    main()
