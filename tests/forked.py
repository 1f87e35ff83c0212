"""Processes of distributed tests: forked from one that imported torch and the training loop once, not started anew.

A process that `torchrun` starts takes seconds for its imports, and tests start dozens. The one that is forked has run
nothing: no thread, no gradient.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from torch.multiprocessing.spawn import start_processes

from tests.rules import PACKAGE, REPOSITORY

PRELOADED = ["torch.distributed.tensor", "sightloop.training.fsdp", "sightloop.training.trainer"]


def ready() -> None:
    """Starts the process that is forked, unless it is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(PACKAGE.parent), str(REPOSITORY)]))
        forkserver.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()


def spawn(work: Callable[..., None], arguments: tuple[object, ...], count: int) -> None:
    """Calls `work(rank, *arguments)` in `count` processes; raises what one of them raises."""
    ready()
    start_processes(work, arguments, count, start_method="forkserver")


class Ranks:
    """The processes of one run, with the environment that `torchrun` gives them.

    Args:
        work: called in each process; a function of a module that imports no test.
        arguments: of `work`.
        log: what process 0 prints goes to the file `log.0`, and so on.
        count: number of processes; 1 is a run without other processes.
        threads: of torch in each.
    """

    def __init__(
        self,
        work: Callable[..., None],
        arguments: tuple[object, ...],
        log: Path,
        count: int,
        threads: int = 1,
    ) -> None:
        ready()
        self.logs = [Path(f"{log}.{rank}") for rank in range(count)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        names = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.processes: list[ForkServerProcess] = []
        for rank, path in enumerate(self.logs):
            path.write_text("")
            environment = names | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = get_context("forkserver").Process(
                target=_serve, args=(work, arguments, path, environment, threads)
            )
            process.start()
            self.processes.append(process)

    def die(self, seconds: float = 3600) -> None:
        """Waits until process 0 was killed, and kills the others."""
        self.processes[0].join(seconds)
        status = self.processes[0].exitcode
        self.kill()
        assert status == -signal.SIGKILL, self.logs[0].read_text()[-2000:]

    def finish(self, seconds: float = 3600) -> None:
        """Waits for all processes, which must end well. seconds: until a hang is one, on the slowest machine."""
        for process in self.processes:
            process.join(seconds)
        statuses = [process.exitcode for process in self.processes]
        messages = "\n".join(path.read_text()[-2000:] for path in self.logs)
        self.kill()
        assert statuses == [0] * len(statuses), messages

    def kill(self) -> None:
        """Kills what still runs."""
        for process in self.processes:
            process.kill()
            process.join()


def _serve(
    work: Callable[..., None],
    arguments: tuple[object, ...],
    log: Path,
    environment: dict[str, str],
    threads: int,
) -> None:
    import torch

    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.update(environment)
    torch.set_num_threads(threads)
    work(*arguments)
