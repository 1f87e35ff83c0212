"""A fake model for tests of the command line and the demo: no torch, no weights, no child processes."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from sightloop.data.images.batch_size import BatchSizer
from sightloop.errors import ImageError
from sightloop.types import ImageSpec, Pixels, Region


@dataclass
class FakeModel:
    """Captions an image with `texts[stem]`, or "an image of STEM", and records every call in `calls`."""

    name: str = "fake"
    capabilities: frozenset[str] = frozenset(
        {
            "embed",
            "similarity",
            "classify",
            "match",
            "caption",
            "answer",
            "detect",
            "locate",
            "segment",
            "read",
        }
    )
    image_spec: ImageSpec = ImageSpec(resize=(2, 2))  # noqa: RUF009
    batch_size: int = 4
    seconds: float = 0.0
    texts: dict[str, str] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    calls: list = field(default_factory=list)
    read_names: list[str] = field(default_factory=list)

    @property
    def sizer(self):
        return BatchSizer(self.batch_size)

    @property
    def module(self):
        """Network without a weight."""
        return SimpleNamespace(parameters=tuple)

    @property
    def encoder(self):
        """Encoder whose readers are this model, however many frames of a video they are to take."""
        return SimpleNamespace(sampling=lambda _: SimpleNamespace(preprocessor=self))

    def read(self, sources, *, workers=2, isolate=True, limits=None):
        for source in sources:
            self.read_names.append(source)
            try:
                with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                    small = np.asarray(image.convert("RGB").resize((2, 2)))
                yield Pixels(
                    str(source[:8]) if isinstance(source, bytes) else source,
                    small.transpose(2, 0, 1).copy(),
                    (image.height, image.width),
                )
            except OSError:
                yield ImageError(source, "not an image of a known kind")

    def caption(self, images, prompt=None, **decoding):
        time.sleep(self.seconds)
        self.calls.append(("caption", [image.name for image in images], prompt, decoding))
        stems = [Path(image.name).stem for image in images]
        return [self.texts.get(stem, f"{prompt or 'an image of'} {stem}") for stem in stems]

    def answer(self, images, questions, candidates=None, **decoding):
        self.calls.append(("answer", len(images), candidates, decoding))
        return [f"{Path(i.name).stem}: {q}" for i, q in zip(images, questions, strict=True)]

    def detect(self, images, phrases=None, *, describe=False, **decoding):
        self.calls.append(("detect", phrases, describe, decoding))
        labels = phrases or ["a thing" if describe else "thing"]
        return [[self._region(image, label) for label in labels] for image in images]

    def locate(self, images, phrases, **decoding):
        self.calls.append(("locate", list(phrases), decoding))
        return [[self._region(image, text)] for image, text in zip(images, phrases, strict=True)]

    def segment(self, images, phrases, **decoding):
        self.calls.append(("segment", list(phrases), decoding))
        corners = ((0.0, 0.0, 4.0, 0.0, 0.0, 4.0),)
        return [
            [replace(self._region(image, str(text)), polygons=corners)]
            for image, text in zip(images, phrases, strict=True)
        ]

    def read_text(self, images, **decoding):
        self.calls.append(("read", decoding))
        return [[self._region(image, Path(image.name).stem)] for image in images]

    def _region(self, image, label):
        height, width = image.size
        return Region(label, (0.0, 0.0, width / 2, height / 2), score=0.5)

    activation = "softmax"

    def classify(self, images, labels, templates=("a photo of a {}.",), *, activation=None):
        self.calls.append(("classify", tuple(labels), tuple(templates)))
        weights = np.arange(1, len(labels) + 1, dtype=np.float32)
        return np.tile(weights / weights.sum(), (len(images), 1))

    def match(self, images, texts):
        self.calls.append(("match", list(texts)))
        return np.array([self.scores.get(text, 0.75) for text in texts], np.float32)

    def embed_texts(self, texts):
        texts = [texts] if isinstance(texts, str) else texts
        return np.stack([np.eye(5, dtype=np.float32)[len(text) % 5] for text in texts])

    def embed_images(self, images):
        return np.stack([np.eye(5, dtype=np.float32)[int(i.values.sum()) % 5] for i in images])


def make_image(path: Path, color: tuple[int, int, int] = (200, 100, 50)) -> Path:
    """Writes an image of 4 x 3 pixels in one color."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), color).save(path)
    return path
