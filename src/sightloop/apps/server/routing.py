"""Routers of the server: their requests' JSON is bounded, and their errors are in the OpenAPI document."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from sightloop.apps.server.errors import ApiError
from sightloop.apps.server.fields import ErrorBody
from sightloop.apps.server.limits import MAX_DEPTH

_RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request is wrong: the message says what, and the remedy"},
    401: {"model": ErrorBody, "description": "A key is needed"},
    403: {"model": ErrorBody, "description": "Host or Origin is refused"},
    404: {"model": ErrorBody, "description": "There is no such path, model or image"},
    409: {
        "model": ErrorBody,
        "description": "What is there stands against it: a job that runs, another model",
    },
    412: {"model": ErrorBody, "description": "The caption was changed since the edit was begun"},
    413: {"model": ErrorBody, "description": "The body is too large"},
    428: {"model": ErrorBody, "description": "If-Match is missing"},
    429: {"model": ErrorBody, "description": "Too many requests wait; Retry-After says when to come back"},
    503: {"model": ErrorBody, "description": "The server is loading or stopping"},
}


class BoundedRequest(Request):
    """Request whose JSON is bounded in depth and has neither NaN nor infinity."""

    async def json(self) -> object:
        """The body. Raises ApiError (400)."""
        try:
            content: object = json.loads(await self.body(), parse_constant=_refuse)
        except (ValueError, RecursionError):
            raise ApiError(400, "the body is no valid JSON", code="invalid_json") from None
        _check_depth(content)
        return content


class BoundedRoute(APIRoute):
    """Route whose requests are `BoundedRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of a request."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(BoundedRequest(request.scope, request.receive))

        return handle


def new_router(prefix: str = "", *tags: str) -> APIRouter:
    """A router of the server.

    Args:
        prefix: of its paths.
        tags: in the OpenAPI document.
    """
    return APIRouter(prefix=prefix, tags=list(tags), route_class=BoundedRoute, responses=_RESPONSES)


def _refuse(constant: str) -> float:
    raise ValueError(constant)


def _check_depth(content: object) -> None:
    """Raises ApiError (400) for objects and arrays that are nested too deeply."""
    level = [content]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise ApiError(400, f"the body is nested more than {MAX_DEPTH} deep", code="invalid_json")
