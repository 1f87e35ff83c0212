"""Which images the demonstration shows: yours, photographs that come inside Python packages, or rendered scenes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from sightloop.annotation.inputs import find_images
from sightloop.data.datasets.synthetic import synthetic_world


@dataclass(frozen=True, slots=True)
class Shot:
    """An image: the path of a file, or encoded bytes. text: what is true of it, and question: what to ask; empty where
    nobody said."""

    name: str
    picture: str | bytes
    text: str = ""
    question: str = ""
    credit: str = ""


@dataclass(frozen=True, slots=True)
class Album:
    """Images and what to try with them. searches: (text, the place in `shots` of the image that it means)."""

    where: str
    shots: tuple[Shot, ...]
    labels: tuple[str, ...]
    searches: tuple[tuple[str, int], ...] = ()


_LABELS = (
    "a person",
    "an animal",
    "food",
    "a vehicle",
    "a building",
    "a landscape",
    "a piece of furniture",
    "clothing",
)
_PHOTO_LABELS = ("a person", "a cat", "a cup", "a rocket", "a motorcycle", "a building", "a flower")
_PHOTO_SEARCHES = {
    "astronaut": "a woman in an orange suit",
    "chelsea": "a cat",
    "motorcycle": "a red motorcycle",
    "china": "a building behind trees",
}
# Package, file, then the fields of Shot. The packages' own notes say whose the photographs are.
_PHOTOGRAPHS = (
    (
        "skimage",
        "data/astronaut.png",
        "a woman in an orange space suit is smiling",
        "what is behind the woman?",
        "NASA",
    ),
    (
        "skimage",
        "data/chelsea.png",
        "a cat is looking at the camera",
        "what animal is it?",
        "S. van der Walt",
    ),
    ("skimage", "data/coffee.png", "a cup of coffee on a table", "what is on the table?", "R. Michetti"),
    (
        "skimage",
        "data/rocket.jpg",
        "a rocket is standing under a dark sky",
        "what color is the sky?",
        "SpaceX",
    ),
    ("skimage", "data/camera.png", "a man is taking an image in a field", "what is the man doing?", ""),
    (
        "skimage",
        "data/motorcycle_left.png",
        "a red motorcycle is parked in a garage",
        "what color is the motorcycle?",
        "Middlebury 2014",
    ),
    (
        "sklearn",
        "datasets/images/china.jpg",
        "a building with green roofs stands between trees",
        "what is in front of the building?",
        "danielbuechele, CC BY 2.0",
    ),
    (
        "sklearn",
        "datasets/images/flower.jpg",
        "an orange flower in front of green leaves",
        "what color is the flower?",
        "vultilion, CC BY 2.0",
    ),
)
_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


def own(folder: Path, count: int) -> Album:
    """The first images of a folder."""
    found = islice((path for path in find_images([folder]) if isinstance(path, str)), count)
    shots = tuple(Shot(Path(path).stem, path, question="what is in the image?") for path in found)
    return Album(f"from {folder}", shots, _LABELS)


def packaged(count: int) -> Album:
    """Photographs inside scikit-image and scikit-learn, which are found and not imported; none where they are not."""
    shots: list[Shot] = []
    for package, file, text, question, credit in _PHOTOGRAPHS:
        path = _inside(package, file)
        if path is not None:
            name = path.stem.removesuffix("_left")
            credit = f"{_DISTRIBUTIONS[package]}: {credit}" if credit else _DISTRIBUTIONS[package]
            shots.append(Shot(name, str(path), text, question, credit))
    shots = shots[:count]
    searches = [(_PHOTO_SEARCHES[s.name], i) for i, s in enumerate(shots) if s.name in _PHOTO_SEARCHES]
    return Album("from scikit-image and scikit-learn", tuple(shots), _PHOTO_LABELS, tuple(searches))


def rendered(count: int) -> Album:
    """Scenes of the small world, which need nothing at all."""
    samples = synthetic_world("unseen", count, size=160, different=True)
    shots = [
        Shot(f"scene {i + 1}", _bytes(s.image), s.captions[0], s.questions[0].question)
        for i, s in enumerate(samples)
    ]
    labels = ("a circle", "a square", "a triangle", "a star", "a ring", "a cross")
    searches = [(shot.text, i) for i, shot in enumerate(shots[:4])]
    return Album("rendered", tuple(shots), labels, tuple(searches))


def _bytes(picture: object) -> bytes:
    assert isinstance(picture, bytes)
    return picture


def _inside(package: str, file: str) -> Path | None:
    """A file of an installed package. The package is not run: it may lack what it needs."""
    spec = find_spec(package)
    places: Sequence[str] = (spec.submodule_search_locations or ()) if spec is not None else ()
    return next((Path(place, file) for place in places if os.path.isfile(os.path.join(place, file))), None)
