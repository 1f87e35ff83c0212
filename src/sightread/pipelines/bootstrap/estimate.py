"""What a bootstrap will take: a sample of the data, worked on as the job would, and nothing written to OUT."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sightread.data.order import position
from sightread.pipelines.bootstrap.unit import Job, load_models, run_unit


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of `samples` pictures, from `measured` of them. hours: of the workers asked for, as if they did not hinder each
    other (on one machine they do); model_seconds: to load the models once. bytes: of the new shards and the evidence.
    cost: hours of all workers times the price. texts: as in `Summary`, of the measured. failed: of the measured.
    """

    samples: int
    measured: int
    pictures_per_second: float
    model_seconds: float
    hours: float
    bytes: int
    cost: float | None
    texts: dict[str, int]
    failed: int


def estimate(job: Job, samples: int = 64, price: float | None = None) -> Estimate:
    """Works on about `samples` records drawn evenly by the seed. price: of a worker and hour, in any currency.

    The first group, which pays for what is made once, is worked on twice and counted once.
    """
    whole, options = len(job.dataset), job.options
    count = min(samples, whole)
    places = position(np.arange(count, dtype=np.int64), count=whole, seed=options.seed, epoch=0)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or before)
    try:
        began = time.perf_counter()
        models = load_models(job)
        loaded = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="sightread-") as folder:
            (Path(folder) / "evidence").mkdir()
            trial = replace(
                job,
                dataset=job.dataset.select(np.sort(places)),
                out=Path(folder),
                units=[(0, min(count, options.group or 8)), (0, count)],
            )
            run_unit(trial, models, 0, {})
            start = time.perf_counter()
            entry = run_unit(trial, models, 1, {})
            seconds = time.perf_counter() - start
    finally:
        torch.set_num_threads(before)
    hours = whole / count * seconds / options.workers / 3600
    return Estimate(
        samples=whole,
        measured=count,
        pictures_per_second=round(count / seconds, 3),
        model_seconds=round(loaded - began, 2),
        hours=round(hours, 8),
        bytes=round(whole / count * (entry["bytes"] + entry["evidence_bytes"])),
        cost=None if price is None else round(price * hours * options.workers, 2),
        texts=dict(Counter(entry["texts"])),
        failed=len(entry["failed"]),
    )
