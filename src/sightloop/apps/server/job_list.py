"""Jobs: long work that the page starts, one at a time, with progress, pause, resume and cancel.

A job is a coroutine that reports to its `ServerJob`. Work with a served model goes through the scheduler, batch by
batch, so that requests are answered meanwhile; trainings run as a child process, whose command the page shows.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from sightloop.apps.server.errors import ApiError, as_api_error
from sightloop.types import JsonDict

JobState: TypeAlias = Literal["queued", "running", "paused", "done", "failed", "cancelled"]

_MAX_JOBS = 200  # kept in the list
_MAX_FAILURES = 1_000
_LOG = logging.getLogger("sightloop.server")


@dataclass(eq=False)
class ServerJob:
    """One job.

    Attributes:
        kind: "caption", "rank", "index", "train", "bootstrap", "compare" or "use".
        title: for people.
        command: of the shell that does the same, "" if there is none.
        done: of `total` items.
        message: what it is at, or why it failed.
        failures: (name, reason) of items that were skipped.
        curves: name -> points (step, value).
        result: what it found, for the page.
    """

    id: str
    kind: str
    title: str
    command: str
    run: Callable[[ServerJob], Awaitable[None]]
    state: JobState = "queued"
    done: int = 0
    total: int = 0
    message: str = ""
    started: float | None = None
    ended: float | None = None
    failures: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict[str, list[tuple[float, float]]])
    result: JsonDict | None = None
    on_pause: Callable[[bool], None] | None = None
    resumed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def fail(self, name: str, reason: str) -> None:
        """Notes an item that was skipped."""
        if len(self.failures) < _MAX_FAILURES:
            self.failures.append((name, reason))

    async def checkpoint(self) -> None:
        """Waits while the job is paused; called between batches."""
        await self.resumed.wait()

    def as_json(self) -> JsonDict:
        """What the page shows."""
        return {
            "id": self.id,
            "kind": self.kind,
            "title": self.title,
            "command": self.command,
            "state": self.state,
            "done": self.done,
            "total": self.total,
            "message": self.message,
            "started": self.started,
            "ended": self.ended,
            "failures": [{"name": name, "reason": reason} for name, reason in self.failures],
            "curves": [{"name": name, "points": points} for name, points in self.curves.items()],
            "result": self.result,
        }


class JobList:
    """The jobs of a server, run one after the other on its event loop."""

    def __init__(self) -> None:
        self.jobs: dict[str, ServerJob] = {}
        self._numbers = itertools.count(1)
        self._turn = asyncio.Lock()

    def start(
        self, kind: str, title: str, command: str, run: Callable[[ServerJob], Awaitable[None]]
    ) -> ServerJob:
        """Queues a job. Raises ApiError (409) if one of its kind runs or waits."""
        if any(
            job.kind == kind and job.state in ("queued", "running", "paused") for job in self.jobs.values()
        ):
            raise ApiError(
                409, "a job of this kind is at work already: wait, or cancel it", code="job_running"
            )
        while len(self.jobs) >= _MAX_JOBS:
            ended = [job.id for job in self.jobs.values() if job.ended is not None]
            del self.jobs[ended[0]]
        job = ServerJob(f"job-{next(self._numbers)}", kind, title, command, run)
        job.resumed.set()
        self.jobs[job.id] = job
        job.task = asyncio.create_task(self._run(job))
        return job

    def find(self, job_id: str) -> ServerJob:
        """The job with an id. Raises ApiError (404)."""
        if job_id not in self.jobs:
            raise ApiError(404, "there is no such job", code="job_not_found")
        return self.jobs[job_id]

    def pause(self, job: ServerJob, paused: bool) -> None:
        """Pauses or resumes a job. Raises ApiError (409) if it has ended or waits."""
        if job.state != ("running" if paused else "paused"):
            raise ApiError(409, f"the job is {job.state}", code="wrong_state")
        if job.on_pause is not None:
            job.on_pause(paused)
        if paused:
            job.resumed.clear()
        else:
            job.resumed.set()
        job.state = "paused" if paused else "running"

    async def cancel(self, job: ServerJob) -> None:
        """Cancels a job; what it did stays."""
        if job.task is not None and not job.task.done():
            if job.state == "paused" and job.on_pause is not None:
                job.on_pause(False)
            job.task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.wait([job.task], timeout=15)

    async def close(self) -> None:
        """Cancels all jobs."""
        await asyncio.gather(*(self.cancel(job) for job in list(self.jobs.values())))

    async def _run(self, job: ServerJob) -> None:
        try:
            async with self._turn:
                job.state, job.started = "running", time.time()
                await job.run(job)
                job.state = "done"
        except asyncio.CancelledError:
            job.state = "cancelled"
        except Exception as error:
            job.state = "failed"
            job.message = as_api_error(error).detail
            _LOG.exception("job %s (%s) failed", job.id, job.kind)
        finally:
            job.ended = time.time()
