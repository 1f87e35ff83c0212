"""Refusal of requests while the queue is full, before they are parsed: under overload a 429 costs next to nothing."""

from __future__ import annotations

from collections.abc import Callable

from uvicorn.protocols.http.h11_impl import H11Protocol

from sightloop.apps.server.admission import Admission
from sightloop.apps.server.errors import error_response

_CLOSE_SECONDS = 2.0  # for the client to read the refusal, while what it still sends is dropped


def refusing_protocol(admission: Admission, refused: Callable[[], None]) -> type[H11Protocol]:
    """The HTTP protocol of a server.

    Args:
        admission: that knows whether the queue is full.
        refused: called for each refusal.
    """

    class RefusingProtocol(H11Protocol):
        """HTTP/1.1 that answers POSTs itself while the queue is full for the client's address."""

        _is_refused = False

        def data_received(self, data: bytes) -> None:
            """Bytes of the client; after a refusal they are dropped until the connection is closed."""
            if self._is_refused:
                return
            is_between = self.cycle is None or self.cycle.response_complete  # pyright: ignore[reportUnnecessaryComparison]
            address = self.client[0] if self.client else ""
            if (
                data.startswith(b"POST ")
                and is_between
                and not self.conn.trailing_data[0]
                and (error := admission.refusal(address))
            ):
                self._is_refused = True
                refused()
                response = error_response(error)
                headers = [*response.raw_headers, (b"connection", b"close")]
                lines = [
                    b"HTTP/1.1 429 Too Many Requests",
                    *(name + b": " + value for name, value in headers),
                ]
                self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + bytes(response.body))
                self.loop.call_later(_CLOSE_SECONDS, self.transport.close)
                return
            super().data_received(data)

    return RefusingProtocol
