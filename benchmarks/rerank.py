"""Re-ranked retrieval against the same pairs, judged one by one: `python -m benchmarks.rerank -d dev-000.tar`.

Both sides use one model, sightloop's own. The first is `evaluate retrieval` as people call it: all images and
captions embedded, the top k of every image and of every caption judged by ITM, recall counted. The other judges the
same pairs with `match`, one call a pair, each image decoded beforehand; from the time of some, that of all is told.
Processor seconds are printed beside those of the clock, so that other work on the machine shows.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

import sightloop
from sightloop.evaluation.predictions import integers, read_predictions
from sightloop.inference.model import Model
from sightloop.types import Pixels

T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, float, float]:
    """What it gives, seconds by the clock, seconds of all processor cores."""
    clock, cores = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - clock, time.process_time() - cores


def chosen_pairs(file: Path, samples: list[sightloop.Sample]) -> list[tuple[int, str]]:
    """The pairs that the evaluation judged: an image's place and a text, no pair twice."""
    records = read_predictions(file)[1]
    texts = list(dict.fromkeys(text for sample in samples for text in sample.captions))
    return [
        (place, texts[number])
        for place, sample in enumerate(samples)
        for number in integers(records[sample.key]["judged"]).tolist()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-d", "--data", required=True, help="images with captions")
    parser.add_argument("-m", "--model", default="nano")
    parser.add_argument("-k", type=int, default=16)
    parser.add_argument("--samples", type=int, help="of the data; without it all")
    parser.add_argument("--pairs", type=int, default=2000, help="judged one by one (2000)")
    options = parser.parse_args(arguments)
    given = {"samples": options.samples, "device": "cpu", "isolate": False}
    model: Model = sightloop.load(options.model, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        report, clock, cores = timed(
            lambda: sightloop.evaluate(
                "retrieval", options.data, model=model, rerank=[options.k], out=folder, **given
            )
        )
        dataset = sightloop.open_dataset(options.data)
        told = read_predictions(Path(folder, "predictions.jsonl"))[1]
        samples = [sample for sample in dataset if sample.key in told]
        pairs = chosen_pairs(Path(folder, "predictions.jsonl"), samples)
    drawn = np.random.default_rng(0).choice(len(pairs), min(options.pairs, len(pairs)), replace=False)
    some = [pairs[index] for index in drawn.tolist()]
    needed = sorted({place for place, _ in some})
    read = model.read((samples[place].image for place in needed), isolate=False)
    pictures = {
        place: pixels for place, pixels in zip(needed, read, strict=True) if isinstance(pixels, Pixels)
    }
    _, single_clock, single_cores = timed(
        lambda: [model.match(pictures[place], text) for place, text in some]
    )
    whole = len(pairs) / len(some)
    captions = sum(len(sample.captions) for sample in samples)
    print(
        f"{model.name}, {len(samples):,} images x {captions:,} captions, k={options.k}: {len(pairs):,} pairs"
    )
    print(f"  evaluate retrieval      {clock:9.1f} s  {cores:9.1f} processor s, reading and scoring counted")
    print(
        f"  one by one              {single_clock * whole:9.1f} s  {single_cores * whole:9.1f} processor s, "
        f"from {len(some):,} pairs"
    )
    print(
        f"  ratio                   {single_clock * whole / clock:9.1f}    {single_cores * whole / cores:9.1f}"
    )
    print(f"  text-to-image recall@10 {dict(report)[f'text-to-image recall@10, k={options.k}']:9.3f}")


if __name__ == "__main__":
    main()
