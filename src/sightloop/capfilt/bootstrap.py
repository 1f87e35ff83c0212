"""CapFilt: caption, filter, write the dataset anew (Li et al. 2022, section 3.3): a job that goes on after a kill.

Every image has its web texts and gets synthetic ones; a filter judges them all; what matches is kept, and the
evidence for every text is kept beside it. The work goes unit by unit (`bootstrap.unit`), each written whole
(`bootstrap.ledger`).
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
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch

from sightloop.capfilt.estimate import Estimate
from sightloop.capfilt.estimate import estimate as measure
from sightloop.capfilt.job import device_kind, open_job
from sightloop.capfilt.manifest import Manifest, open_manifest
from sightloop.capfilt.options import CapFiltOptions
from sightloop.capfilt.ray_workers import RayEngine
from sightloop.capfilt.report import write_report
from sightloop.capfilt.shard import Job, load_models, process_shard
from sightloop.capfilt.workers import Engine, Processes, process_shards
from sightloop.checkpoints.catalog import BUNDLED
from sightloop.data.datasets.dataset import Dataset, open_dataset
from sightloop.errors import SightloopError, UsageError, from_options, os_error_reason
from sightloop.types import Done, Failed, JsonDict, JsonMapping, Skipped

OnEvent: TypeAlias = "Callable[[Done[None] | Skipped | Failed], None]"
Found: TypeAlias = "tuple[str, str] | JsonDict"

_REPORT_EVERY = 300.0  # seconds


@dataclass(frozen=True, slots=True)
class CapFiltSummary:
    """What a bootstrap came to. texts: "web matched", "synthetic unmatched" and so on -> how many.

    samples: images looked at; written: those in the new dataset; failed: those that could not be read, as
    (shard of the source, key, reason). new: images of this call. notes: what a person should know about the job.
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
    **options: Any,
) -> CapFiltSummary:
    """Writes synthetic captions, judges them and the web's, and makes a new dataset of what matches: OUT.

    data: what `open_dataset` reads, but no stream. captioner, filter: what `load` takes; a filter that is not the
    captioner drops more of its mistakes (table 4 of the paper). The captioner may be a server that speaks OpenAI's chat
    completions, "http://host:8000/v1#model" (`bootstrap.endpoint`); it does not say the same thing twice. out: a folder
    (see `bootstrap.ledger`), which `open_dataset` and training read; the same call goes on where it was stopped. watch:
    is told of every sample. options: the fields of `bootstrap.rules.Options`.

    The result is the same, byte for byte, after any number of kills, with any number of workers and any batch size, on
    machines of one kind with one version of torch.

    Raises UsageError where OUT holds another job or another process works on it; SightloopError where a file cannot be
    written: what is done stays done, and nothing is half written.
    """
    given, folder = from_options(CapFiltOptions, options), Path(out)
    dataset = data if isinstance(data, Dataset) else open_dataset(data)
    try:
        with open_manifest(folder):
            job, about = open_job(dataset, folder, (os.fspath(captioner), os.fspath(filter)), given)
            ledger = Manifest(folder, about)
            try:
                new = _work(job, ledger, about, on_event)
                ledger.finish()
                write_report(job, ledger.done, about)
            finally:
                ledger.close()
    except OSError as error:
        raise _stopped(folder, error) from error
    return replace(summary(folder, ledger.done, new), notes=tuple(about["notes"]))


def _stopped(out: Path, error: OSError) -> SightloopError:
    what = os_error_reason(error)
    if isinstance(error.filename, str) and not Path(error.filename).is_relative_to(out):
        what += f" ({error.filename})"
    remedy = "make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "see to it"
    return SightloopError(
        f"{out}: cannot go on: {what}. What is done stays done, and nothing is half written: {remedy}, and give the "
        "same command again"
    )


def estimate(
    data: str | Path | Sequence[str | Path] | Dataset,
    *,
    captioner: str | PathLike[str] = BUNDLED,
    filter: str | PathLike[str] = BUNDLED,
    samples: int = 64,
    price: float | None = None,
    **options: Any,
) -> Estimate:
    """What `bootstrap` with the same arguments would take, measured on about `samples` images; nothing is kept.

    price: of one worker and hour, for the cost. Raises UsageError for what `bootstrap` would refuse.
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
    """The sum of what a manifest tells."""
    texts, entries = Counter[str](), [done[unit] for unit in sorted(done)]
    for entry in entries:
        texts.update(entry["texts"])
    failed = tuple((shard, key, reason) for entry in entries for shard, key, reason in entry["failed"])
    samples, written = (sum(entry[name] for entry in entries) for name in ("samples", "written"))
    return CapFiltSummary(str(out), samples, written, new, dict(texts), failed)


def _work(job: Job, ledger: Manifest, about: JsonMapping, watch: OnEvent | None) -> int:
    """Does what is missing; the number of samples that were worked on."""
    done = ledger.verify(len(job.shards))
    if watch is not None:
        for unit in sorted(done):
            for index in range(*job.shards[unit]):
                watch(Skipped(str(index), "it is done already"))
    todo = [unit for unit in range(len(job.shards)) if unit not in done]
    if not todo:
        return 0
    quarantined, new = ledger.quarantined(), 0
    began = reported = time.monotonic()

    def tell(key: str, reason: str) -> None:
        if watch is not None:
            watch(Failed(key, reason) if reason else Done(key, None))

    with closing(
        _inline(job, todo, quarantined, tell)
        if job.options.workers == 1 and job.options.engine == "local"
        else process_shards(job, _engine(job), todo, quarantined, ledger.quarantine)
    ) as found:
        for told in found:
            if isinstance(told, tuple):
                tell(*told)
                continue
            ledger.commit(told)
            new += told["samples"]
            line = {"unit": told["unit"], "samples": told["samples"], "seconds": time.monotonic() - began}
            began = time.monotonic()
            _log(job.out, line)
            if began - reported > _REPORT_EVERY:
                reported = began
                write_report(job, ledger.done, about)
    return new


def _engine(job: Job) -> Engine:
    return (
        Processes(job) if job.options.engine == "local" else RayEngine(job, device_kind(job.options.device))
    )


def _inline(
    job: Job, todo: Sequence[int], quarantined: Mapping[str, str], tell: Callable[[str, str], None]
) -> Generator[Found, None, None]:
    """The units in this process, one after the other."""
    before = torch.get_num_threads()
    torch.set_num_threads(job.options.threads or before)
    try:
        models = load_models(job)
        for unit in todo:
            yield process_shard(job, models, unit, quarantined, tell)
    finally:
        torch.set_num_threads(before)


def _log(out: Path, entry: JsonMapping) -> None:
    """How long things took: no part of the result."""
    with (out / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
