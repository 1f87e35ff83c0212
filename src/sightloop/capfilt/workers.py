"""Processing of shards by several workers, each with the models loaded once.

When a worker dies, its shard is processed again; before that, each of the shard's samples is tried alone, and one that
kills a worker again is quarantined by name.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from sightloop.capfilt.shard import Job, load_models, process_samples, process_shard
from sightloop.errors import SightloopError
from sightloop.types import JsonDict
from sightloop.workers.engine import Engine, Worker, WorkerError


class ProcessShard(NamedTuple):
    """Request to process a shard; `quarantined`: key and reason of samples that must not be read."""

    shard: int
    quarantined: dict[str, str]


class TrySample(NamedTuple):
    """Request to process one sample of a shard, by its index in the dataset, to see whether it kills the worker."""

    shard: int
    sample: int


class SampleDone(NamedTuple):
    """Answer: a sample of the shard in work was processed; `reason`: of its failure, or ""."""

    key: str
    reason: str


class ShardDone(NamedTuple):
    """Answer: the shard is done; `entry`: its manifest entry."""

    entry: JsonDict


class SampleTried(NamedTuple):
    """Answer: the worker has survived a `TrySample`."""


_MAX_DEATHS = 3  # of workers at one shard, with no sample to blame


class ShardServer:
    """What answers inside a worker, with the models of the job."""

    def __init__(self, job: Job, number: int) -> None:
        import torch

        from sightloop.inference.load import device_of_worker

        options = job.options
        torch.set_num_threads(options.threads or torch.get_num_threads())
        device = device_of_worker(options.device, number, options.devices or ())
        self._job = replace(job, options=replace(options, device=device))
        self._models = load_models(self._job)

    def answer(self, request: object, send: Callable[[object], None]) -> ShardDone | SampleTried:
        """Works on a `ProcessShard` or a `TrySample`."""
        if isinstance(request, TrySample):
            alone = replace(self._job, shards=[(request.sample, request.sample + 1)])
            list(process_samples(alone, self._models, 0, {}))
            return SampleTried()
        assert isinstance(request, ProcessShard)
        return ShardDone(
            process_shard(
                self._job,
                self._models,
                request.shard,
                request.quarantined,
                lambda key, reason: send(SampleDone(key, reason)),
            )
        )


@dataclass(eq=False)
class _WorkerSlot:
    """A worker and its work.

    Attributes:
        number: From 0; decides the GPU.
        worker: The worker; replaced when it dies.
        shard: Index of the shard in work.
        to_try: Dataset indices of samples to try alone before the shard; the first of them is in work.
    """

    number: int
    worker: Worker
    shard: int
    to_try: deque[int] = field(default_factory=deque[int])


def process_shards(
    job: Job,
    engine: Engine,
    todo: Sequence[int],
    quarantined: dict[str, str],
    quarantine: Callable[[str, str, str], None],
) -> Generator[tuple[str, str] | JsonDict, None, None]:
    """Processes shards by several workers.

    Args:
        job: The job.
        engine: Creator of the workers.
        todo: Indices of the shards.
        quarantined: Key and reason of samples that are not read; extended by those that kill workers.
        quarantine: Called with input shard, key and reason of a sample that killed a worker twice.

    Yields:
        (key, reason of its failure or "") of each sample, and the manifest entry of each shard when it is done.

    Raises:
        SightloopError: Workers die at one shard and no sample is to blame. Also the exception of a worker.
    """
    waiting, deaths, slots = deque(todo), Counter[int](), list[_WorkerSlot]()
    try:
        for number in range(min(job.options.workers, len(todo))):
            slots.append(_WorkerSlot(number, engine.start(number), waiting.popleft()))
            _send_next(slots[-1], quarantined)
        while slots:
            ready = engine.ready([slot.worker for slot in slots])
            for slot in [slot for slot in slots if slot.worker in ready]:
                try:
                    answers = slot.worker.take()
                except EOFError:
                    _handle_death(job, slot, deaths, quarantined, quarantine)
                    slot.worker = engine.start(slot.number)
                    _send_next(slot, quarantined)
                    continue
                for answer in answers:
                    if isinstance(answer, WorkerError):
                        raise answer.error
                    if isinstance(answer, SampleDone):
                        yield answer
                        continue
                    if isinstance(answer, ShardDone):
                        yield answer.entry
                    if slot.to_try:
                        slot.to_try.popleft()
                    elif waiting:
                        slot.shard = waiting.popleft()
                    else:
                        slots.remove(slot)
                        slot.worker.stop()
                        continue
                    _send_next(slot, quarantined)
    finally:
        for slot in slots:
            slot.worker.stop()
        engine.close()


def _send_next(slot: _WorkerSlot, quarantined: dict[str, str]) -> None:
    if slot.to_try:
        slot.worker.give(TrySample(slot.shard, slot.to_try[0]))
    else:
        slot.worker.give(ProcessShard(slot.shard, dict(quarantined)))


def _handle_death(
    job: Job,
    slot: _WorkerSlot,
    deaths: Counter[int],
    quarantined: dict[str, str],
    quarantine: Callable[[str, str, str], None],
) -> None:
    """Quarantines the sample that was being tried; if it was a whole shard, has its samples tried one by one."""
    ending, shard = slot.worker.stop(), slot.shard
    if slot.to_try:
        index = slot.to_try.popleft()
        key = job.dataset.key(index)
        quarantined[key] = f"took a worker down twice ({ending})"
        quarantine(job.dataset.source_name(index), key, quarantined[key])
        return
    deaths[shard] += 1
    if deaths[shard] >= _MAX_DEATHS:
        raise SightloopError(
            f"{job.shard_name(shard)}: {_MAX_DEATHS} workers died at it, one after the other ({ending}; exit status "
            "-9 often means too little memory: use fewer --workers or a smaller --group); finished shards stay done"
        )
    keys = ((index, job.dataset.key(index)) for index in range(*job.shards[shard]))
    slot.to_try.extend(index for index, key in keys if key not in quarantined)
