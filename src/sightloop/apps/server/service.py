"""Service: what the routes of one server share, and how a route has work done."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable, Hashable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fastapi import Request

from sightloop.apps.server.access import Access
from sightloop.apps.server.admission import Admission
from sightloop.apps.server.errors import ApiError
from sightloop.apps.server.folder_index import FolderIndex, index_of_library
from sightloop.apps.server.image_library import Library
from sightloop.apps.server.image_sets import open_image_set
from sightloop.apps.server.image_sources import ImageSources
from sightloop.apps.server.job_list import JobList
from sightloop.apps.server.limits import QUEUE, RESERVE
from sightloop.apps.server.metrics import Metrics
from sightloop.apps.server.model_pool import LoadedModel, ModelPool
from sightloop.apps.server.remote_images import RemoteImages
from sightloop.apps.server.scheduler import Kind, QueuedJob, Scheduler, Stream
from sightloop.apps.server.settings import ServerSettings
from sightloop.apps.server.thumbs import Thumbnails
from sightloop.errors import ImageError
from sightloop.types import Pixels

if TYPE_CHECKING:
    from sightloop.inference.model import Model

T = TypeVar("T")
R = TypeVar("R")
_DECODED_AHEAD = (
    4  # images of one request that are decoded at a time, so that one with many holds up no other
)
_REAP_SECONDS = 20.0


class Service:
    """Parts of one server.

    Args:
        settings: what it was told.
        load: loads a checkpoint.
    """

    def __init__(self, settings: ServerSettings, load: Callable[[str], Model]) -> None:
        self.settings = settings
        self.stopping = False
        self.started = time.time()
        self.failure: Exception | None = None
        """Why the default model could not be loaded."""
        self.access = Access(settings)
        self.admission = Admission(QUEUE, RESERVE)
        self.pool = ModelPool(
            settings.models,
            load,
            budget=settings.max_memory,
            idle_seconds=settings.idle_seconds,
            workers=settings.workers,
        )
        self.metrics = Metrics(
            lambda: self.admission.count, lambda: sum(state.is_loaded for state in self.pool.states())
        )
        self.scheduler = Scheduler(lambda: self.admission.count, self.metrics.batch)
        image_set = None if settings.folder is None else open_image_set(settings.folder)
        folder = None if settings.folder is None else Path(os.path.realpath(settings.folder))
        folder = folder if image_set is None else image_set.folder
        self.images = ImageSources(folder, RemoteImages() if settings.allow_urls else None, image_set)
        self.jobs = JobList()
        self.thumbnails = Thumbnails(settings.workers)
        self.image_library = None if folder is None else Library(folder, image_set)
        self.index = None if self.image_library is None else FolderIndex(index_of_library(self.image_library))

    def stop(self) -> None:
        """Refuses new requests and those that wait; what runs goes on."""
        self.stopping = True
        self.scheduler.stop()

    @asynccontextmanager
    async def running(self, on_failure: Callable[[], None] = lambda: None) -> AsyncGenerator[None]:
        """The server's life: loads the default model, unloads idle ones, closes everything at the end.

        Args:
            on_failure: called if the default model cannot be loaded.
        """
        tasks = [asyncio.create_task(self._load_default(on_failure)), asyncio.create_task(self._reap())]
        try:
            yield
        finally:
            self.stop()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await self.jobs.close()
            await asyncio.to_thread(self.scheduler.join, 30.0)
            await self.pool.close()
            self.thumbnails.close()
            if self.image_library is not None:
                self.image_library.close()

    async def _load_default(self, on_failure: Callable[[], None]) -> None:
        try:
            async with self.pool.lease(None):
                pass
        except ApiError as error:
            self.failure = error.__cause__ if isinstance(error.__cause__, Exception) else error
            on_failure()

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(_REAP_SECONDS)
            await self.pool.unload_idle()

    # For the routes.

    async def run(self, client: Hashable, kind: Kind[T, R], items: Sequence[T]) -> list[R]:
        """The results of items, in order; cancelled with the task that waits."""
        job = QueuedJob(client, kind, items)
        self.scheduler.submit(job)
        return await asyncio.wrap_future(job.future)

    async def stream(self, client: Hashable, start: Callable[[], Iterator[str]]) -> AsyncGenerator[str]:
        """The pieces of a text that is generated on the scheduler's thread."""
        loop = asyncio.get_running_loop()
        pieces = asyncio.Queue[str | Exception | None]()
        stream = Stream(client, start, lambda piece: _hand_over(loop, pieces, piece))
        self.scheduler.submit(stream)
        try:
            while (piece := await pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            stream.cancel()

    async def decode(self, served: LoadedModel, images: Sequence[bytes], param: str) -> list[Pixels]:
        """Images preprocessed for a model; equal ones are one object.

        Raises:
            ApiError: 400, with the number of the first image that cannot be read.
        """
        gate = asyncio.Semaphore(_DECODED_AHEAD)

        async def decoded(data: bytes) -> Pixels | ImageError:
            async with gate:
                return await asyncio.wrap_future(served.images.submit(data))

        distinct = list(dict.fromkeys(images))
        results = dict(zip(distinct, await asyncio.gather(*map(decoded, distinct)), strict=True))
        pixels: list[Pixels] = []
        for i, data in enumerate(images):
            result = results[data]
            if isinstance(result, ImageError):
                which = f"image {i + 1} of {len(images)}: " if len(images) > 1 else "the image: "
                raise ApiError(400, f"{which}{result.reason}", param=param, code="invalid_image")
            pixels.append(result)
        return pixels


def _hand_over(
    loop: asyncio.AbstractEventLoop,
    pieces: asyncio.Queue[str | Exception | None],
    piece: str | Exception | None,
) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(pieces.put_nowait, piece)


def service_of(request: Request) -> Service:
    """The service of a request's server."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def client_of(request: Request) -> Hashable:
    """Whose request it is."""
    client: Hashable = request.state.client
    return client
