"""Does a painter draw what its text asks for? Product images, judged by a classifier that learned from real ones.

    sightloop train painter --data train.tar --out RUN --set model.size=painter-small ...
    python recipes/drawn_products.py RUN/model train.tar test.tar OUT

The tars are WebDatasets whose json has "captions", "kind" (what it is) and "color". The classifier is linear, on the
bundled model's image tokens and a thumbnail, and learns from the real images of train.tar. Prompts are the last
captions of images of test.tar; drawings are judged for the kind and the color of that image, for those of another
prompt (chance), and beside the real images (the classifier's own accuracy). OUT/products.json has the figures with 95 %
intervals, OUT/neighbors.png 16 drawings over the training images that are nearest to them, and OUT/drawings.png the
same drawings over the real image of their prompt.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

import sightloop
from sightloop.data.atomic import atomic_write
from sightloop.data.datasets.dataset import Dataset
from sightloop.metrics.bootstrap_ci import bootstrap_interval
from sightloop.types import Sample

KINDS, COLORS = 20, 12  # the most frequent ones of the training images
LEARN, SHOWN = 12000, 16
Rows = NDArray[np.float32]


class Item:
    """A product: its image, prompt, kind and color."""

    def __init__(self, sample: Sample) -> None:
        assert isinstance(sample.image, bytes)
        self.image = Image.open(BytesIO(sample.image)).convert("RGB")
        self.prompt, self.kind, self.color = sample.captions[-1], sample.extra["kind"], sample.extra["color"]


def items_of(dataset: Dataset, kinds: Sequence[str], colors: Sequence[str], most: int) -> list[Item]:
    """The products of frequent kinds and colors, in a fixed random order."""
    order = np.random.default_rng(0).permutation(len(dataset))
    found: list[Item] = []
    for row in order:
        sample = dataset[int(row)]
        if sample.extra["kind"] in kinds and sample.extra["color"] in colors:
            found.append(Item(sample))
            if len(found) == most:
                break
    return found


def frequent(dataset: Dataset, field: str, most: int) -> list[str]:
    """The most frequent values of a field."""
    return [value for value, _ in Counter(sample.extra[field] for sample in dataset).most_common(most)]


def describe(model: sightloop.Model, images: Sequence[Image.Image]) -> Rows:
    """What the classifier sees of N images: the mean of the image tokens and 8 x 8 pixels, `[N, D]`."""
    rows: list[Rows] = []
    for start in range(0, len(images), 64):
        part = list(images[start : start + 64])
        tokens = model.encode(list(model.read(part))).tokens.mean(1).numpy()
        small = np.stack([np.asarray(image.resize((8, 8), Image.Resampling.BOX)).ravel() for image in part])
        rows.append(np.concatenate([tokens, small.astype(np.float32) / 64], 1))
    return np.concatenate(rows)


class Classifier:
    """Softmax regression on standardized rows."""

    def __init__(self, rows: Rows, labels: Sequence[str], names: Sequence[str]) -> None:
        self.names = list(names)
        self.mean, self.std = rows.mean(0), rows.std(0) + 1e-4
        inputs, target = self._inputs(rows), torch.tensor([self.names.index(label) for label in labels])
        self.layer = torch.nn.Linear(inputs.shape[1], len(self.names))
        optimizer = torch.optim.LBFGS(self.layer.parameters(), max_iter=80, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            value = torch.nn.functional.cross_entropy(self.layer(inputs), target)
            value = value + 1e-3 * self.layer.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)  # pyright: ignore[reportArgumentType]

    def _inputs(self, rows: Rows) -> torch.Tensor:
        return torch.from_numpy((rows - self.mean) / self.std)

    def __call__(self, rows: Rows) -> list[str]:
        return [self.names[int(i)] for i in self.layer(self._inputs(rows)).argmax(1)]


def accuracy(found: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """The share that is right, with its interval."""
    right = np.array([float(a == b) for a, b in zip(found, wanted, strict=True)])
    interval = bootstrap_interval(right)
    return {"share": interval.value, "low": interval.low, "high": interval.high, "images": len(right)}


def nearest(drawn: Sequence[Image.Image], real: Sequence[Image.Image]) -> list[int]:
    """For each drawing the image with the least squared distance of pixels."""
    known = np.stack([np.asarray(image, np.float32).ravel() for image in real])
    norms = (known**2).sum(1)
    rows = np.stack([np.asarray(image.resize(real[0].size), np.float32).ravel() for image in drawn])
    return [int(i) for i in (norms[None] - 2 * rows @ known.T).argmin(1)]


def sheet(above: Sequence[Image.Image], below: Sequence[Image.Image], path: Path) -> None:
    """Images in a row over others."""
    side = above[0].width
    canvas = Image.new("RGB", (len(above) * (side + 4), 2 * side + 4), "white")
    for column, pair in enumerate(zip(above, below, strict=True)):
        for line, image in enumerate(pair):
            canvas.paste(image.resize((side, side)), (column * (side + 4), line * (side + 4)))
    canvas.resize((2 * canvas.width, 2 * canvas.height), Image.Resampling.NEAREST).save(path)


def main(painter: str, train: str, test: str, out: Path, *, prompts: int, seed: int) -> None:
    """Draw, judge and write."""
    out.mkdir(parents=True, exist_ok=True)
    learned, unseen = sightloop.open_dataset(train), sightloop.open_dataset(test)
    kinds, colors = frequent(learned, "kind", KINDS), frequent(learned, "color", COLORS)
    known, asked = items_of(learned, kinds, colors, LEARN), items_of(unseen, kinds, colors, prompts)
    eyes = sightloop.load("nano", device="cpu")
    rows = describe(eyes, [item.image for item in known])
    judges = {
        "kind": Classifier(rows, [item.kind for item in known], kinds),
        "color": Classifier(rows, [item.color for item in known], colors),
    }
    model = sightloop.load(painter, device="cpu")
    drawn = list(model.draw([item.prompt for item in asked], seed=seed))
    figures: dict[str, dict[str, float]] = {}
    turned = [*asked[1:], asked[0]]
    for name, judge in judges.items():
        of_drawn, of_real = judge(describe(eyes, drawn)), judge(describe(eyes, [i.image for i in asked]))
        wanted = [getattr(item, name) for item in asked]
        figures[f"{name}, drawn"] = accuracy(of_drawn, wanted)
        figures[f"{name}, drawn, by other prompts"] = accuracy(of_drawn, [getattr(i, name) for i in turned])
        figures[f"{name}, real"] = accuracy(of_real, wanted)
    for name, own in figures.items():
        print(f"{name}\t{own['share']:.3f}\t{own['low']:.3f} to {own['high']:.3f}\t{own['images']:.0f}")
    about = {"kinds": kinds, "colors": colors, "figures": figures}
    atomic_write(out / "products.json", json.dumps(about, indent=1))
    every = [Item(sample).image for sample in learned]
    first = drawn[:SHOWN]
    sheet(first, [every[i] for i in nearest(first, every)], out / "neighbors.png")
    sheet(first, [item.image for item in asked[:SHOWN]], out / "drawings.png")
    print("first prompts: " + "; ".join(item.prompt for item in asked[:SHOWN]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("painter", "train", "test"):
        parser.add_argument(name)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args())
    main(**given)
