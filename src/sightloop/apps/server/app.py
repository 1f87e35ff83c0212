"""The application: routes, their OpenAPI document, and the gate around them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

import sightloop
from sightloop.apps.server import (
    chat_routes,
    embedding_routes,
    folder_routes,
    job_routes,
    native_routes,
    page_routes,
    rerank_routes,
    search_routes,
    status_routes,
)
from sightloop.apps.server.errors import error_response
from sightloop.apps.server.gate import Gate
from sightloop.apps.server.job_kinds import start_index
from sightloop.apps.server.service import Service
from sightloop.types import JsonDict


def create_app(service: Service, on_failure: Callable[[], None] = lambda: None) -> Gate:
    """The ASGI application of a server.

    Args:
        service: what its routes work with.
        on_failure: called if the default model cannot be loaded.
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        async with service.running(on_failure):
            if service.settings.build_index:
                await start_index(service)
            yield

    app = FastAPI(
        title="sightloop",
        version=sightloop.__version__,
        description="Vision-language models on your own images.",
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts of another server
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    for module in (
        status_routes,
        chat_routes,
        embedding_routes,
        rerank_routes,
        native_routes,
        folder_routes,
        search_routes,
        job_routes,
        page_routes,
    ):
        app.include_router(module.router)
    app.include_router(job_routes.runs_router)
    for kind in (HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _answer_error)
    build = app.openapi

    def openapi() -> JsonDict:
        return _without_422(build())

    app.openapi = openapi
    return Gate(app, service)


def _answer_error(_request: Request, error: Exception) -> Response:
    return error_response(error)


def _without_422(document: JsonDict) -> JsonDict:
    """The document without FastAPI's own answer to a wrong request, which is a 400 here."""
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    return document
