"""Protocols of workers: an engine starts them, each answers one request after the other, and any of them may die.

What a worker does is a `Server`, made inside of it at the first request. Whoever gives the requests decides what is
done when a worker has died.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol, TypeAlias

from sightloop.errors import SightloopError


class WorkerError(NamedTuple):
    """Answer: the request, or making the server, failed with an exception that ends the run."""

    error: Exception


class Server(Protocol):
    """What answers inside a worker."""

    def answer(self, request: object, send: Callable[[object], None]) -> object:
        """The last answer to a request; `send` gives answers before it."""
        ...


# Makes the server of the worker in a slot, from 0; sent to the worker by pickle.
MakeServer: TypeAlias = Callable[[int], Server]


class Worker(Protocol):
    """A process that works on one request after the other."""

    def give(self, request: object) -> None:
        """Sends a request; never raises."""
        ...

    def take(self) -> list[object]:
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


class LazyServer:
    """Server that is made at the first request, and whose exceptions are answers.

    Args:
        make: Makes it.
        number: Slot of the worker.
    """

    def __init__(self, make: MakeServer, number: int) -> None:
        self._make, self._number = make, number
        self._server: Server | None = None

    def answer(self, request: object, send: Callable[[object], None]) -> object:
        """The last answer, a `WorkerError` for an exception."""
        try:
            server = self._server = self._server or self._make(self._number)
            return server.answer(request, send)
        except (SightloopError, OSError) as error:
            return WorkerError(error)
        except Exception:
            return WorkerError(RuntimeError(traceback.format_exc()))
