"""HTTP load: requests over kept-alive connections, as cheap for the client as they can be, and what came back."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

TIMEOUT = 600.0


@dataclass
class Load:
    """What a load gave. seconds: of the whole; latencies: of each request, by status."""

    seconds: float = 0.0
    latencies: dict[int, list[float]] = field(default_factory=dict)
    bodies: list[bytes] = field(default_factory=list)

    @property
    def statuses(self) -> Counter[int]:
        return Counter({status: len(values) for status, values in self.latencies.items()})

    def quantile(self, share: float, status: int = 200) -> float:
        values = sorted(self.latencies.get(status, [float("nan")]))
        return values[min(len(values) - 1, int(share * len(values)))]


def post(path: str, body: dict[str, Any] | bytes, host: str = "127.0.0.1", key: str | None = None) -> bytes:
    """A request as it goes over the wire."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    if key is not None:
        head += f"Authorization: Bearer {key}\r\n"
    return head.encode() + b"\r\n" + data


async def send(address: str, requests: Iterable[bytes], concurrency: int, *, keep: bool = False) -> Load:
    """Sends requests over `concurrency` connections, each the next one when its last is answered.

    keep: also the bodies of the answers, in no order.
    """
    parts = urlsplit(address)
    load, waiting = Load(), iter(requests)
    start = perf_counter()
    await asyncio.gather(
        *(
            _connection(parts.hostname or "", parts.port or 80, waiting, load, keep)
            for _ in range(concurrency)
        )
    )
    load.seconds = perf_counter() - start
    return load


async def _connection(host: str, port: int, requests: Iterator[bytes], load: Load, keep: bool) -> None:
    reader, writer = None, None
    for request in requests:
        start = perf_counter()
        if reader is None or writer is None:
            reader, writer = await asyncio.open_connection(host, port, limit=1 << 26)
        writer.write(request)
        await writer.drain()
        status, body, stays = await asyncio.wait_for(answer(reader), TIMEOUT)
        load.latencies.setdefault(status, []).append(perf_counter() - start)
        if keep:
            load.bodies.append(body)
        if not stays:
            writer.close()
            reader, writer = None, None
    if writer is not None:
        writer.close()


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes, bool]:
    """(status, body, whether the connection stays open) of one answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])
    }
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readexactly(2)
    else:
        body = await reader.readexactly(int(headers.get("content-length", 0)))
    return int(head[0].split()[1]), body, headers.get("connection", "").lower() != "close"


@dataclass(frozen=True)
class Usage:
    """Of a process and its children: memory in bytes (shared pages counted once), processor seconds."""

    memory: int
    seconds: float


def usage(pid: int) -> Usage:
    """Usage of a process and what it started; Linux."""
    memory, ticks = 0, 0
    for each in [pid, *_children(pid)]:
        try:
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
            memory += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:13]))
        except OSError:  # it has ended
            continue
    return Usage(memory, ticks / os.sysconf("SC_CLK_TCK"))


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *_children(int(child))]
    return found
