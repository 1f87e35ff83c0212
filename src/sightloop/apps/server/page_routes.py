"""The page: static files, sent as they are, under a policy that lets them ask nothing of other servers."""

from __future__ import annotations

import hashlib
from functools import cache

from fastapi import Request
from starlette.responses import Response

from sightloop.apps.server.errors import ApiError
from sightloop.apps.server.routing import new_router
from sightloop.apps.web import ROOT

router = new_router("", "page")

_MEDIA = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
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


@cache
def _files() -> dict[str, tuple[bytes, str, str]]:
    """Name -> content, media type and ETag of every file that may be asked for."""
    files: dict[str, tuple[bytes, str, str]] = {}
    for path in ROOT.rglob("*"):
        if path.suffix in _MEDIA and path.is_file():
            data = path.read_bytes()
            etag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
            files[path.relative_to(ROOT).as_posix()] = (data, _MEDIA[path.suffix], etag)
    return files


def _answer(request: Request, name: str) -> Response:
    if name not in _files():
        raise ApiError(404, "there is no such page")
    data, media, etag = _files()[name]
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
