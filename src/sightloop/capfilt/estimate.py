"""Estimate of a CapFilt run's time, size and cost, measured on a sample of the data; OUT is not written."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from sightloop.capfilt.shard import Job, load_models, process_shard
from sightloop.data.shuffle import shuffled_index
from sightloop.types import JsonDict


@dataclass(frozen=True, slots=True)
class Estimate:
    """Estimate for a number of images.

    Attributes:
        samples: Number of images that the estimate is for.
        measured: Number of images that were processed.
        workers: Number of workers, which are assumed not to slow each other down (on one machine they do).
        price: Price of one worker for an hour, in any currency; None if unknown.
        images_per_second: Speed of one worker.
        model_seconds: Seconds to load the models.
        bytes_per_image: Bytes of the output shards and the evidence per image.
        texts: Number of texts by source and reason, as in `CapFiltSummary`, of the measured images.
        failed: Number of the measured images that failed.
    """

    samples: int
    measured: int
    workers: int
    price: float | None
    images_per_second: float
    model_seconds: float
    bytes_per_image: float
    texts: dict[str, int]
    failed: int

    @property
    def hours(self) -> float:
        """Hours from start to end, with loading the models."""
        return (self.samples / self.images_per_second / self.workers + self.model_seconds) / 3600

    @property
    def bytes(self) -> int:
        """Bytes of the output shards and the evidence."""
        return round(self.bytes_per_image * self.samples)

    @property
    def cost(self) -> float | None:
        """Hours of all workers times the price; None without a price."""
        return None if self.price is None else round(self.price * self.hours * self.workers, 2)

    def of(self, samples: int) -> Estimate:
        """The estimate for another number of images like these."""
        return replace(self, samples=samples)

    def to_json(self) -> JsonDict:
        """As JSON values, with the estimates for 10^4 to 10^9 images."""
        totals = {name: getattr(self, name) for name in ("hours", "bytes", "cost")}
        others = (self.of(10**power) for power in range(4, 10))
        scales = [{n: getattr(e, n) for n in ("samples", "hours", "bytes", "cost")} for e in others]
        return asdict(self) | totals | {"scales": scales}


def estimate(job: Job, samples: int = 64, price: float | None = None) -> Estimate:
    """Processes a random sample of the data and measures it.

    The first group is processed twice and counted once: the first time pays for one-time costs.

    Args:
        job: The job.
        samples: Number of images, drawn evenly by the job's seed.
        price: Price of one worker for an hour, in any currency.
    """
    import torch

    total, options = len(job.dataset), job.options
    count = min(samples, total)
    indices = shuffled_index(np.arange(count, dtype=np.int64), count=total, seed=options.seed, epoch=0)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(options.threads or threads_before)
    try:
        began = time.perf_counter()
        models = load_models(job)
        loaded = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="sightloop-") as folder:
            (Path(folder) / "evidence").mkdir()
            trial = replace(
                job,
                dataset=job.dataset.select(np.sort(indices)),
                out=Path(folder),
                shards=[(0, min(count, options.group or 8)), (0, count)],
            )
            process_shard(trial, models, 0, {})
            start = time.perf_counter()
            entry = process_shard(trial, models, 1, {})
            seconds = time.perf_counter() - start
    finally:
        torch.set_num_threads(threads_before)
    return Estimate(
        samples=total,
        measured=count,
        workers=options.workers,
        price=price,
        images_per_second=count / seconds,
        model_seconds=loaded - began,
        bytes_per_image=(entry["bytes"] + entry["evidence_bytes"]) / count,
        texts=dict(Counter(entry["texts"])),
        failed=len(entry["failed"]),
    )
