"""Units worked on by several workers: each loads the models once and takes unit after unit.

A worker is a process of this machine (`Process`) or an actor of a cluster (`cluster.Actor`). One that dies costs
nothing but time: its unit is given out again, sample by sample at first, so that one that takes workers down is found
and left out by name.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, TypeAlias

import torch

from sightloop.capfilt.shard import Job, Models, OnImage, load_models, process_shard, worked
from sightloop.errors import SightloopError
from sightloop.types import JsonDict

# ("unit", number, quarantined) to work on one; ("try", number, index) to see whether one sample kills.
Request: TypeAlias = "tuple[str, int, Any]"
# ("item", (key, reason)), ("unit", the manifest's entry), ("try", None) or ("error", exception)
Answer: TypeAlias = "tuple[str, Any]"
_DEATHS = 3  # of workers at one unit, with no sample to blame


class Worker(Protocol):
    """Works on one request after the other, somewhere."""

    def give(self, request: Request) -> None:
        """Hands over a request; never raises."""
        ...

    def take(self) -> list[Answer]:
        """What it says, when it is ready. Raises EOFError where it is dead."""
        ...

    def stop(self) -> str:
        """Ends it; how it ended, in words."""
        ...


class Engine(Protocol):
    """Where workers live."""

    def start(self, place: int) -> Worker:
        """A new one for a place, counted from 0."""
        ...

    def ready(self, workers: Iterable[Worker]) -> list[Worker]:
        """Waits until some of them have something to say, or are dead."""
        ...

    def close(self) -> None:
        """All workers are stopped."""
        ...


class Server:
    """A worker's own side: the models, loaded once."""

    def __init__(self, job: Job, place: int) -> None:
        torch.set_num_threads(job.options.threads or torch.get_num_threads())
        self._job = replace(job, options=replace(job.options, device=_device(job.options.device, place)))
        self._models: Models | None = None

    def answer(self, request: Request, watch: OnImage) -> Answer:
        """Does what is asked; errors are an answer too."""
        kind, unit, given = request
        try:
            models = self._models = self._models or load_models(self._job)
            if kind == "unit":
                return kind, process_shard(self._job, models, unit, given, watch)
            list(worked(replace(self._job, shards=[(given, given + 1)]), models, 0, {}))
            return kind, None
        except (SightloopError, OSError) as error:
            return "error", error
        except Exception:
            return "error", RuntimeError(traceback.format_exc())


@dataclass(eq=False)
class _WorkerSlot:
    """A worker and what it is at. trying: samples of the unit to be looked at one by one, the first one now."""

    number: int
    worker: Worker
    unit: int
    trying: deque[int] = field(default_factory=deque[int])


def process_shards(
    job: Job,
    engine: Engine,
    todo: Sequence[int],
    quarantined: dict[str, str],
    quarantine: Callable[[str, str, str], None],
) -> Generator[tuple[str, str] | JsonDict, None, None]:
    """What `run_unit` returns for each of these units, in the order in which they end; before it, what it watches.

    quarantine(shard, key, reason): is told of a sample that took a worker down twice. Raises what a worker raised, and
    SightloopError where workers die at one unit and no sample is to blame.
    """
    waiting, deaths, crew = deque(todo), Counter[int](), list[_WorkerSlot]()
    try:
        for number in range(min(job.options.workers, len(todo))):
            crew.append(_WorkerSlot(number, engine.start(number), waiting.popleft()))
            _give(crew[-1], quarantined)
        while crew:
            ready = engine.ready([place.worker for place in crew])
            for place in [place for place in crew if place.worker in ready]:
                try:
                    answers = place.worker.take()
                except EOFError:
                    _bury(job, place, deaths, quarantined, quarantine)
                    place.worker = engine.start(place.number)
                    _give(place, quarantined)
                    continue
                for kind, value in answers:
                    if kind == "error":
                        raise value
                    if kind in ("item", "unit"):
                        yield value
                    if kind == "item":
                        continue
                    if place.trying:
                        place.trying.popleft()
                    elif waiting:
                        place.unit = waiting.popleft()
                    else:
                        crew.remove(place)
                        place.worker.stop()
                        continue
                    _give(place, quarantined)
    finally:
        for place in crew:
            place.worker.stop()
        engine.close()


def _give(place: _WorkerSlot, quarantined: dict[str, str]) -> None:
    if place.trying:
        place.worker.give(("try", place.unit, place.trying[0]))
    else:
        place.worker.give(("unit", place.unit, dict(quarantined)))


def _bury(
    job: Job,
    place: _WorkerSlot,
    deaths: Counter[int],
    quarantined: dict[str, str],
    quarantine: Callable[[str, str, str], None],
) -> None:
    """Finds out who is to blame, and what is to be done by the next worker of this place."""
    how, unit = place.worker.stop(), place.unit
    if place.trying:
        index = place.trying.popleft()
        key = job.dataset.key(index)
        quarantined[key] = f"took a worker down twice ({how})"
        quarantine(job.dataset.source_name(index), key, quarantined[key])
        return
    deaths[unit] += 1
    if deaths[unit] >= _DEATHS:
        raise SightloopError(
            f"{job.shard(unit)}: {_DEATHS} workers ended there, one after the other ({how}; exit status -9 is often a "
            "lack of memory: take fewer --workers or a smaller --group); what is done stays done"
        )
    keys = ((index, job.dataset.key(index)) for index in range(*job.shards[unit]))
    place.trying.extend(index for index, key in keys if key not in quarantined)


class Processes:
    """Workers on this machine."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def start(self, place: int) -> Worker:
        """A process of its own, never a fork."""
        return Process(self._job, place)

    def ready(self, workers: Iterable[Worker]) -> list[Worker]:
        """Those whose pipe says something, or is broken."""
        by_pipe = {worker.pipe: worker for worker in workers if isinstance(worker, Process)}
        return [by_pipe[pipe] for pipe in wait(list(by_pipe)) if isinstance(pipe, Connection)]

    def close(self) -> None:
        """Nothing is left behind."""


class Process:
    """A child that a killed parent takes along."""

    def __init__(self, job: Job, place: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(job, theirs, place), daemon=False)
        with _without_main_script():
            self.process.start()
        theirs.close()  # so that its death is the end of the pipe

    def give(self, request: Request) -> None:
        """Over the pipe."""
        try:
            self.pipe.send(request)
        except (BrokenPipeError, ConnectionError):
            return  # it is dead already, which the pipe's end will tell

    def take(self) -> list[Answer]:
        """One answer."""
        try:
            return [self.pipe.recv()]
        except ConnectionError as error:
            raise EOFError from error

    def stop(self) -> str:
        """Kills it, if it is not dead."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
        return f"exit status {self.process.exitcode}"


@contextmanager
def _without_main_script() -> Generator[None]:
    """Hides the main script from multiprocessing, which would run it again in the new process.

    The workers need nothing of it, and a script without `if __name__ == "__main__":` would start workers of its own.
    """
    main = vars(sys.modules["__main__"])
    hidden = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    main.pop("__file__", None)
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(hidden)


def _serve(job: Job, pipe: Connection, place: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    server = Server(job, place)
    with suppress(EOFError, ConnectionError):  # the parent has gone
        while True:
            pipe.send(server.answer(pipe.recv(), lambda key, reason: pipe.send(("item", (key, reason)))))


def _end_with_parent() -> None:
    """A parent that is killed takes its workers along."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _device(name: str, place: int) -> str:
    """The GPUs in turn, where none is named."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{place % torch.cuda.device_count()}"
    return name
