"""Serving, side by side with the obvious FastAPI wrapper of `transformers`: `python -m benchmarks.serve`.

Embeddings (CLIP) and greedy captions (BLIP) of JPEGs, one image a request, at several concurrencies, and embeddings by
32 a request beside the rate of `embed_images` in a process without a server. Same machine, same weights (random, of
official shapes, or small with --size tiny), same threads. Beside the clock's rate stands that of processor seconds,
which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import materials
from benchmarks.http_load import answer, post, send, usage

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    """One measurement.

    rate: images a second. cpu_rate: images a second of one core. p50, p99: milliseconds. memory: MB of the server and
    its children, after. refused: answers other than 200.
    """

    server: str
    work: str
    concurrency: int
    rate: float
    cpu_rate: float
    p50: float
    p99: float
    memory: float
    refused: int


@contextmanager
def started(command: list[str], threads: int) -> Generator[tuple[str, int]]:
    """A server's address and process id, ready to answer."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        lines: list[str] = []
        try:
            while not (lines and "http://" in lines[-1]):
                line = process.stdout.readline()
                if not line:
                    raise SystemExit(f"{' '.join(command[:4])} ended:\n{''.join(lines)[-2000:]}")
                lines.append(line)
            address = next(word for word in lines[-1].split() if word.startswith("http://"))
            yield address, process.pid
        finally:
            process.terminate()
            process.communicate(timeout=120)


async def ready(address: str) -> None:
    """Waits for /health."""
    host, port = address.removeprefix("http://").split(":")
    while True:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        status, _, _ = await answer(reader)
        writer.close()
        if status in (200, 404):  # the wrapper has no such path, and is ready when it listens
            return
        await asyncio.sleep(0.1)


