"""What a bootstrap will take: a sample of the data, worked on as the job would, and nothing written to OUT."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sightloop.capfilt.shard import Job, load_models, process_shard
from sightloop.data.shuffle import shuffled_index
from sightloop.types import JsonDict


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of `samples` images, from `measured` of them.

    images_per_second: of one worker. hours: of the workers asked for, as if they did not hinder each other (on one
    machine they do), with model_seconds, to load the models. bytes: of the new shards and the evidence. cost: hours of
    all workers times the price. texts: as in `Summary`, of the measured. failed: of the measured.
    """

    samples: int
    measured: int
    workers: int
    price: float | None
    images_per_second: float
    model_seconds: float
    bytes_per_picture: float
    texts: dict[str, int]
    failed: int

    @property
    def hours(self) -> float:
        """From the start to the end."""
        return (self.samples / self.images_per_second / self.workers + self.model_seconds) / 3600

    @property
    def bytes(self) -> int:
        """On the disk."""
        return round(self.bytes_per_picture * self.samples)

    @property
    def cost(self) -> float | None:
        """None without a price."""
        return None if self.price is None else round(self.price * self.hours * self.workers, 2)

    def of(self, samples: int) -> Estimate:
        """The same for another number of images like these."""
        return replace(self, samples=samples)

    def told(self) -> JsonDict:
        """As JSON values, with the same for 10^4 to 10^9 images."""
        own = {name: getattr(self, name) for name in ("hours", "bytes", "cost")}
        others = (self.of(10**power) for power in range(4, 10))
        scales = [{n: getattr(e, n) for n in ("samples", "hours", "bytes", "cost")} for e in others]
        return asdict(self) | own | {"scales": scales}


def estimate(job: Job, samples: int = 64, price: float | None = None) -> Estimate:
    """Works on about `samples` records drawn evenly by the seed. price: of a worker and hour, in any currency.

    The first group, which pays for what is made once, is worked on twice and counted once.
    """
    whole, options = len(job.dataset), job.options
    count = min(samples, whole)
    places = shuffled_index(np.arange(count, dtype=np.int64), count=whole, seed=options.seed, epoch=0)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or before)
    try:
        began = time.perf_counter()
        models = load_models(job)
        loaded = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="sightloop-") as folder:
            (Path(folder) / "evidence").mkdir()
            trial = replace(
                job,
                dataset=job.dataset.select(np.sort(places)),
                out=Path(folder),
                shards=[(0, min(count, options.group or 8)), (0, count)],
            )
            process_shard(trial, models, 0, {})
            start = time.perf_counter()
            entry = process_shard(trial, models, 1, {})
            seconds = time.perf_counter() - start
    finally:
        torch.set_num_threads(before)
    return Estimate(
        samples=whole,
        measured=count,
        workers=options.workers,
        price=price,
        images_per_second=count / seconds,
        model_seconds=loaded - began,
        bytes_per_picture=(entry["bytes"] + entry["evidence_bytes"]) / count,
        texts=dict(Counter(entry["texts"])),
        failed=len(entry["failed"]),
    )
