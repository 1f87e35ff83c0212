"""A process for each side, which loads what it needs once and then waits for its turn."""

from __future__ import annotations

import os
import signal
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

from benchmarks.cases import Job, Side
from benchmarks.materials import Materials

_CLASSES: dict[str, tuple[str, str]] = {
    "sightloop": ("benchmarks.ours", "Sightloop"),
    "transformers": ("benchmarks.peer_transformers", "Transformers"),
    "open_clip": ("benchmarks.peer_open_clip", "OpenClip"),
}


class NotRun(Exception):
    """A side that cannot do its part, and why."""


class Worker:
    """One side in its own process. Not for several threads."""

    def __init__(self, side: Side, materials: Materials, threads: int) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, side, materials, threads), name=f"benchmark-{side}", daemon=True
        )
        self.process.start()
        theirs.close()

    def prepare(self, job: Job) -> int:
        """Make a job ready to run; its number. Raises NotRun."""
        return self._ask("prepare", job)

    def run(self, number: int) -> tuple[float, Any]:
        """Run a job that is ready: seconds, and its result the first time (None later). Raises NotRun."""
        return self._ask("run", number)

    def kernels(self) -> dict[str, dict[str, int]]:
        """By checkpoint, how many linear layers have which kernel; only sightloop's side says so. Raises NotRun."""
        return self._ask("kernels", None)

    def clear(self) -> None:
        """Forget the jobs, but not what was loaded for them."""
        self._ask("clear", None)

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.join(2)
        if self.process.is_alive():
            self.process.kill()

    def _ask(self, what: str, about: Job | int | None) -> Any:
        try:
            self.connection.send((what, about))
            done, answer = self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(10)
            raise NotRun(f"the process ended with status {self.process.exitcode}") from error
        if not done:
            raise NotRun(answer)
        return answer


def _serve(connection: Connection, side: str, materials: Materials, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import torch

    place: Any = None
    calls: list[Any] = []
    seen: set[int] = set()
    while True:
        try:
            what, about = connection.recv()
        except EOFError:
            return
        answer: Any = None
        try:
            if what == "clear":
                calls, seen = [], set()
            elif what == "kernels":
                answer = getattr(place, "kernels", {})
            elif what == "prepare":
                torch.set_num_threads(threads)
                module, name = _CLASSES[side]
                place = place or getattr(import_module(module), name)(materials)
                calls.append(getattr(place, about.work)(**about.options))
                answer = len(calls) - 1
            else:
                start = perf_counter()
                result = calls[about]()
                answer = (perf_counter() - start, None if about in seen else result)
                seen.add(about)
                del result
        except Exception as error:  # a side that fails is a line of the table, not the end of the run
            connection.send((False, f"{type(error).__name__}: {error}".splitlines()[0]))
        else:
            connection.send((True, answer))