def measured(
    server: tuple[str, str, int],
    work: str,
    requests: Iterator[bytes],
    count: int,
    concurrency: int,
    images: int = 1,
) -> Row:
    """Sends `count` requests of `images` images each, after a tenth of them as warm-up."""
    name, address, pid = server
    asyncio.run(send(address, list(itertools.islice(requests, max(2, count // 10))), min(concurrency, 4)))
    listed = list(itertools.islice(requests, count))
    before = usage(pid)
    load = asyncio.run(send(address, listed, concurrency))
    after = usage(pid)
    done = images * load.statuses[200]
    return Row(
        name,
        work,
        concurrency,
        done / load.seconds,
        done / max(after.seconds - before.seconds, 1e-9),
        1e3 * load.quantile(0.5),
        1e3 * load.quantile(0.99),
        after.memory / 1e6,
        sum(load.statuses.values()) - load.statuses[200],
    )


def in_process(folder: str, files: list[str], count: int, threads: int) -> Row:
    """`embed_images` of encoded images in a process without a server."""
    code = (
        "import sys, time, itertools, sightloop\n"
        "model = sightloop.load(sys.argv[1], device='cpu')\n"
        "images = [open(path, 'rb').read() for path in sys.argv[3:]]\n"
        "images = list(itertools.islice(itertools.cycle(images), int(sys.argv[2])))\n"
        "model.embed_images(images[:8])\n"
        "start, cpu = time.perf_counter(), time.process_time()\n"
        "model.embed_images(images)\n"
        "print(time.perf_counter() - start, time.process_time() - cpu)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", code, folder, str(count), *files]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    seconds, cpu = map(float, out.split())
    return Row("in process", "embed x32", 1, count / seconds, count / cpu, 0.0, 0.0, 0.0, 0)


def run(options: argparse.Namespace) -> list[Row]:
    """All rows, printed as they come."""
    given = materials.prepare(options.cache, options.size)
    clip, blip = f"{given.folder}/clip", f"{given.folder}/caption"
    encoded = [Path(path).read_bytes() for path in given.pictures]
    # As many distinct images as the largest request has: bytes after the end of a JPEG are not read.
    distinct = [data + bytes([n]) for n in range(-(-32 // len(encoded))) for data in encoded]
    images = [base64.b64encode(data).decode() for data in distinct]
    ours = {
        "embed": [
            post("/v1/embeddings", {"input": [i], "modality": "image", "model": "clip"}) for i in images
        ],
        "caption": [
            post("/api/caption", {"images": i, "model": "caption", "num_beams": 1, "max_new_tokens": 20})
            for i in images
        ],
    }
    theirs = {work: [post(f"/{work}", {"image": i}) for i in images] for work in ours}
    many = [
        post(
            "/v1/embeddings",
            {"input": images[n : n + 32], "modality": "image", "model": "clip", "encoding_format": "base64"},
        )
        for n in range(0, len(images) - 31, 32)
    ]
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        if not options.json:
            print(_line(row), flush=True)

    if not options.json:
        print(_HEAD, flush=True)
    commands = {
        "sightloop": [sys.executable, "-m", "sightloop", "serve", "-m", clip, "-m", blip, "--port", "0"],
        "wrapper": [sys.executable, "-m", "benchmarks.peer_serve", clip, blip],
    }
    for name, command in commands.items():
        with started(command, options.threads) as (address, pid):
            asyncio.run(ready(address))
            for work, requests in (ours if name == "sightloop" else theirs).items():
                for concurrency in options.concurrency:
                    count = max(options.count // (4 if work == "caption" else 1), concurrency)
                    add(measured((name, address, pid), work, itertools.cycle(requests), count, concurrency))
            if name == "sightloop":
                count = max(4, options.count // 32)
                add(measured((name, address, pid), "embed x32", itertools.cycle(many), count, 4, 32))
    add(in_process(clip, given.pictures, options.count, options.threads))
    return rows


_HEAD = f"{'server':<11}{'work':<11}{'at once':>8}{'images/s':>10}{'per core':>10}{'p50 ms':>9}{'p99 ms':>9}{'MB':>8}"


def _line(row: Row) -> str:
    figures = f"{row.rate:>10.1f}{row.cpu_rate:>10.1f}{row.p50:>9.0f}{row.p99:>9.0f}{row.memory:>8.0f}"
    refused = f"  ({row.refused} refused)" if row.refused else ""
    return f"{row.server:<11}{row.work:<11}{row.concurrency:>8}{figures}{refused}"


def ratios(rows: list[Row]) -> dict[str, float]:
    """The claims, each as a ratio of two rows of this run, by processor seconds and by the clock."""
    by = {(row.server, row.work, row.concurrency): row for row in rows}
    most = max(row.concurrency for row in rows)
    claims = {
        "embeddings over HTTP / in process": (("sightloop", "embed x32", 4), ("in process", "embed x32", 1)),
        "batched / one by one": (("sightloop", "embed", most), ("sightloop", "embed", 1)),
        "embeddings: sightloop / wrapper": (("sightloop", "embed", most), ("wrapper", "embed", most)),
        "captions: sightloop / wrapper": (("sightloop", "caption", most), ("wrapper", "caption", most)),
    }
    found: dict[str, float] = {}
    for name, (first, second) in claims.items():
        if first in by and second in by and by[second].rate:
            found[f"{name}, clock"] = by[first].rate / by[second].rate
            found[f"{name}, per core"] = by[first].cpu_rate / by[second].cpu_rate
    return found


def main() -> None:
    """Measures, prints a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", choices=("official", "tiny"), default="official")
    add("--cache", type=Path, default=Path.home() / ".cache" / "sightloop-bench")
    add("--count", type=int, default=256, help="images of each embedding row; captions: a quarter")
    add("--concurrency", type=int, nargs="+", default=[1, 8, 64])
    add("--threads", type=int, default=os.cpu_count() or 1, help="of torch, on both sides")
    add("--json", action="store_true")
    options = parser.parse_args()
    start = time.monotonic()
    rows = run(options)
    if options.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "ratios": ratios(rows)}))
        return
    print()
    for name, value in ratios(rows).items():
        print(f"{name:<46}{value:>7.2f}")
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
