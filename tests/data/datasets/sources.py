"""Small images, files and tar archives for tests of sources and conversions."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

_Members = dict[str, bytes | str] | Sequence[tuple[str, bytes | str]]


def make_image(number: int = 0, kind: str = "JPEG") -> bytes:
    """An encoded image of 5 x 4 pixels; each number gives other bytes."""
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (number % 256, number // 256 % 256, 77)).save(file, kind, lossless=True)
    return file.getvalue()


def put(path: Path, content: bytes | str | Any) -> Path:
    """Writes bytes or text as they are, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def tar(path: Path, members: _Members, format: int = tarfile.GNU_FORMAT) -> Path:
    """Writes a tar archive with the standard library."""
    with tarfile.open(path, "w", format=format) as file:
        for name, content in members.items() if isinstance(members, dict) else members:
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path
