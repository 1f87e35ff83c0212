"""Jobs: one of a kind at a time, one after the other, paused between batches, cancelled, failures in words."""

from __future__ import annotations

import asyncio

import pytest

from sightloop.apps.server.errors import ApiError
from sightloop.apps.server.job_list import JobList, ServerJob
from sightloop.errors import UsageError


async def batches(job: ServerJob) -> None:
    job.total = 1_000_000
    while job.done < job.total:
        await job.checkpoint()
        job.done += 1
        await asyncio.sleep(0)


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_one_of_a_kind_runs_and_others_wait_for_their_turn() -> None:
    async def check() -> None:
        jobs = JobList()
        first = jobs.start("rank", "Rank", "", batches)
        second = jobs.start("caption", "Caption", "", batches)
        with pytest.raises(ApiError) as refused:
            jobs.start("rank", "Rank", "", batches)
        assert refused.value.status_code == 409
        await turns()
        assert (first.state, second.state) == ("running", "queued")
        await jobs.cancel(first)
        await turns()
        assert (first.state, second.state) == ("cancelled", "running")
        assert second.done > 0
        await jobs.close()
        assert second.state == "cancelled"

    asyncio.run(check())


def test_a_paused_job_stands_still_until_it_is_resumed() -> None:
    async def check() -> None:
        jobs = JobList()
        job = jobs.start("rank", "Rank", "", batches)
        await turns()
        jobs.pause(job, True)
        await turns(3)
        done = job.done
        await turns()
        assert job.done == done
        with pytest.raises(ApiError):
            jobs.pause(job, True)
        jobs.pause(job, False)
        await turns()
        assert job.done > done
        jobs.pause(job, True)
        await jobs.close()
        assert job.state == "cancelled"

    asyncio.run(check())


def test_a_job_that_fails_says_why() -> None:
    async def fail(job: ServerJob) -> None:
        raise UsageError("the folder has no captions: write some")

    async def check() -> None:
        jobs = JobList()
        job = jobs.start("train", "Train", "", fail)
        await turns()
        assert (job.state, job.message) == ("failed", "the folder has no captions: write some")
        assert jobs.find(job.id).as_json()["ended"] is not None

    asyncio.run(check())
