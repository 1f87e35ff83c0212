"""Settings of a server, checked before anything is loaded."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from sightloop.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What a server is told.

    Args:
        models: checkpoints by the id that clients name; the first one is the default.
        host: address to bind.
        port: TCP port; 0 for a free one.
        keys: one of them must come with every request but that of /health; () for none.
        folder: folder, index or dataset whose images may be read by path; None for nowhere.
        allow_urls: whether remote images are fetched.
        hosts: further names under which the server may be called.
        max_memory: bytes of weights that may be loaded at a time; None for no bound.
        idle_seconds: after which a model that is not the default is unloaded; 0 for never.
        workers: processes that decode images, for each loaded model.
        build_index: whether the index of these images is built at the start, where there is none.
    """

    models: dict[str, str]
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    folder: Path | None = None
    allow_urls: bool = False
    hosts: tuple[str, ...] = ()
    max_memory: int | None = None
    idle_seconds: float = 600.0
    workers: int = 2
    build_index: bool = False

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def parse_bytes(option: str, text: str) -> int:
    """Bytes of "800M" or "6G" (powers of 1024). Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if match is None or not (size := float(match[1])):
        raise UsageError(f"{option} {text}: give a size such as 800M or 6G.")
    return int(size * 1024 ** " KMGT".index(match[2].upper() or " "))


def model_ids(sources: list[str]) -> dict[str, str]:
    """Checkpoints by the ids that clients see: a hub id as it is, of a path its last part alone.

    Raises:
        UsageError: two have one id.
    """
    ids: dict[str, str] = {}
    for source in sources:
        path = Path(source)
        name = source if not path.exists() else path.resolve().stem if path.is_file() else path.resolve().name
        if name in ids:
            raise UsageError(
                f"--model {source}: another model is called {name} too; rename one of the folders."
            )
        ids[name] = source
    return ids
