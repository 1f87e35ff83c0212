"""What the server is and does: models, health, metrics."""

from __future__ import annotations

from typing import Literal

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from sightloop.apps.server.errors import ApiError, JsonResponse
from sightloop.apps.server.model_pool import ModelState
from sightloop.apps.server.routing import new_router
from sightloop.apps.server.service import Service, service_of
from sightloop.types import JsonDict

router = new_router("", "status")


class ModelBody(BaseModel):
    """A model of the server.

    `capabilities` is null for one that is not in the catalog and was not loaded yet.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    capabilities: list[str] | None
    loaded: bool
    default: bool


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"]
    data: list[ModelBody]


class Health(BaseModel):
    """Whether the server answers requests."""

    status: Literal["ok"]


@router.get("/v1/models", response_model=ModelList, tags=["openai"])
async def models(request: Request) -> JsonResponse:
    """The models, the default first."""
    service = service_of(request)
    data = [_describe(service, state) for state in service.pool.states()]
    return JsonResponse({"object": "list", "data": data})


@router.get("/v1/models/{name:path}", response_model=ModelBody, tags=["openai"])
async def model(request: Request, name: str) -> JsonResponse:
    """One model."""
    service = service_of(request)
    wanted = service.pool.find(name)
    state = next(state for state in service.pool.states() if state.id == wanted)
    return JsonResponse(_describe(service, state))


@router.get("/health", response_model=Health)
async def health(request: Request) -> JsonResponse:
    """Whether the default model is loaded: 503 until then, and when the server stops. Needs no key."""
    service = service_of(request)
    if service.failure is not None:
        raise ApiError(503, "the model cannot be loaded: the server's log says why", code="model_failed")
    if not service.pool.is_ready:
        raise ApiError(503, "the model is being loaded", code="loading", retry_after=2)
    return JsonResponse({"status": "ok"})


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(service_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/session", include_in_schema=False)
async def session(request: Request, key: str = "") -> Response:
    """Exchanges the key for a cookie, which the page's own requests then have, and shows the page."""
    service = service_of(request)
    if service.settings.keys and not service.access.is_key(key):
        raise ApiError(401, "the key is wrong", code="invalid_api_key")
    response = RedirectResponse("/", status_code=303)
    if service.settings.keys:
        value = service.access.session(key).decode()
        response.set_cookie(service.access.cookie, value, path="/", httponly=True, samesite="strict")
    return response


def _describe(service: Service, state: ModelState) -> JsonDict:
    return {
        "id": state.id,
        "object": "model",
        "created": int(service.started),
        "owned_by": "sightloop",
        "capabilities": state.capabilities,
        "loaded": state.is_loaded,
        "default": state.id == service.pool.default,
    }
