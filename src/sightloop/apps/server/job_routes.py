"""Routes of the jobs."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import Request
from pydantic import BaseModel, Field

from sightloop.apps.server.errors import JsonResponse
from sightloop.apps.server.folder_routes import library_of
from sightloop.apps.server.job_kinds import plan
from sightloop.apps.server.routing import new_router
from sightloop.apps.server.service import service_of
from sightloop.apps.server.training_runs import list_runs

router = new_router("/api/jobs", "jobs")
runs_router = new_router("/api/runs", "jobs")

OptionValue = str | int | float | bool | None


class JobRequest(BaseModel):
    """A job to start."""

    kind: Literal["caption", "rank", "index", "train", "compare", "bootstrap", "use"]
    options: Annotated[dict[Annotated[str, Field(max_length=64)], OptionValue], Field(max_length=16)] = {}


@router.post("")
async def start(request: Request, body: JobRequest) -> JsonResponse:
    """Starts a job; jobs run one after the other."""
    service = service_of(request)
    planned = plan(service, library_of(service), body.kind, body.options)
    job = service.jobs.start(body.kind, planned.title, planned.command, planned.run)
    return JsonResponse(job.as_json())


@router.get("")
async def jobs(request: Request) -> JsonResponse:
    """All jobs, in the order in which they were started."""
    return JsonResponse([job.as_json() for job in service_of(request).jobs.jobs.values()])


@runs_router.get("")
async def runs(request: Request) -> JsonResponse:
    """The trainings of the folder that ended well, the latest first, with how they compared."""
    folder = library_of(service_of(request)).home
    return JsonResponse(await asyncio.to_thread(list_runs, folder))


@router.get("/{job_id}")
async def job(request: Request, job_id: str) -> JsonResponse:
    """One job."""
    return JsonResponse(service_of(request).jobs.find(job_id).as_json())


@router.post("/{job_id}/pause")
async def pause(request: Request, job_id: str) -> JsonResponse:
    """Pauses a running job after its batch."""
    jobs = service_of(request).jobs
    jobs.pause(jobs.find(job_id), True)
    return JsonResponse(jobs.find(job_id).as_json())


@router.post("/{job_id}/resume")
async def resume(request: Request, job_id: str) -> JsonResponse:
    """Resumes a paused job."""
    jobs = service_of(request).jobs
    jobs.pause(jobs.find(job_id), False)
    return JsonResponse(jobs.find(job_id).as_json())


@router.post("/{job_id}/cancel")
async def cancel(request: Request, job_id: str) -> JsonResponse:
    """Cancels a job; what it did stays."""
    jobs = service_of(request).jobs
    await jobs.cancel(jobs.find(job_id))
    return JsonResponse(jobs.find(job_id).as_json())
