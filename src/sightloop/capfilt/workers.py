"""Processing of shards by several workers, each with the models loaded once.

A worker is a process of this machine (`Process`) or an actor of a Ray cluster (`ray_workers.Actor`). When one dies, its
shard is processed again; before that, each of the shard's samples is tried alone, and one that kills a worker again is
quarantined by name.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import NamedTuple, Protocol, TypeAlias

from sightloop.capfilt.options import CapFiltOptions
from sightloop.capfilt.shard import Job, Models, OnSampleDone, load_models, process_samples, process_shard
from sightloop.data.child_process import end_with_parent, without_main_script
from sightloop.errors import SightloopError
from sightloop.types import JsonDict


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


class WorkerError(NamedTuple):
    """Answer: the request failed with an exception that ends the run."""

    error: Exception


Request: TypeAlias = ProcessShard | TrySample
Answer: TypeAlias = SampleDone | ShardDone | SampleTried | WorkerError
_MAX_DEATHS = 3  # of workers at one shard, with no sample to blame


class Worker(Protocol):
    """A process that works on one request after the other."""

    def give(self, request: Request) -> None:
        """Sends a request; never raises."""
        ...

    def take(self) -> list[Answer]:
        """Answers of a worker that `Engine.ready` returned. Raises EOFError if it is dead."""
        ...

    def stop(self) -> str:
        """Ends the worker; returns how it ended, in words."""
        ...


class Engine(Protocol):
    """Creator of workers."""

    def start(self, number: int) -> Worker:
        """Starts a worker; `number`: its slot, from 0."""
        ...

    def ready(self, workers: Iterable[Worker]) -> list[Worker]:
        """Waits until some of the workers have answers or are dead, and returns those."""
        ...

    def close(self) -> None:
        """Called after all workers are stopped."""
        ...


class Server:
    """Request handler inside a worker; loads the models at the first request."""

    def __init__(self, job: Job, number: int) -> None:
        import torch

        torch.set_num_threads(job.options.threads or torch.get_num_threads())
        self._job = replace(job, options=replace(job.options, device=_device(job.options, number)))
        self._models: Models | None = None

    def answer(self, request: Request, on_sample: OnSampleDone) -> Answer:
        """Works on a request; exceptions are returned as `WorkerError`."""
        try:
            models = self._models = self._models or load_models(self._job)
            if isinstance(request, ProcessShard):
                entry = process_shard(self._job, models, request.shard, request.quarantined, on_sample)
                return ShardDone(entry)
            alone = replace(self._job, shards=[(request.sample, request.sample + 1)])
            list(process_samples(alone, models, 0, {}))
            return SampleTried()
        except (SightloopError, OSError) as error:
            return WorkerError(error)
        except Exception:
            return WorkerError(RuntimeError(traceback.format_exc()))


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


class Processes:
    """Engine of workers that are processes of this machine."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def start(self, number: int) -> Worker:
        """Starts a process (spawned, not forked)."""
        return Process(self._job, number)

    def ready(self, workers: Iterable[Worker]) -> list[Worker]:
        """Those whose pipe has data or is closed."""
        by_pipe = {worker.pipe: worker for worker in workers if isinstance(worker, Process)}
        return [by_pipe[pipe] for pipe in wait(list(by_pipe)) if isinstance(pipe, Connection)]

    def close(self) -> None:
        """Nothing to do: `Process.stop` ends each process."""


class Process:
    """A child process, which ends when its parent is killed."""

    def __init__(self, job: Job, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, child_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(job, child_end, number), daemon=False)
        with without_main_script():
            self.process.start()
        child_end.close()  # so that the pipe ends when the child dies

    def give(self, request: Request) -> None:
        """Sends the request over the pipe."""
        try:
            self.pipe.send(request)
        except (BrokenPipeError, ConnectionError):
            return  # it is dead, and `take` will raise EOFError

    def take(self) -> list[Answer]:
        """Receives one answer."""
        try:
            return [self.pipe.recv()]
        except ConnectionError as error:
            raise EOFError from error

    def stop(self) -> str:
        """Kills the process if it is alive; returns its exit status in words."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
        return f"exit status {self.process.exitcode}"


def _serve(job: Job, pipe: Connection, number: int) -> None:
    end_with_parent()
    server = Server(job, number)
    with suppress(EOFError, ConnectionError):  # the parent is gone
        while True:
            pipe.send(server.answer(pipe.recv(), lambda key, reason: pipe.send(SampleDone(key, reason))))


def _device(options: CapFiltOptions, number: int) -> str:
    """The device of a worker: its own of the list, or the GPUs in turn if the job names none."""
    import torch

    if options.devices:
        return options.devices[number % len(options.devices)]
    if options.device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{number % torch.cuda.device_count()}"
    return options.device
