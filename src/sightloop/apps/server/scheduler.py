"""Scheduler: requests of one kind computed together, one batch after the other, on a thread beside the event loop.

Clients take turns, item by item, so that one who asks much does not hold up the others. A conversation that is streamed
is stepped between the batches. What was not started when the server stops is refused; what runs is finished.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from sightloop.apps.server.errors import ApiError

T = TypeVar("T")
R = TypeVar("R")
WINDOW_SECONDS = 0.003
_STREAM_SECONDS = 0.05  # of one turn of a stream
_LOG = logging.getLogger("sightloop.server")


@dataclass(frozen=True, slots=True)
class Kind(Generic[T, R]):
    """Requests that may be computed together.

    Args:
        key: equal for kinds whose items may share a batch: model, verb and options.
        verb: for metrics.
        run: items -> as many results.
        at_once: items in a batch.
    """

    key: Hashable
    verb: str
    run: Callable[[list[T]], Sequence[R]]
    at_once: int


class Turn(Protocol):
    """What waits for its turn."""

    client: Hashable
    key: Hashable
    started: bool

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for it any more."""
        ...

    def fail(self, error: Exception) -> None:
        """Ends it with an error."""


@dataclass(eq=False)
class QueuedJob(Generic[T, R]):
    """Items of one request.

    Args:
        client: whose request it is.
        kind: what is to be done.
        items: at least one.

    Attributes:
        future: the results, in the order of the items.
    """

    client: Hashable
    kind: Kind[T, R]
    items: Sequence[T]
    future: Future[list[R]] = field(default_factory=Future[list[R]])
    started: bool = False
    taken: int = 0
    arrived: float = field(default_factory=time.monotonic)
    _results: list[R] = field(default_factory=list[R])

    @property
    def key(self) -> Hashable:
        """The kind's."""
        return self.kind.key

    @property
    def is_over(self) -> bool:
        """Whether it was cancelled, or has failed."""
        return self.future.done()

    def add(self, results: Sequence[R]) -> None:
        """The next results; the last ones complete the job."""
        self._results += results
        if len(self._results) == len(self.items):
            with suppress(InvalidStateError):  # cancelled meanwhile
                self.future.set_result(self._results)

    def fail(self, error: Exception) -> None:
        """Ends the job with an error."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)


@dataclass(eq=False)
class Stream:
    """Text that is handed out while it is generated.

    Args:
        client: whose request it is.
        start: reads and checks the prompt, and returns the pieces.
        emit: takes a piece; None at the end, or the error. Called on the scheduler's thread.
    """

    client: Hashable
    start: Callable[[], Iterator[str]]
    emit: Callable[[str | Exception | None], None]
    key: Hashable = field(default_factory=object)
    started: bool = False
    is_over: bool = False
    _pieces: Iterator[str] | None = None

    def advance(self) -> None:
        """Emits pieces for one turn."""
        end = time.monotonic() + _STREAM_SECONDS
        try:
            self._pieces = self._pieces or self.start()
            while not self.is_over and time.monotonic() < end:
                piece = next(self._pieces, None)
                self.is_over = self.is_over or piece is None
                self.emit(piece)
        except Exception as error:
            self.fail(error)

    def cancel(self) -> None:
        """Nobody reads it any more."""
        self.is_over = True

    def fail(self, error: Exception) -> None:
        """Ends the stream with an error."""
        if not self.is_over:
            self.is_over = True
            self.emit(error)


JobBatch = list[tuple[QueuedJob[Any, Any], list[Any]]]


class Scheduler:
    """Thread that computes.

    Args:
        admitted: how many requests the server has taken; a batch waits some milliseconds for those not yet here.
        observe: told the verb, the number of items and the seconds of each batch.
    """

    def __init__(
        self,
        admitted: Callable[[], int] = lambda: 0,
        observe: Callable[[str, int, float], None] = lambda _verb, _items, _seconds: None,
    ) -> None:
        self._admitted, self._observe = admitted, observe
        self._changed = threading.Condition()
        self._waiting: OrderedDict[Hashable, deque[QueuedJob[Any, Any] | Stream]] = OrderedDict()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="sightloop-scheduler", daemon=True)
        self._thread.start()

    def submit(self, job: QueuedJob[Any, Any] | Stream) -> None:
        """Queues a job. Raises ApiError (503) if the server is stopping."""
        with self._changed:
            if self._stopping:
                raise stopping_error()
            self._waiting.setdefault(job.client, deque()).append(job)
            self._changed.notify()

    def stop(self) -> None:
        """Refuses what has not started, and takes nothing more; returns at once."""
        with self._changed:
            self._stopping = True
            for jobs in self._waiting.values():
                for job in [job for job in jobs if not job.started]:
                    jobs.remove(job)
                    job.fail(stopping_error())
            self._changed.notify()

    def join(self, seconds: float) -> None:
        """Waits for what runs."""
        self._thread.join(seconds)

    @property
    def depth(self) -> int:
        """Jobs that wait or run in part."""
        with self._changed:
            return self._count()

    # The thread.

    def _count(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (turn := self._next()):
                    if self._stopping:
                        return
                    self._changed.wait()
            if isinstance(turn, Stream):
                turn.advance()
                self._requeue(turn)
            else:
                self._run(turn)

    def _next(self) -> Stream | JobBatch | None:
        """The next batch or stream, by turns of the clients; None if nothing waits."""
        head = self._head()
        if head is None:
            return None
        if isinstance(head, Stream):
            self._waiting[head.client].popleft()
            self._rotate(head.client)
            head.started = True
            return head
        # A lone request does not wait; one of many waits for those that are still being read.
        while self._ready(head.kind) < head.kind.at_once and self._admitted() > self._count():
            left = head.arrived + WINDOW_SECONDS - time.monotonic()
            if left <= 0 or self._stopping:
                break
            self._changed.wait(left)
        return self._collect(head.kind) or self._next()

    def _head(self) -> QueuedJob[Any, Any] | Stream | None:
        """The first job of the client whose turn it is; jobs that nobody waits for are dropped."""
        for client in list(self._waiting):
            jobs = self._waiting[client]
            while jobs and jobs[0].is_over:
                jobs.popleft()
            if jobs:
                return jobs[0]
            del self._waiting[client]
        return None

    def _ready(self, kind: Kind[Any, Any]) -> int:
        return sum(
            len(job.items) - job.taken
            for jobs in self._waiting.values()
            for job in jobs
            if isinstance(job, QueuedJob) and job.key == kind.key
        )

    def _collect(self, kind: Kind[Any, Any]) -> JobBatch:
        """Items of one kind, an item a client and round, until the batch is full."""
        batch: dict[QueuedJob[Any, Any], list[Any]] = {}
        sources = [deque(job for job in jobs if job.key == kind.key) for jobs in self._waiting.values()]
        count = 0
        while sources and count < kind.at_once:
            for jobs in list(sources):
                while jobs and (jobs[0].is_over or self._taken_whole(jobs[0])):
                    jobs.popleft()
                if not jobs:
                    sources.remove(jobs)
                    continue
                job = jobs[0]
                assert isinstance(job, QueuedJob)
                batch.setdefault(job, []).append(job.items[job.taken])
                job.taken, job.started, count = job.taken + 1, True, count + 1
                if count == kind.at_once:
                    break
        for client in dict.fromkeys(job.client for job in batch):
            self._waiting[client] = deque(job for job in self._waiting[client] if not self._taken_whole(job))
            self._rotate(client)
        return list(batch.items())

    @staticmethod
    def _taken_whole(job: QueuedJob[Any, Any] | Stream) -> bool:
        return isinstance(job, QueuedJob) and job.taken == len(job.items)

    def _rotate(self, client: Hashable) -> None:
        """Puts a client behind the others."""
        if self._waiting[client]:
            self._waiting.move_to_end(client)
        else:
            del self._waiting[client]

    def _requeue(self, stream: Stream) -> None:
        if not stream.is_over:
            with self._changed:
                self._waiting.setdefault(stream.client, deque()).append(stream)

    def _run(self, batch: JobBatch) -> None:
        """Computes a batch; if it fails, each of its jobs alone, so that one bad request spoils no other."""
        kind = batch[0][0].kind
        items = [item for _, own in batch for item in own]
        start = time.monotonic()
        try:
            results = kind.run(items)
            if len(results) != len(items):
                raise RuntimeError(f"{kind.verb}: {len(results)} results for {len(items)} items")
        except Exception as error:
            if len(batch) > 1:
                for part in batch:
                    self._run([part])
                return
            log_unforeseen(error)
            batch[0][0].fail(error)
            return
        self._observe(kind.verb, len(items), time.monotonic() - start)
        for job, own in batch:
            job.add(results[: len(own)])
            results = results[len(own) :]


def stopping_error() -> ApiError:
    """The refusal of a server that is about to end."""
    return ApiError(503, "the server is stopping: try again later", code="stopping", retry_after=5)


def log_unforeseen(error: Exception) -> None:
    """Writes the traceback of a fault of this program to the log; a refusal is the client's matter."""
    from sightloop.errors import CheckpointError, SightloopError

    if not isinstance(error, ApiError | SightloopError) or isinstance(error, CheckpointError):
        _LOG.error("a request failed", exc_info=error)
