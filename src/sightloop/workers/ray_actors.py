"""Workers as Ray actors on this machine, or on a cluster (`RAY_ADDRESS`).

Ray only places the workers. What is done is recorded by whoever gives the requests, so a run may be started on one
machine and finished on a hundred.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from sightloop.errors import SightloopError, UsageError, install_command
from sightloop.workers.engine import LazyServer, MakeServer, Worker

if TYPE_CHECKING:
    from types import ModuleType

_TRIES, _WAIT = (
    3,
    5.0,
)  # attempts to start Ray and seconds between them: it gives up on a loaded machine (ray#65983)


class _RemoteMethod(Protocol):
    def remote(self, request: object) -> object: ...


class _ActorHandle(Protocol):
    """Ray's handle of a `_RemoteServer`."""

    @property
    def answer(self) -> _RemoteMethod: ...


class RayEngine:
    """Engine of Ray actors, each with the threads of a worker, and a GPU if the job runs on GPUs.

    Args:
        make: Makes the server in each.
        workers: Number of actors.
        threads: CPU threads of each; None for an equal share of the cluster's.
        on_gpus: Whether each has a GPU.

    Raises:
        UsageError: Ray is not installed.
        SightloopError: Ray does not start.
    """

    def __init__(self, make: MakeServer, workers: int, threads: int | None, *, on_gpus: bool) -> None:
        self._ray, self._started_here = start_ray()
        self._make = make
        cores = int(self._ray.cluster_resources().get("CPU", 0))
        threads = threads or max(1, cores // workers)
        # 0 CPUs per actor: the user asks for more workers than there are cores.
        cpus = threads if threads * workers <= cores else 0
        self._resources = {
            "num_cpus": cpus,
            "num_gpus": int(on_gpus),
            "scheduling_strategy": "SPREAD",
        }

    def start(self, number: int) -> Worker:
        """Starts an actor; if it dies, whoever gives the requests replaces it, not Ray."""
        actor = self._ray.remote(max_restarts=0, max_task_retries=0, **self._resources)(_RemoteServer)
        return Actor(self._ray, actor.remote(self._make, number, os.getcwd()))

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

    def give(self, request: object) -> None:
        """Starts the call."""
        self.call = self._handle.answer.remote(request)

    def take(self) -> list[object]:
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
    """Class of the actor. folder: the working folder, from which relative paths start."""

    def __init__(self, make: MakeServer, number: int, folder: str) -> None:
        with suppress(OSError):
            os.chdir(folder)
        self._server = LazyServer(make, number)

    def answer(self, request: object) -> list[object]:
        """All answers, which come with the last of them."""
        answers: list[object] = []
        last = self._server.answer(request, answers.append)
        return [*answers, last]


def start_ray() -> tuple[ModuleType, bool]:
    """Ray, and whether it was started by this call.

    Raises:
        UsageError: Ray is not installed.
        SightloopError: Ray does not start.
    """
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
