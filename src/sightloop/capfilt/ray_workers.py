"""Workers as Ray actors on this machine, or on a cluster (`RAY_ADDRESS`) that shares the disk of the data and of OUT.

Ray only places the workers. What is done is recorded in the manifest, so a run may be started on one machine and
finished on a hundred.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from sightloop.capfilt.shard import Job
from sightloop.capfilt.workers import Answer, Request, SampleDone, Server, Worker
from sightloop.errors import SightloopError, UsageError, install_command

if TYPE_CHECKING:
    from types import ModuleType

_TRIES, _WAIT = (
    3,
    5.0,
)  # attempts to start Ray and seconds between them: it gives up on a loaded machine (ray#65983)


class _RemoteMethod(Protocol):
    def remote(self, request: Request) -> object: ...


class _ActorHandle(Protocol):
    """Ray's handle of a `_RemoteServer`."""

    @property
    def answer(self) -> _RemoteMethod: ...


class RayEngine:
    """Engine of Ray actors, each with the threads of a worker, and a GPU if the job runs on GPUs.

    Args:
        job: The job.
        kind: Kind of device, "cpu" or "cuda".

    Raises:
        UsageError: Ray is not installed.
        SightloopError: Ray does not start.
    """

    def __init__(self, job: Job, kind: str) -> None:
        self._ray, self._started_here = _start_ray()
        self._job = replace(job, out=job.out.absolute())
        threads, cores = job.options.threads or 1, self._ray.cluster_resources().get("CPU", 0)
        # 0 CPUs per actor: the user asks for more workers than there are cores.
        cpus = threads if threads * job.options.workers <= cores else 0
        self._resources = {
            "num_cpus": cpus,
            "num_gpus": int(kind == "cuda"),
            "scheduling_strategy": "SPREAD",
        }

    def start(self, number: int) -> Worker:
        """Starts an actor; if it dies, `process_shards` replaces it, not Ray."""
        actor = self._ray.remote(max_restarts=0, max_task_retries=0, **self._resources)(_RemoteServer)
        return Actor(self._ray, actor.remote(self._job, number, os.getcwd()))

    def ready(self, workers: Iterable[Worker]) -> list[Worker]:
        """Those whose call has ended or failed."""
        by_call = {worker.call: worker for worker in workers if isinstance(worker, Actor)}
        done, _ = self._ray.wait(list(by_call), num_returns=1)
        return [by_call[call] for call in done]

    def close(self) -> None:
        """Ends Ray if it was started here; a cluster that ran before is left alone."""
        if self._started_here:
            self._ray.shutdown()


class Actor:
    """A Ray actor and its call in work."""

    def __init__(self, ray: ModuleType, handle: _ActorHandle) -> None:
        self._ray, self._handle = ray, handle
        self.call: object = None
        self._ending = "was stopped"

    def give(self, request: Request) -> None:
        """Starts the call."""
        self.call = self._handle.answer.remote(request)

    def take(self) -> list[Answer]:
        """All answers of the call."""
        try:
            return self._ray.get(self.call)
        except self._ray.exceptions.RayError as error:  # the actor, its node, or the network is down
            self._ending = type(error).__name__
            raise EOFError from error

    def stop(self) -> str:
        """Kills the actor if it is alive; returns how it ended."""
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._handle)
        return self._ending


class _RemoteServer:
    """Class of the actor. folder: the working folder, from which relative paths of the data start."""

    def __init__(self, job: Job, number: int, folder: str) -> None:
        with suppress(OSError):
            os.chdir(folder)
        self._server = Server(job, number)

    def answer(self, request: Request) -> list[Answer]:
        """The answers for the samples of a shard come with its end."""
        answers: list[Answer] = []
        last = self._server.answer(request, lambda key, reason: answers.append(SampleDone(key, reason)))
        return [*answers, last]


def _start_ray() -> tuple[ModuleType, bool]:
    """Ray, and whether it was started here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    try:
        import ray
    except ImportError as error:
        raise UsageError(f"engine ray: Ray is not installed: {install_command('ray')}") from error
    if ray.is_initialized():
        return ray, False
    reason = ""
    for attempt in range(_TRIES):
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            return ray, True
        except Exception as error:  # Ray raises bare Exception where it starts too slowly
            reason = str(error).strip().partition("\n")[0]
            ray.shutdown()
            time.sleep(_WAIT * (attempt + 1))
    raise SightloopError(
        f"Ray did not start in {_TRIES} tries ({reason}); is the machine busy, or RAY_ADDRESS wrong?"
    )
