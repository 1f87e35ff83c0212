"""Units worked on by several processes: each loads the models once and takes unit after unit.

A process that dies costs nothing but time: its unit is given out again, sample by sample at first, so that one that
takes processes down is found and left out by name.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from sightread.errors import SightreadError
from sightread.pipelines.bootstrap.unit import Job, load_models, run_unit, worked

_DEATHS = 3  # of processes at one unit, with no sample to blame


def run_units(
    job: Job,
    todo: Sequence[int],
    quarantined: dict[str, str],
    quarantine: Callable[[str, str, str], None],
) -> Generator[tuple[str, str] | dict[str, Any], None, None]:
    """What `run_unit` returns for each of these units, in the order in which they end; before it, what it watches.

    quarantine(shard, key, reason): is told of a sample that took a process down twice. Raises what a process raised,
    and SightreadError where processes die at one unit and no sample is to blame.
    """
    waiting, deaths, crew = deque(todo), Counter[int](), list[_Worker]()
    try:
        for place in range(min(job.options.workers, len(todo))):
            crew.append(_Worker(job, place))
            crew[-1].give(waiting.popleft(), quarantined, 0)
        while crew:
            for pipe in wait([worker.pipe for worker in crew]):
                worker = next(worker for worker in crew if worker.pipe is pipe)
                try:
                    kind, value = worker.pipe.recv()
                except (EOFError, ConnectionError):
                    crew.remove(worker)
                    _bury(job, worker, deaths, quarantined, quarantine)
                    crew.append(_Worker(job, worker.place))
                    crew[-1].give(worker.unit, quarantined, deaths[worker.unit])
                    continue
                if kind == "error":
                    raise value
                if kind == "at":
                    worker.key = value
                else:
                    yield value
                if kind == "done":
                    worker.key = ""
                    if waiting:
                        worker.give(waiting.popleft(), quarantined, 0)
                    else:
                        crew.remove(worker)
                        worker.stop()
    finally:
        for worker in crew:
            worker.stop()


def _bury(
    job: Job,
    worker: _Worker,
    deaths: Counter[int],
    quarantined: dict[str, str],
    quarantine: Callable[[str, str, str], None],
) -> None:
    worker.stop()
    unit, status = worker.unit, worker.process.exitcode
    deaths[unit] += 1
    if worker.key:
        quarantined[worker.key] = f"took a worker process down twice (exit status {status})"
        quarantine(job.shard(unit), worker.key, quarantined[worker.key])
        deaths[unit] = 1  # there may be another one
    elif deaths[unit] >= _DEATHS:
        raise SightreadError(
            f"{job.shard(unit)}: {_DEATHS} worker processes ended there, one after the other (exit status {status}; "
            "-9 is often a lack of memory: take fewer --workers or a smaller --group); what is done stays done"
        )


class _Worker:
    """One process, and the unit that it works on. key: the sample at hand, where it goes sample by sample."""

    def __init__(self, job: Job, place: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.place, self.unit, self.key = place, -1, ""
        self.process = context.Process(target=_serve, args=(job, theirs, place), daemon=False)
        self.process.start()
        theirs.close()  # so that its death is the end of the pipe

    def give(self, unit: int, quarantined: dict[str, str], deaths: int) -> None:
        self.unit = unit
        try:
            self.pipe.send((unit, dict(quarantined), deaths > 0))
        except (BrokenPipeError, ConnectionError):
            return  # it is dead already, which the pipe's end will tell

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(job: Job, pipe: Connection, place: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def tell(key: str, reason: str) -> None:
        pipe.send(("item", (key, reason)))

    try:
        torch.set_num_threads(job.options.threads or torch.get_num_threads())
        job = replace(job, options=replace(job.options, device=_device(job.options.device, place)))
        models = load_models(job)
        while True:
            unit, quarantined, careful = pipe.recv()
            if careful:
                for index in range(*job.units[unit]):
                    key = job.dataset.key(index)
                    if key not in quarantined:
                        pipe.send(("at", key))
                        list(worked(replace(job, units=[(index, index + 1)]), models, 0, {}))
                pipe.send(("at", ""))
            pipe.send(("done", run_unit(job, models, unit, quarantined, tell)))
    except (SightreadError, OSError) as error:
        pipe.send(("error", error))
    except Exception:
        pipe.send(("error", RuntimeError(traceback.format_exc())))


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
