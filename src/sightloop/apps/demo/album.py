"""Images of the demonstration: your own, photographs inside Python packages, or rendered scenes."""

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
class DemoImage:
    """One image of an album.

    Args:
        name: Short name, for the tables.
        image: Path of a file, or encoded bytes.
        text: A true description; empty if none is known.
        question: A question about it; empty if none is known.
        credit: The author.
    """

    name: str
    image: str | bytes
    text: str = ""
    question: str = ""
    credit: str = ""


@dataclass(frozen=True, slots=True)
class Album:
    """Images, and what to try on them.

    Args:
        source: Where the images come from, as the end of a sentence: "from photos", "rendered".
        images: The images.
        labels: Labels for zero-shot classification.
        searches: Query text and index in `images` of the image that it describes.
    """

    source: str
    images: tuple[DemoImage, ...]
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
# Package, file, then `text`, `question` and `credit` of DemoImage. The credits are those of the packages' own notes.
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
    ("skimage", "data/camera.png", "a man is taking a photo in a field", "what is the man doing?", ""),
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


def folder_album(folder: Path, count: int) -> Album:
    """The first `count` images of a folder."""
    paths = islice((path for path in find_images([folder]) if isinstance(path, str)), count)
    images = tuple(DemoImage(Path(path).stem, path, question="what is in the image?") for path in paths)
    return Album(f"from {folder}", images, _LABELS)


def package_album(count: int) -> Album:
    """Up to `count` photographs inside scikit-image and scikit-learn; no images if neither is installed."""
    images: list[DemoImage] = []
    for package, file, text, question, credit in _PHOTOGRAPHS:
        path = _find_in_package(package, file)
        if path is not None:
            name = path.stem.removesuffix("_left")
            credit = f"{_DISTRIBUTIONS[package]}: {credit}" if credit else _DISTRIBUTIONS[package]
            images.append(DemoImage(name, str(path), text, question, credit))
    images = images[:count]
    searches = [(_PHOTO_SEARCHES[s.name], i) for i, s in enumerate(images) if s.name in _PHOTO_SEARCHES]
    return Album("from scikit-image and scikit-learn", tuple(images), _PHOTO_LABELS, tuple(searches))


def synthetic_album(count: int) -> Album:
    """`count` rendered scenes, which need no files."""
    samples = synthetic_world("unseen", count, size=160, different=True)
    images = [
        DemoImage(f"scene {i + 1}", _encoded(s.image), s.captions[0], s.questions[0].question)
        for i, s in enumerate(samples)
    ]
    labels = ("a circle", "a square", "a triangle", "a star", "a ring", "a cross")
    searches = [(image.text, i) for i, image in enumerate(images[:4])]
    return Album("rendered", tuple(images), labels, tuple(searches))


def _encoded(image: bytes | Path) -> bytes:
    assert isinstance(image, bytes)
    return image


def _find_in_package(package: str, file: str) -> Path | None:
    """The path of a file in an installed package, which is not imported: its dependencies may be missing."""
    spec = find_spec(package)
    folders: Sequence[str] = (spec.submodule_search_locations or ()) if spec is not None else ()
    return next(
        (Path(folder, file) for folder in folders if os.path.isfile(os.path.join(folder, file))), None
    )
