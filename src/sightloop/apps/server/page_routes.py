"""The page: static files, sent as they are, under a policy that lets them ask nothing of other servers."""

from __future__ import annotations

from fastapi import Request
from starlette.responses import Response

from sightloop.apps.server.errors import ApiError
from sightloop.apps.server.routing import new_router
from sightloop.apps.web.files import page_files

router = new_router("", "page")

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self'; "
    "connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)


@router.get("/", include_in_schema=False)
async def page(request: Request) -> Response:
    """The page."""
    return _answer(request, "index.html")


@router.get("/web/{name:path}", include_in_schema=False)
async def page_file(request: Request, name: str) -> Response:
    """A file of the page."""
    return _answer(request, name)


def _answer(request: Request, name: str) -> Response:
    if name not in page_files():
        raise ApiError(404, "there is no such page")
    data, media, etag = page_files()[name]
    headers = {
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
        "ETag": etag,
    }
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=media, headers=headers)
