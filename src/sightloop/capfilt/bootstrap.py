"""CapFilt: caption, filter, write a new dataset (Li et al. 2022, section 3.3), resumable after a kill.

A captioner adds synthetic texts to the web texts of every image, a filter scores all of them, and those that match are
kept. The scores of every text are kept as evidence. The work is done shard by shard (`capfilt.shard`); the manifest
says which shards are done (`capfilt.manifest`).
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TypeAlias

from sightloop.capfilt.estimate import Estimate
from sightloop.capfilt.estimate import estimate as measure
from sightloop.capfilt.job import check_device, device_kind, open_job
from sightloop.capfilt.manifest import Manifest, open_manifest
from sightloop.capfilt.options import CapFiltOptions
from sightloop.capfilt.refilter import check_scores, refilter_shard
from sightloop.capfilt.report import write_report
from sightloop.capfilt.shard import Job, OnSampleDone, load_models, process_shard
from sightloop.capfilt.workers import ShardServer, process_shards
from sightloop.checkpoints.catalog import BUNDLED
from sightloop.data.datasets.dataset import Dataset, open_dataset
from sightloop.errors import SightloopError, UsageError, from_options, os_error_reason
from sightloop.types import Done, Failed, JsonDict, JsonMapping, Skipped
from sightloop.workers.engine import Engine
from sightloop.workers.processes import Processes
from sightloop.workers.ray_actors import RayEngine

OnEvent: TypeAlias = "Callable[[Done[None] | Skipped | Failed], None]"
# (key of a sample, reason of its failure or ""), or the manifest entry of a finished shard.
Progress: TypeAlias = "tuple[str, str] | JsonDict"

_REPORT_EVERY = 300.0  # seconds


@dataclass(frozen=True, slots=True)
class CapFiltSummary:
    """Counts of a CapFilt run.

    Attributes:
        out: The output folder.
        samples: Number of images processed, by this call and earlier ones.
        written: Number of images in the new dataset.
        new: Number of images processed by this call.
        texts: Number of texts by source and reason ("web matched", "synthetic unmatched").
        failed: (input shard, key, reason) of the images that could not be processed.
        notes: Notes for people about models and data.
    """

    out: str
    samples: int
    written: int
    new: int
    texts: Mapping[str, int]
    failed: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...] = ()


def bootstrap(
    data: str | Path | Sequence[str | Path] | Dataset,
    *,
    out: str | Path,
    captioner: str | PathLike[str] = BUNDLED,
    filter: str | PathLike[str] = BUNDLED,
    on_event: OnEvent | None = None,
    **options: object,
) -> CapFiltSummary:
    """Writes synthetic captions, filters them and the web texts, and writes those that match as a new dataset.

    The same call resumes a run that was stopped. The output is the same, byte for byte, after any number of kills, with
    any number of workers and any batch size, on machines of one kind with one version of torch; a remote captioner
    alone may give other texts each time. With another `keep`, `threshold` or `top`, the texts of a finished run are
    filtered again by the scores in its evidence, without a model.

    Args:
        data: What `open_dataset` reads, except a stream.
        out: The output folder (see `capfilt.manifest`), which `open_dataset` and training read.
        captioner: What `load` takes, or the address of a server with OpenAI's chat completions API,
            "http://host:8000/v1#model" (see `capfilt.remote_captioner`).
        filter: What `load` takes. Other weights than the captioner's drop more of its mistakes (table 4 of the paper).
        on_event: Called for every sample.
        **options: The fields of `capfilt.options.CapFiltOptions`.

    Returns:
        The counts of the run.

    Raises:
        UsageError: OUT holds a run with other settings, or another process works on it.
        SightloopError: A file cannot be written; finished shards stay valid, and no file is half written.
    """
    run_options, folder = from_options(CapFiltOptions, options), Path(out)
    dataset = data if isinstance(data, Dataset) else open_dataset(data)
    try:
        with open_manifest(folder):
            job, about = open_job(dataset, folder, (os.fspath(captioner), os.fspath(filter)), run_options)
            manifest = Manifest(folder, about, check_scores)
            try:
                new = _process_missing(job, manifest, about, on_event)
                manifest.finish()
                write_report(job, manifest.done, about)
            finally:
                manifest.close()
    except OSError as error:
        raise _write_error(folder, error) from error
    notes = list(about["notes"])
    if damaged := list(dict.fromkeys(manifest.damaged)):
        files = ", ".join(damaged[:3]) + (", ..." if len(damaged) > 3 else "")
        notes.append(
            f"{files}: not as they were written (their checksums differ); their shards were done again"
        )
    if manifest.outdated:
        rule = ", ".join(f"{name} {value}" for name, value in run_options.rule.items())
        notes.append(
            f"{len(manifest.outdated):,} shards were filtered again by the scores in evidence/ ({rule})"
        )
    return replace(summary(folder, manifest.done, new), notes=tuple(notes))


def _write_error(out: Path, error: OSError) -> SightloopError:
    reason = os_error_reason(error)
    if isinstance(error.filename, str) and not Path(error.filename).is_relative_to(out):
        reason += f" ({error.filename})"
    remedy = "make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "mend that"
    return SightloopError(
        f"{out}: cannot continue: {reason}; {remedy}, and run the same command again: it resumes, and no file is half "
        "written"
    )


def estimate(
    data: str | Path | Sequence[str | Path] | Dataset,
    *,
    captioner: str | PathLike[str] = BUNDLED,
    filter: str | PathLike[str] = BUNDLED,
    samples: int = 64,
    price: float | None = None,
    **options: object,
) -> Estimate:
    """Estimates time, size and cost of `bootstrap` with the same arguments; writes no output.

    Args:
        data: As for `bootstrap`.
        captioner: As for `bootstrap`.
        filter: As for `bootstrap`.
        samples: Number of images that are processed to measure.
        price: Price of one worker for an hour, in any currency.
        **options: As for `bootstrap`.

    Raises:
        UsageError: `bootstrap` would refuse these arguments.
    """
    if samples < 1:
        raise UsageError(f"samples={samples}: must be at least 1")
    if price is not None and not 0 <= price < math.inf:
        raise UsageError(f"price={price}: must be 0 or more")
    dataset = data if isinstance(data, Dataset) else open_dataset(data)
    models = (os.fspath(captioner), os.fspath(filter))
    job, _ = open_job(dataset, None, models, from_options(CapFiltOptions, options))
    return measure(job, samples, price)


def summary(out: Path, done: Mapping[int, JsonMapping], new: int = 0) -> CapFiltSummary:
    """Sums of the manifest entries of finished shards, by index."""
    texts, entries = Counter[str](), [done[index] for index in sorted(done)]
    for entry in entries:
        texts.update(entry["texts"])
    failed = tuple((shard, key, reason) for entry in entries for shard, key, reason in entry["failed"])
    samples, written = (sum(entry[name] for entry in entries) for name in ("samples", "written"))
    return CapFiltSummary(str(out), samples, written, new, dict(texts), failed)


def _process_missing(job: Job, manifest: Manifest, about: JsonMapping, on_event: OnEvent | None) -> int:
    """Processes the shards that are not done; returns the number of their samples."""
    done = manifest.verify(len(job.shards))
    for shard in manifest.outdated:
        manifest.commit(refilter_shard(job, shard))
    if on_event is not None:
        for shard in sorted(done):
            for index in range(*job.shards[shard]):
                on_event(Skipped(str(index), "it is done already"))
    todo = [shard for shard in range(len(job.shards)) if shard not in done]
    if not todo:
        return 0
    check_device(job, about)
    quarantined, new = manifest.quarantined(), 0
    started = reported = time.monotonic()

    def report_sample(key: str, reason: str) -> None:
        if on_event is not None:
            on_event(Failed(key, reason) if reason else Done(key, None))

    with closing(
        _process_here(job, todo, quarantined, report_sample)
        if job.options.workers == 1 and job.options.engine == "local"
        else process_shards(job, _engine(job), todo, quarantined, manifest.quarantine)
    ) as progress:
        for event in progress:
            if isinstance(event, tuple):
                report_sample(*event)
                continue
            manifest.commit(event)
            new += event["samples"]
            line = {"unit": event["unit"], "samples": event["samples"], "seconds": time.monotonic() - started}
            started = time.monotonic()
            _log(job.out, line)
            if started - reported > _REPORT_EVERY:
                reported = started
                write_report(job, manifest.done, about)
    return new


def _engine(job: Job) -> Engine:
    if job.options.engine == "local":
        return Processes(partial(ShardServer, job))
    make = partial(ShardServer, replace(job, out=job.out.absolute()))
    on_gpus = device_kind(job.options.device) == "cuda"
    return RayEngine(make, job.options.workers, job.options.threads or 1, on_gpus=on_gpus)


def _process_here(
    job: Job, todo: Sequence[int], quarantined: Mapping[str, str], on_sample: OnSampleDone
) -> Generator[Progress, None, None]:
    """Processes shards in this process, one after the other."""
    import torch  # here, because a finished run does not need it

    threads_before = torch.get_num_threads()
    torch.set_num_threads(job.options.threads or threads_before)
    try:
        models = load_models(job)
        for shard in todo:
            yield process_shard(job, models, shard, quarantined, on_sample)
    finally:
        torch.set_num_threads(threads_before)


def _log(out: Path, entry: JsonMapping) -> None:
    """Adds a line about time to log.jsonl, which is no part of the result."""
    with (out / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
