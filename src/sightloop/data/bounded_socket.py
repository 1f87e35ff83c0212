"""Byte stream of a socket with a deadline and a greatest size, for answers of servers that are not trusted."""

from __future__ import annotations

import io
import socket
import time


class BoundedReader(io.RawIOBase):
    """Byte stream of a socket that ends with `TimeoutError` at a deadline, or after `max_bytes`.

    `http.client` bounds neither the interim answers ("100 Continue") nor the time for status, headers, chunk lines and
    trailers; given this in place of a socket, all of them are.

    Args:
        sock: A connected socket, also of TLS.
        deadline: Time of `time.monotonic`.
        max_bytes: Bytes in all.
    """

    def __init__(self, sock: socket.socket, deadline: float, max_bytes: int) -> None:
        self._sock = sock
        self._deadline = deadline
        self._left = max_bytes

    def makefile(self, mode: str) -> io.BufferedReader:
        """What `http.client.HTTPResponse` asks of its socket."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Bytes of the socket. Raises TimeoutError at either bound."""
        self._sock.settimeout(seconds_until(self._deadline))
        try:
            count = self._sock.recv_into(buffer)
        except TimeoutError as error:
            raise too_slow() from error
        self._left -= count
        if self._left < 0:
            raise TimeoutError(0, "its answer is too long")
        return count


def seconds_until(deadline: float) -> float:
    """Seconds left, above 0. Raises TimeoutError if there are none."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise too_slow()
    return seconds


def too_slow() -> TimeoutError:
    """The error of an answer that is not complete at its deadline."""
    return TimeoutError(0, "its answer was not complete in time")
