"""Workers as Ray actors: on this machine, or on all of a cluster (`RAY_ADDRESS`) that shares the data's and OUT's disk.

Ray only says where a worker lives: what is done, and proof of it, stays with the ledger, so a job may be begun on one
machine and ended on a hundred.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sightloop.capfilt.shard import Job
from sightloop.capfilt.workers import Answer, Request, Server, Worker
from sightloop.errors import SightloopError, UsageError, install_command

if TYPE_CHECKING:
    from types import ModuleType

_TRIES, _WAIT = 3, 5.0  # to start: a loaded machine is slow, and Ray gives up (ray#65983)


class RayEngine:
    """Actors, each with the threads of a worker, and a GPU where the job wants one."""

    def __init__(self, job: Job, kind: str) -> None:
        """kind: "cpu" or "cuda". Raises `UsageError` without Ray, SightloopError where it does not start."""
        self._ray, self._mine = _started()
        self._job = replace(job, out=job.out.absolute())
        threads, total = job.options.threads or 1, self._ray.cluster_resources().get("CPU", 0)
        cpus = (
            threads if threads * job.options.workers <= total else 0
        )  # 0: more workers than cores, by request
        self._needs = {"num_cpus": cpus, "num_gpus": int(kind == "cuda"), "scheduling_strategy": "SPREAD"}

    def start(self, place: int) -> Worker:
        """A new actor; one that dies is not brought back by Ray, but by `run_units`."""
        kind: Any = self._ray.remote(max_restarts=0, max_task_retries=0, **self._needs)(_Remote)
        return Actor(self._ray, kind.remote(self._job, place, os.getcwd()))

    def ready(self, workers: Iterable[Worker]) -> list[Worker]:
        """Those whose call has ended, well or not."""
        by_call = {worker.call: worker for worker in workers if isinstance(worker, Actor)}
        done, _ = self._ray.wait(list(by_call), num_returns=1)
        return [by_call[call] for call in done]

    def close(self) -> None:
        """Leaves a cluster that was there before as it was."""
        if self._mine:
            self._ray.shutdown()


class Actor:
    """One actor, and the call that it is at."""

    def __init__(self, ray: Any, handle: Any) -> None:
        self._ray, self._handle = ray, handle
        self.call: Any = None
        self._death = "was stopped"

    def give(self, request: Request) -> None:
        """The next call."""
        self.call = self._handle.answer.remote(request)

    def take(self) -> list[Answer]:
        """All that the call said."""
        try:
            return self._ray.get(self.call)
        except self._ray.exceptions.RayError as error:  # the actor, its node, or the way to it has gone
            self._death = type(error).__name__
            raise EOFError from error

    def stop(self) -> str:
        """Kills it, if it is not dead."""
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._handle)
        return self._death


class _Remote:
    """What runs in the actor."""

    def __init__(self, job: Job, place: int, folder: str) -> None:
        with suppress(OSError):  # where relative paths of the data start from
            os.chdir(folder)
        self._server = Server(job, place)

    def answer(self, request: Request) -> list[Answer]:
        """The items of a unit come with its end."""
        items: list[Answer] = []
        last = self._server.answer(request, lambda key, reason: items.append(("item", (key, reason))))
        return [*items, last]


def _started() -> tuple[ModuleType, bool]:
    """Ray, and whether it was started here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing phones home
    try:
        import ray
    except ImportError as error:
        raise UsageError(f"engine ray: Ray is not installed: {install_command('ray')}") from error
    if ray.is_initialized():
        return ray, False
    why = ""
    for attempt in range(_TRIES):
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            return ray, True
        except Exception as error:  # which is what Ray raises of its own, where it starts too slowly
            why = str(error).strip().partition("\n")[0]
            ray.shutdown()
            time.sleep(_WAIT * (attempt + 1))
    raise SightloopError(
        f"Ray did not start in {_TRIES} tries ({why}); is the machine busy, or RAY_ADDRESS wrong?"
    )
