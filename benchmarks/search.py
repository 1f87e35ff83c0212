"""Figures of the index: recall, time of a query, processor time of the build, anonymous memory.

    python -m benchmarks.search                   100,000 vectors of 512 numbers
    python -m benchmarks.search --rows 1000000    needs 5 GB of disk and some minutes

Vectors are made to lie as CLIP's do: images in one narrow cone, texts in another, both around shared topics. Recall is
that of the ten nearest, against exact search in float32. The build and the queries run in processes of their own.
Processor time is what counts on a busy machine; p50 and p95 are of the wall clock.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_WIDTH, _TOPICS, _AT_ONCE, _K = 512, 2_000, 50_000, 10
_GROUPS = 100  # the filter takes one of them


def make_vectors(count: int, cone: int, seed: int) -> NDArray[np.float32]:
    """Vectors `[count, 512]` of unit length around the topics, in the cone of images (0) or of texts (1)."""
    shared = np.random.default_rng(0)
    cones = shared.standard_normal((2, _WIDTH), dtype=np.float32) / np.sqrt(_WIDTH)
    topics = shared.standard_normal((_TOPICS, _WIDTH), dtype=np.float32) / np.sqrt(_WIDTH)
    own = np.random.default_rng(seed)
    noise = own.standard_normal((count, _WIDTH), dtype=np.float32) / np.sqrt(_WIDTH)
    vectors = 0.75 * cones[cone] + 0.4 * topics[own.integers(0, _TOPICS, count)] + 0.5 * noise
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def parts_of(rows: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """The images, part by part, with the number of each part's first."""
    for start in range(0, rows, _AT_ONCE):
        yield start, make_vectors(min(_AT_ONCE, rows - start), 0, start + 1)


def groups_of(rows: int) -> NDArray[np.int64]:
    """For each image a number in 0..99, by which the filter chooses."""
    return np.random.default_rng(1).integers(0, _GROUPS, rows)


def anonymous_megabytes() -> float:
    """Anonymous memory of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


class Watch(threading.Thread):
    """Watches the anonymous memory of this process, less that of the vectors which it is given."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.held, self.peak = 0.0, 0.0
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.05):
            self.peak = max(self.peak, anonymous_megabytes() - self.held)

    def end(self) -> float:
        """Stops; the highest figure in MB."""
        self._ended.set()
        self.join()
        return self.peak


def build(place: Path, rows: int, dtype: str) -> dict[str, object]:
    """Builds the index; its figures. The memory is the highest while it builds, without the vectors given to it."""
    from sightloop.search.index import Index

    groups, spent, watch = groups_of(rows), 0.0, Watch()
    index = Index.create(place, dim=_WIDTH, dtype="float32" if dtype == "float32" else "float16")
    watch.start()
    for start, vectors in parts_of(rows):
        columns = {"id": [f"i{start + i}" for i in range(len(vectors))]}
        before, watch.held = time.process_time(), vectors.nbytes / 2**20
        index.add_vectors(vectors, columns | {"width": groups[start : start + len(vectors)]})
        spent += time.process_time() - before
        watch.held = 5 * _AT_ONCE * _WIDTH * 4 / 2**20  # while the next vectors are made
    before = time.process_time()
    with index.store.writing():
        index.store.maintain(whole=True)
    spent += time.process_time() - before
    size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    return {"build CPU s": round(spent, 1), "disk MB": size >> 20, "build MB": round(watch.end())}


def nearest_of(queries: NDArray[np.float32], rows: int, group: int | None) -> list[set[str]]:
    """Ids of the ten nearest of each query by exact search, among all images or those of a group."""
    groups = groups_of(rows)
    names = np.zeros((len(queries), 0), np.int64)
    scores = np.zeros((len(queries), 0), np.float32)
    for start, vectors in parts_of(rows):
        chosen = np.arange(len(vectors))
        if group is not None:
            chosen = np.flatnonzero(groups[start : start + len(vectors)] == group)
        scores = np.concatenate([scores, queries @ vectors[chosen].T], axis=1)
        names = np.concatenate([names, np.broadcast_to(chosen + start, (len(queries), len(chosen)))], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :_K]
        scores, names = np.take_along_axis(scores, best, 1), np.take_along_axis(names, best, 1)
    return [{f"i{name}" for name in row} for row in names]


def query(place: Path, rows: int, count: int) -> Iterator[dict[str, object]]:
    """Figures of queries like images and like texts, of all rows and with a filter of one percent."""
    from sightloop.search.index import open_index

    index = open_index(place)
    for cone, kind in enumerate(("image", "text")):
        queries = make_vectors(count, cone, 10**8 + cone)
        for group, where in ((None, ()), (7, "width=7")):
            truth = nearest_of(queries, rows, group)
            index.search(vector=queries[0], k=_K, where=where)  # opens files
            seconds: list[float] = []
            hits: list[set[str]] = []
            before = time.process_time()
            for vector in queries:
                start = time.perf_counter()
                hits.append(set(index.search(vector=vector, k=_K, where=where).ids))
                seconds.append(time.perf_counter() - start)
            spent = time.process_time() - before
            shared = [len(a & b) / _K for a, b in zip(hits, truth, strict=True)]
            yield {
                "queries": kind + (", 1 % filter" if where else ""),
                "recall@10": round(float(np.mean(shared)), 4),
                "CPU ms": round(1e3 * spent / count, 1),
                "p50 ms": round(1e3 * float(np.percentile(seconds, 50)), 1),
                "p95 ms": round(1e3 * float(np.percentile(seconds, 95)), 1),
                "query MB": round(anonymous_megabytes()),
            }


def main() -> None:
    """Runs the build and the queries, each in a process of its own, and prints a line for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    parser.add_argument("--step", choices=["build", "query"], help=argparse.SUPPRESS)
    parser.add_argument(
        "--place", type=Path, help="folder of the index; default: one that is removed at the end"
    )
    options = parser.parse_args()
    if options.step == "build":
        print(json.dumps(build(options.place, options.rows, options.dtype)))
    elif options.step == "query":
        for figures in query(options.place, options.rows, options.queries):
            print(json.dumps(figures), flush=True)
    else:
        with tempfile.TemporaryDirectory() as folder:
            place = options.place or Path(folder) / "index"
            for step in ("build", "query"):
                own = [
                    "--step",
                    step,
                    "--place",
                    str(place),
                    "--rows",
                    str(options.rows),
                    "--dtype",
                    options.dtype,
                ]
                own += ["--queries", str(options.queries)]
                subprocess.run([sys.executable, "-m", "benchmarks.search", *own], check=True)


if __name__ == "__main__":
    main()
