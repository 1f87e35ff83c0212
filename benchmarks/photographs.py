"""Real photographs and captions for the benchmark: a folder that is named, else those inside two packages.

The packages are scikit-image and scikit-learn, whose photographs `make demo` shows (`sightloop.apps.demo.album`), with
a caption each, written by a person. Without either: noise over gradients, and random words.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

SIZE = (640, 480)
_ENDINGS = (".jpg", ".jpeg", ".png")
_WORDS = (
    "a an the two three red blue green white black small large old young dog cat man woman boy girl tree car house "
    "street beach ball hat is are in on with of and what colour photo image standing sitting running shirt sky "
    "door bag ground wall table water horse bike boat sign bird grass shoe cup"
).split()


def photographs(data: Path | None, count: int, notes: list[str]) -> Iterator[Any]:
    """`count` RGB images of 640 x 480: photographs of `data`, else parts of those of the packages, else noise."""
    from PIL import Image

    found = [] if data is None else list(islice(_encoded(data), count))
    if found:
        if len(found) < count:
            notes.append(f"{len(found)} photographs, used again and again")
        for encoded in islice(cycle(found), count):
            yield Image.open(io.BytesIO(encoded)).convert("RGB").resize(SIZE, Image.Resampling.LANCZOS)
        return
    packaged = [Image.open(image.image).convert("RGB") for image in _album()]
    if not packaged:
        notes.append("the images are generated (noise over gradients), not photographs")
    else:
        notes.append(f"{count} parts of the {len(packaged)} photographs inside scikit-image and scikit-learn")
    for i in range(count):
        if packaged:
            yield part(packaged[i % len(packaged)], i // len(packaged))
        else:
            yield Image.fromarray(_noise(i))


def captions(data: Path | None, count: int, notes: list[str]) -> list[str]:
    """`count` captions: the first of each image of `data`, else those of the packages' photographs, else words."""
    found = [] if data is None else list(islice(_captions(data), count))
    if not found:
        found = [image.text for image in _album()]
    if not found:
        notes.append("the captions are random words, not written by people")
        return [
            " ".join(_WORDS[(i * 7 + j * 5) % len(_WORDS)] for j in range(7 + i % 11)) for i in range(count)
        ]
    if len(found) < count:
        notes.append(f"{len(found)} captions written by people, used again and again")
    return list(islice(cycle(found), count))


def words() -> Sequence[str]:
    """The words that captions and questions of the benchmark are made of."""
    return _WORDS


def part(image: Any, number: int) -> Any:
    """A part of an image, as wide as high as 4:3 allows, then smaller and elsewhere: 640 x 480."""
    from PIL import Image

    width, height = image.size
    share = 1.0 - 0.04 * (number % 12)
    wide = int(min(width, height * 4 / 3) * share)
    high = wide * 3 // 4
    left, top = (width - wide) * (number % 5) // 4, (height - high) * (number % 3) // 2
    return image.resize(SIZE, Image.Resampling.LANCZOS, (left, top, left + wide, top + high))


def _album() -> Sequence[Any]:
    from sightloop.apps.demo.album import package_album

    return package_album(100).images


def _encoded(data: Path) -> Iterator[bytes]:
    """The image files of a folder and of the .tar shards in it, by name."""
    for path in sorted(data.rglob("*")):
        if path.suffix.lower() in _ENDINGS:
            yield path.read_bytes()
        elif path.suffix == ".tar":
            for name, content in _members(path):
                if name.lower().endswith(_ENDINGS):
                    yield content


def _captions(data: Path) -> Iterator[str]:
    """The first caption of each image: of .txt files beside images, and of the .json in .tar shards."""
    for path in sorted(data.rglob("*")):
        if path.suffix == ".txt" and any(path.with_suffix(ending).is_file() for ending in _ENDINGS):
            yield path.read_text("utf-8").strip()
        elif path.suffix == ".tar":
            for name, content in _members(path):
                if name.endswith(".json"):
                    yield from json.loads(content).get("captions", [])[:1]


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None:
                yield member.name, file.read()


def _noise(seed: int) -> Any:
    import numpy as np

    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.integers(0, 180, (12, 16, 3)), np.ones((40, 40, 1), dtype=np.int64))
    return (coarse + rng.integers(0, 60, (480, 640, 3))).astype(np.uint8)
