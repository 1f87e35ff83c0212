"""The benchmark of the server: its ratios, and its client of HTTP against odd answers."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.http_load import Load, answer, post
from benchmarks.serve import Row, ratios


def row(server: str, work: str, concurrency: int, rate: float) -> Row:
    return Row(server, work, concurrency, rate, 2 * rate, 1.0, 2.0, 3.0, 0)


def test_ratios_are_of_the_rows_that_they_name() -> None:
    rows = [
        row("sightloop", "embed", 1, 10),
        row("sightloop", "embed", 64, 40),
        row("wrapper", "embed", 64, 16),
        row("sightloop", "embed x32", 4, 57),
        row("in process", "embed x32", 1, 60),
    ]
    assert ratios(rows) == {
        f"{name}, {kind}": value
        for name, value in {
            "embeddings over HTTP / in process": 0.95,
            "batched / one by one": 4.0,
            "embeddings: sightloop / wrapper": 2.5,
        }.items()
        for kind in ("clock", "per core")
    }


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", (200, b"ok", True)),
        (b"HTTP/1.1 429 x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n", (429, b"", False)),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n",
            (200, b"abc", True),
        ),
    ],
)
def test_answers_are_read(data: bytes, expected: tuple[int, bytes, bool]) -> None:
    async def read() -> tuple[int, bytes, bool]:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await answer(reader)

    assert asyncio.run(read()) == expected


def test_quantiles_and_requests() -> None:
    load = Load(1.0, {200: [float(i) for i in range(100)], 429: [0.5]})
    assert load.quantile(0.5) == 50.0
    assert load.quantile(0.99) == 99.0
    assert load.statuses == {200: 100, 429: 1}
    assert post("/x", {"a": 1}).endswith(b'Content-Length: 8\r\n\r\n{"a": 1}')
