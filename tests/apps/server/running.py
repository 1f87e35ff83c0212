"""A server in a thread of the test's process, and small images to send."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from PIL import Image

from sightloop.apps.server.serve import GracefulServer
from sightloop.apps.server.service import Service
from sightloop.apps.server.settings import ServerSettings


@dataclass
class Running:
    """address: "http://127.0.0.1:40000". http: a client of it. service: what is behind it."""

    address: str
    http: httpx.Client
    service: Service
    server: GracefulServer

    def post(self, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)


@contextmanager
def running(
    load: Callable[[str], Any], change: Callable[[Service], None] = lambda _service: None, **settings: Any
) -> Generator[Running]:
    """A server on a free port, ready when the block starts; `change` sees the service before that."""
    addresses: list[str] = []
    options = {"models": {"nano": "nano"}, "port": 0, "workers": 1, **settings}
    service = Service(ServerSettings(**options), load)
    change(service)
    server = GracefulServer(service, addresses.append)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: bool(addresses) and (service.pool.is_ready or service.failure is not None))
        key = {"Authorization": f"Bearer {service.settings.keys[0]}"} if service.settings.keys else {}
        with httpx.Client(base_url=addresses[0], timeout=120, headers=key) as http:
            yield Running(addresses[0], http, service, server)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def jpeg(seed: int = 0, size: tuple[int, int] = (40, 30)) -> bytes:
    """Noise over a gradient."""
    values = np.random.default_rng(seed).integers(0, 120, (size[1], size[0], 3))
    values += np.linspace(0, 130, size[0]).astype(int)[None, :, None]
    file = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(file, "JPEG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()
