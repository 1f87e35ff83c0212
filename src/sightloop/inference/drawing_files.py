"""Files of drawn images: PNG with what they were drawn from, a sidecar that makes the folder a dataset, a grid."""

from __future__ import annotations

import io
import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from sightloop.data.atomic import atomic_write, lock_folder, remove_stale_temporaries
from sightloop.types import JsonDict

_GAP, _LABEL, _COLUMN = 4, 16, 220  # pixels of a grid: between images, height of a text, least width of a row


@contextmanager
def drawing_folder(folder: Path) -> Generator[None]:
    """A folder for drawings, made and locked, without what a killed process left in it.

    Raises:
        UsageError: another process draws into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        remove_stale_temporaries(folder)
        yield


def describe(image: Image.Image) -> JsonDict:
    """What a drawn image was drawn from; "source": "synthetic", so that it is not taken for a photograph."""
    names = ("prompt", "number", "seed", "model", "settings", "judge", "scores")
    return {"source": "synthetic"} | {name: image.info[name] for name in names if name in image.info}


def write_drawing(image: Image.Image, path: Path) -> None:
    """Writes a drawn image as PNG with its description as text chunks, and PATH.json with the prompt as caption.

    The JSON file comes first: an image that is there has its description. One that is there already is kept: it is the
    same, of a run that was killed, or somebody changed it.

    Raises:
        FileExistsError: there is a file at `path`.
    """
    description, chunks = describe(image), PngInfo()
    for name, value in description.items():
        chunks.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
    chunks.add_itxt("Software", "sightloop")
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=chunks)
    record = {"captions": [description.pop("prompt")]} | description
    with suppress(FileExistsError):
        atomic_write(path.with_suffix(".json"), json.dumps(record, ensure_ascii=False) + "\n", exclusive=True)
    atomic_write(path, file.getvalue(), exclusive=True)


def write_grid(rows: Sequence[tuple[str, Sequence[Path]]], path: Path) -> None:
    """Writes one image with a row for each text and its images under it."""
    opened = [(text, [Image.open(each).convert("RGB") for each in files]) for text, files in rows]
    widths = [sum(image.width + _GAP for image in images) for _, images in opened]
    heights = [_LABEL + max((image.height for image in images), default=0) + _GAP for _, images in opened]
    page = Image.new("RGB", (max([_COLUMN, *widths]) + _GAP, sum(heights) + _GAP), "white")
    draw, top = ImageDraw.Draw(page), _GAP
    for (text, images), height in zip(opened, heights, strict=True):
        shown = text.encode("latin-1", "replace").decode("latin-1")  # what the built-in font can write
        draw.text((_GAP, top), shown, fill="black")
        left = _GAP
        for image in images:
            page.paste(image, (left, top + _LABEL))
            left += image.width + _GAP
        top += height
    file, chunks = io.BytesIO(), PngInfo()
    chunks.add_text("Software", "sightloop")
    page.save(file, "PNG", pnginfo=chunks)
    atomic_write(path, file.getvalue())
