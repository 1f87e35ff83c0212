"""Server process: binds, serves, and stops gracefully."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn

from sightloop.apps.server.app import create_app
from sightloop.apps.server.service import Service
from sightloop.apps.server.settings import ServerSettings
from sightloop.errors import UsageError, os_error_reason

if TYPE_CHECKING:
    from sightloop.inference.model import Model

_GRACE_SECONDS = 60
_CONNECTIONS = 1024
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class GracefulServer(uvicorn.Server):
    """Server that finishes what runs when it is told to stop, and refuses the rest.

    Args:
        service: what the routes work with.
        ready: called with the address once requests are taken.
    """

    def __init__(self, service: Service, ready: Callable[[str], None] = lambda _address: None) -> None:
        settings = service.settings
        config = uvicorn.Config(
            create_app(service, self._fail),
            host=settings.host,
            port=settings.port,
            access_log=False,
            log_config=None,
            server_header=False,
            date_header=False,
            proxy_headers=False,  # X-Forwarded-For is anybody's word
            ws="none",
            limit_concurrency=_CONNECTIONS,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        super().__init__(config)
        self._service, self._ready = service, ready

    @property
    def address(self) -> str:
        """Where it listens, as a URL. Only once it has started."""
        sock = self.servers[0].sockets[0]
        host, port = sock.getsockname()[:2]
        host = self.config.host if sock.family == socket.AF_INET or self.config.host != "::" else host
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Binds, and says where."""
        await super().startup(sockets)
        if self.started:
            self._ready(self.address)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuses what waits, finishes what runs, closes."""
        self._service.stop()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Stops at SIGINT and SIGTERM; a second SIGINT stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _fail(self) -> None:
        """Ends the server: its model cannot be loaded."""
        self.should_exit = True


def serve(
    settings: ServerSettings,
    load: Callable[[str], Model],
    ready: Callable[[str], None] = lambda _address: None,
) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
        settings: what to serve, and where.
        load: loads a checkpoint.
        ready: called with the address once requests are taken.

    Raises:
        UsageError: the port is in use, or the address is not this machine's.
        SightloopError: the default model cannot be loaded.
    """
    _check_port(settings)
    bound_kernel_caches()
    # The event loop takes its turn beside the model's thread sooner than after Python's five milliseconds.
    sys.setswitchinterval(0.0005)
    service = Service(settings, load)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("sightloop.server")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        GracefulServer(service, ready).run()
    finally:
        log.removeHandler(handler)
    if service.failure is not None:
        raise service.failure


def bound_kernel_caches() -> None:
    """Bounds what oneDNN and its layer in torch keep for every shape of a batch. Call before torch is imported.

    Requests make batches of ever new shapes, and the caches' own bound of 1,024 kernels each lets a server grow by
    hundreds of megabytes; processor time is the same at 32.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "32")


def _check_port(settings: ServerSettings) -> None:
    """Raises UsageError if the address cannot be bound, before torch is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        reason = "no such address" if isinstance(error, socket.gaierror) else os_error_reason(error)
        raise UsageError(
            f"--host {settings.host} --port {settings.port}: cannot be listened on ({reason}); give another --port."
        ) from error
