"""What kernels and precisions cost and gain: processor time of one thread, in turns, and how far results move.

    python -m benchmarks.precision
    python -m benchmarks.precision --ways plain packed auto --work encode decode-1-1

Checkpoints are those of `benchmarks.run`: random weights at official sizes. A way is a kernel (`plain`, `packed`,
`auto`: SIGHTLOOP_KERNELS, in float32) or a precision (`bfloat16`, `int8`); the others are compared with the first one.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sightloop
from benchmarks.materials import Materials, prepare
from sightloop.inference.kernel_cache import KERNELS_VARIABLE

PRECISIONS: dict[str, dict[str, Any]] = {"bfloat16": {"dtype": "bfloat16"}, "int8": {"quantize": "int8"}}
WORK = {
    "encode": "BLIP base image tower, 2 images of 384",
    "decode-1-1": "BLIP base, 20 tokens of one encoded image, greedy",
    "decode-1-3": "the same, 3 beams",
    "decode-8-1": "of 8 encoded images, greedy",
    "decode-8-3": "the same, 3 beams",
    "judge": "BLIP base ITM, 16 texts against one encoded image",
    "images": "CLIP B/32, 16 images",
    "texts": "CLIP B/32, 64 captions",
}


class Ways:
    """Models by way and checkpoint, loaded when they are needed, those of one checkpoint at a time."""

    def __init__(self, materials: Materials) -> None:
        self.materials = materials
        self.held: dict[tuple[str, str], sightloop.Model] = {}

    def model(self, way: str, checkpoint: str) -> sightloop.Model:
        self.held = {key: model for key, model in self.held.items() if key[1] == checkpoint}
        if (way, checkpoint) not in self.held:
            os.environ[KERNELS_VARIABLE] = "auto" if way in PRECISIONS else way
            folder = Path(self.materials.folder) / checkpoint
            options = PRECISIONS.get(way, {})
            self.held[way, checkpoint] = sightloop.load(folder, device="cpu", **options)
        return self.held[way, checkpoint]

    def call(self, way: str, work: str) -> Callable[[], Any]:
        """What is timed; returns embeddings `[n, d]`, or texts."""
        files, captions = self.materials.pictures, self.materials.captions
        if work.startswith("decode"):
            images, beams = map(int, work.split("-")[1:])
            model = self.model(way, "caption")
            encoded = model.encode(list(model.read(files[:images], isolate=False)))  # type: ignore[arg-type]
            options = model.options({"num_beams": beams, "min_new_tokens": 20, "max_new_tokens": 20})
            keys = list(range(images))
            write = model.generator.continue_texts
            return lambda: [[one.text for one in own] for own in write(encoded, None, keys, options)]
        name = {"encode": "caption", "judge": "match"}.get(work, "clip")
        model = self.model(way, name)
        if work == "texts":
            return lambda: model.embed_texts(captions[:64])
        count = {"encode": 2, "judge": 1, "images": 16}[work]
        pixels: Any = list(model.read(files[:count], isolate=False))
        if work == "images":
            return lambda: model.embed_images(pixels)
        if work == "encode":
            return lambda: model.encode(pixels).tokens.float().flatten(0, 1).numpy()
        encoded, tokens = model.encode(pixels), model.tokenize(captions[:16])
        return lambda: model.match_scores(encoded, tokens, [np.arange(16)])[0]


def agreement(ours: Any, exact: Any) -> str:
    """The least cosine of rows, or the share of words that stay."""
    if isinstance(exact, np.ndarray):
        lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(exact, axis=1)
        return f"least cosine {((ours * exact).sum(axis=1) / lengths).min():.5f}"
    pairs = [
        (a.split(), b.split()) for x, y in zip(ours, exact, strict=True) for a, b in zip(x, y, strict=True)
    ]
    words = sum(len(b) for _, b in pairs)
    return f"{sum(sum(map(str.__eq__, a, b)) for a, b in pairs) / max(words, 1):.0%} of words"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ways", nargs="+", default=["auto", "bfloat16", "int8"])
    parser.add_argument("--work", nargs="+", default=list(WORK), choices=list(WORK))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "sightloop-bench")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ways = Ways(prepare(options.cache, "official"))
    for work in options.work:
        calls = {way: ways.call(way, work) for way in options.ways}
        results = {way: call() for way, call in calls.items()}
        seconds = {way: float("inf") for way in calls}
        for _ in range(options.rounds):
            for way, call in calls.items():
                start = time.process_time()
                call()
                seconds[way] = min(seconds[way], time.process_time() - start)
        first = options.ways[0]
        print(f"{work}: {WORK[work]}", flush=True)
        for way in options.ways:
            ratio = seconds[first] / seconds[way]
            told = "" if way == first else f"  {ratio:.2f}x  {agreement(results[way], results[first])}"
            print(f"  {way:9} {seconds[way]:7.3f} s{told}", flush=True)


if __name__ == "__main__":
    main()
