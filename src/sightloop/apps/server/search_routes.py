"""Routes of the index: search and duplicates."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import Request
from pydantic import BaseModel, Field

from sightloop.apps.server.errors import ApiError, JsonResponse
from sightloop.apps.server.fields import ImageText, Words
from sightloop.apps.server.folder_index import FolderIndex, SearchQuery
from sightloop.apps.server.folder_routes import ImageId, library_of
from sightloop.apps.server.routing import new_router
from sightloop.apps.server.scheduler import Kind
from sightloop.apps.server.service import Service, client_of, service_of
from sightloop.types import JsonDict

router = new_router("/api", "search")


class SearchRequest(BaseModel):
    """What is searched for; `alpha` is the share of the text where there is an image too."""

    text: Words | None = None
    image: ImageText | None = None
    like: ImageId | None = None
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    words: Words | None = None
    without: Words | None = None
    where: Annotated[list[Annotated[str, Field(max_length=500)]], Field(max_length=32)] = []
    k: Annotated[int, Field(ge=1, le=1_000)] = 20
    rerank: Annotated[int, Field(ge=0, le=256)] = 0
    cut: Annotated[float, Field(gt=0, lt=1)] | None = None


def index_of(service: Service) -> FolderIndex:
    """The folder's index. Raises ApiError (404) where there is none."""
    if service.index is None or not service.index.exists():
        raise ApiError(404, "the folder has no index: build it first", code="no_index")
    return service.index


@router.post("/search")
async def search(request: Request, body: SearchRequest) -> JsonResponse:
    """Images that a query describes, best first."""
    service = service_of(request)
    index, library = index_of(service), library_of(service)
    image = None if body.image is None else await service.images.text(body.image, "image")
    like = None if body.like is None else library.entry(body.like)
    query = SearchQuery(
        text=body.text,
        image=image,
        like=None if like is None else like.path,
        blend=body.alpha,
        words=body.words,
        without=body.without,
        where=tuple(body.where),
        k=body.k,
        rerank=body.rerank,
        cut=body.cut,
    )
    async with service.pool.lease(index.model_id(service.pool)) as served:
        model = served.model

        def run(queries: list[SearchQuery]) -> list[JsonDict]:
            return [index.search(each, model, library) for each in queries]

        # On the scheduler's thread: no two computations use a model at a time.
        kind = Kind((served, "search"), "search", run, 4)
        return JsonResponse((await service.run(client_of(request), kind, [query]))[0])


@router.get("/duplicates")
async def duplicates(request: Request) -> JsonResponse:
    """Clusters of images that show the same, with the evidence."""
    service = service_of(request)
    index, library = index_of(service), library_of(service)
    return JsonResponse(await asyncio.to_thread(index.duplicates, library))
