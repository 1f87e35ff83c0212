"""Gate: what every request passes before a route sees it, and every answer on its way out.

Host, Origin and key are checked, a place in the queue is taken, the body is read and counted. The route is cancelled
when the client goes away or the time is up. Whatever fails becomes an answer in the one form of errors.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sightloop.apps.server.admission import Admission
from sightloop.apps.server.errors import ApiError, as_api_error, error_response
from sightloop.apps.server.limits import (
    BODY_SECONDS,
    DRAIN_BYTES,
    DRAIN_SECONDS,
    MAX_BODY,
    REQUEST_SECONDS,
)
from sightloop.apps.server.scheduler import log_unforeseen, stopping_error

if TYPE_CHECKING:
    from sightloop.apps.server.service import Service

_SECURITY = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; object-src 'none'; "
        b"base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    ),
]


class Gate:
    """ASGI application around the routes.

    Args:
        app: the routes.
        service: what they work with.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        place = _Place(self._service.admission)
        answer = _Outgoing(send, place.leave)
        start = time.monotonic()
        complete = False
        try:
            headers = Headers(scope=scope)
            client = self._client(scope, headers)
            if scope["method"] == "POST":
                place.enter(client)
            body = await _read_body(headers, receive, place.grow)
            complete = True
            scope.setdefault("state", {})["client"] = client
            await self._run(scope, body, receive, answer, watched=place.is_taken)
        except Exception as error:
            log_unforeseen(error)
            await answer.refuse(scope, error, receive, complete=complete)
        finally:
            place.leave()
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in ("GET", "POST", "PUT", "DELETE") else "other"
            self._service.metrics.request(method, route, answer.status or 499, time.monotonic() - start)

    def _client(self, scope: Scope, headers: Headers) -> Hashable:
        if self._service.stopping:
            raise stopping_error()
        address = (scope.get("client") or ("",))[0]
        return self._service.access.check(scope["method"], scope["path"], headers, address)

    async def _run(
        self, scope: Scope, body: bytes, receive: Receive, answer: _Outgoing, *, watched: bool
    ) -> None:
        """Runs the route until it ends, the client goes, or the time is up."""
        gone = asyncio.Event()
        parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def inner_receive() -> Message:
            if parts:
                return parts.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        if not watched:
            await self._app(scope, inner_receive, answer.send)
            return
        task = asyncio.ensure_future(self._app(scope, inner_receive, answer.send))
        watcher = asyncio.ensure_future(_disconnected(receive))
        try:
            done, _ = await asyncio.wait(
                {task, watcher}, timeout=REQUEST_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            if task in done:
                task.result()
                return
            gone.set()
            if not done and not answer.status:
                raise ApiError(503, f"no answer in {REQUEST_SECONDS:g} s: try again later", retry_after=10)
        finally:
            watcher.cancel()
            task.cancel()
            await asyncio.wait({task, watcher})
            if not task.cancelled():
                task.exception()  # seen; the client is gone or has its answer


class _Place:
    """A request's place in the queue, given back once."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._client: Hashable = None
        self._size = 0
        self.is_taken = False

    def enter(self, client: Hashable) -> None:
        """Takes it. Raises ApiError (429)."""
        self._admission.enter(client)
        self._client, self.is_taken = client, True

    def grow(self, size: int) -> None:
        """Takes room for more of its body. Raises ApiError (503)."""
        if self.is_taken:
            self._admission.take(size)
            self._size += size

    def leave(self) -> None:
        """Gives it back, if it is taken."""
        if self.is_taken:
            self.is_taken = False
            self._admission.leave(self._client, self._size)


class _Outgoing:
    """An answer on its way: adds headers, and knows whether it has begun.

    Attributes:
        status: of the answer, 0 before it.

    Args:
        send: of the connection.
        ending: called before the last bytes go out, as the client's next request may follow them at once.
    """

    def __init__(self, send: Send, ending: Callable[[], None]) -> None:
        self._send, self._ending = send, ending
        self.status = 0

    async def send(self, message: Message) -> None:
        """Passes a message on."""
        if message["type"] == "http.response.start":
            status, headers = message["status"], message.get("headers", [])
            self.status = status
            names = {name.lower() for name, _ in headers}
            added = [pair for pair in _SECURITY if pair[0] not in names]
            if b"cache-control" not in names:
                added.append((b"cache-control", b"no-store"))
            message = {**message, "headers": [*headers, *added]}
        elif not message.get("more_body", False):
            self._ending()
        await self._send(message)

    async def refuse(self, scope: Scope, error: Exception, receive: Receive, *, complete: bool) -> None:
        """Answers with an error, unless an answer has begun; then reads on what the client still sends.

        A server that closes while the client sends resets the connection, and the client never sees the answer.
        """
        if self.status:
            return
        response = error_response(as_api_error(error))
        if complete or scope["method"] in ("GET", "HEAD"):
            await response(scope, receive, self.send)
            return
        head = {
            "type": "http.response.start",
            "status": response.status_code,
            "headers": response.raw_headers,
        }
        await self.send(head)
        await self.send({"type": "http.response.body", "body": response.body, "more_body": True})
        with suppress(TimeoutError):
            await asyncio.wait_for(_drain(receive), DRAIN_SECONDS)
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})


async def _read_body(headers: Headers, receive: Receive, grow: Callable[[int], None]) -> bytes:
    """The whole body; `grow` is told of each part. Raises ApiError if it is too large (413) or too slow (400)."""
    length = headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 15 or int(length) > MAX_BODY):
        raise _too_large()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            chunks, size = list[bytes](), 0
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the body ends early")
                chunk: bytes = message.get("body", b"")
                size += len(chunk)
                if size > MAX_BODY:
                    raise _too_large()
                grow(len(chunk))
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        raise ApiError(400, f"the body did not arrive in {BODY_SECONDS:g} s", code="body_timeout") from None


def _too_large() -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {MAX_BODY >> 20} MiB: send fewer or smaller images",
        code="body_too_large",
    )


async def _drain(receive: Receive) -> None:
    size = 0
    while size < DRAIN_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
        size += len(message.get("body", b""))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
