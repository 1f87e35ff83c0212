"""Names of image files. Imports no decoder: a search for images starts fast."""

from __future__ import annotations

import os

EXTENSIONS: frozenset[str] = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .heic .heif".split()
)
"""File extensions of the images that `decode` reads, in lower case with the dot."""


def is_image_name(name: str) -> bool:
    """Whether a file name has the extension of an image. The metadata files `._*` of macOS are not images."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not os.path.basename(name).startswith("._")
