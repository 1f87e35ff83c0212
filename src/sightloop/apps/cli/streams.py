"""Standard streams that the parent process, or the reader of a pipe, has closed."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress


class ClosedOutput(io.TextIOBase):
    """Standard output of a process that was started without one: writing raises `BrokenPipeError`."""

    encoding = "utf-8"

    def fileno(self) -> int:
        """The descriptor of standard output, which `open_standard_streams` opens on the null device."""
        return 1

    def write(self, s: str, /) -> int:
        """Raises `BrokenPipeError`."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE), "standard output")


def open_standard_streams() -> None:
    """Replaces standard streams that are closed (`>&-`).

    Their file descriptors are opened on the null device, so that no output file gets one of them. Without standard
    error, messages are discarded; writing to a closed standard output is the same error as writing to a closed pipe.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison]
        sys.stdin = open(os.devnull)  # noqa: SIM115 (for the rest of the process)
    if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison]
        sys.stdout = ClosedOutput()
    if sys.stderr is None:  # pyright: ignore[reportUnnecessaryComparison]
        discard_stderr()


def discard_stdout() -> None:
    """Lets the flush of standard output at the interpreter's exit write to the null device."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def discard_stderr() -> None:
    """Discards all further messages."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
