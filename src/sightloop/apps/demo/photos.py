"""Photographs of the demonstration as files: `python -m sightloop.apps.demo.photos FOLDER`, for `make app`."""

from __future__ import annotations

import sys
from pathlib import Path

from sightloop.apps.demo.album import package_album, synthetic_album

_COUNT = 24


def write_photos(folder: Path) -> int:
    """Writes the album's images that are not there yet; returns their number.

    Args:
        folder: made if it is missing. Photographs inside scikit-image and scikit-learn, else rendered scenes.
    """
    album = package_album(_COUNT)
    if not album.images:
        album = synthetic_album(_COUNT)
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for photo in album.images:
        source = photo.image
        suffix = Path(source).suffix if isinstance(source, str) else ".png"
        target = folder / (photo.name.replace(" ", "-") + suffix)
        if not target.exists():
            target.write_bytes(Path(source).read_bytes() if isinstance(source, str) else source)
            written += 1
    return written


if __name__ == "__main__":
    write_photos(Path(sys.argv[1]))
