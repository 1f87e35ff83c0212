"""Files of the page, read once: no build step, and no request to another server."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent
_MEDIA = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


class PageFile(NamedTuple):
    """A file of the page: its content, media type, and ETag (of the content, in quotes)."""

    data: bytes
    media: str
    etag: str


@cache
def page_files() -> dict[str, PageFile]:
    """Every file that a browser may ask for, by its path with `/`."""
    files: dict[str, PageFile] = {}
    for path in ROOT.rglob("*"):
        if path.suffix in _MEDIA and path.is_file():
            data = path.read_bytes()
            etag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
            files[path.relative_to(ROOT).as_posix()] = PageFile(data, _MEDIA[path.suffix], etag)
    return files
