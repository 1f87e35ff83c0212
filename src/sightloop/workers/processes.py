"""Workers that are processes of this machine, and end with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait

from sightloop.workers.engine import LazyServer, MakeServer, Worker


class Processes:
    """Engine of workers that are processes of this machine.

    Args:
        make: Makes the server in each.
        threads: Threads of torch in each, unless OMP_NUM_THREADS says another number; 0 for torch's default.
    """

    def __init__(self, make: MakeServer, threads: int = 0) -> None:
        self._make, self._threads = make, threads

    def start(self, number: int) -> Worker:
        """Starts a process (spawned, not forked)."""
        return Process(self._make, number, self._threads)

    def ready(self, workers: Iterable[Worker]) -> list[Worker]:
        """Those whose pipe has data or is closed."""
        by_pipe = {worker.pipe: worker for worker in workers if isinstance(worker, Process)}
        return [by_pipe[pipe] for pipe in wait(list(by_pipe)) if isinstance(pipe, Connection)]

    def close(self) -> None:
        """Nothing to do: `Process.stop` ends each process."""


class Process:
    """A child process, which ends when its parent is killed."""

    def __init__(self, make: MakeServer, number: int, threads: int = 0) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, child_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(make, child_end, number), daemon=False)
        with without_main_script(), threads_of_children(threads):
            self.process.start()
        child_end.close()  # so that the pipe ends when the child dies

    def give(self, request: object) -> None:
        """Sends the request over the pipe."""
        try:
            self.pipe.send(request)
        except (BrokenPipeError, ConnectionError):
            return  # it is dead, and `take` will raise EOFError

    def take(self) -> list[object]:
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


@contextmanager
def without_main_script() -> Generator[None]:
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


@contextmanager
def threads_of_children(count: int) -> Generator[None]:
    """Threads of torch in processes that start here, unless OMP_NUM_THREADS says another number; 0 for all cores."""
    if not count or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


def end_with_parent() -> None:
    """From now on, end this process when its parent ends, even by SIGKILL; and leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _serve(make: MakeServer, pipe: Connection, number: int) -> None:
    end_with_parent()
    server = LazyServer(make, number)
    with suppress(EOFError, ConnectionError):  # the parent is gone
        while True:
            pipe.send(server.answer(pipe.recv(), pipe.send))
