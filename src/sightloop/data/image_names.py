"""Names of image and video files. Imports no decoder: a search for images starts fast."""

from __future__ import annotations

import os

EXTENSIONS: frozenset[str] = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .heic .heif".split()
)
"""File extensions of the images that `decode` reads, in lower case with the dot."""


def is_image_name(name: str) -> bool:
    """Whether a file name has the extension of an image. The metadata files `._*` of macOS are not images."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not os.path.basename(name).startswith("._")


VIDEO_EXTENSIONS: frozenset[str] = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .m2ts .wmv .flv .ogv .3gp".split()
)
"""File extensions of the videos that folders are searched for, in lower case with the dot; a .gif is an image there."""


def is_video_name(name: str) -> bool:
    """Whether a file name has the extension of a video. The metadata files `._*` of macOS are no videos."""
    return os.path.splitext(name)[1].lower() in VIDEO_EXTENSIONS and not os.path.basename(name).startswith(
        "._"
    )


def is_visual_name(name: str) -> bool:
    """Whether a file name has the extension of an image or a video."""
    return is_image_name(name) or is_video_name(name)
