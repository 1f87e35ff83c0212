"""ITC's two projections, fitted to a teacher: python recipes/nano/project.py MODEL OUT DATA... --features FOLDER...

The towers stay as they are, and with them captions, answers and ITM: only what is read from the two class tokens is
new. The teacher is a bag of words (and of pairs of neighboring words) against the mean features of the trunk's head,
learned here with ITC: from few captions it generalizes better than the towers, which learn them by heart. The new
projections reproduce a sum of cosines, `--share` of the teacher's and the rest of the model's own, by ridge regression
of the embeddings on the class tokens. The folders of features are those of `features.py`.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sightloop
from sightloop.errors import ImageError
from sightloop.models.blip import Blip
from sightloop.nn.prepack import unpack
from sightloop.protocols import require
from sightloop.towers.efficientnet import EfficientNet
from sightloop.training.features import FeatureStore

VIEWS, WIDTH, BATCH = 2, 512, 1024
LEAST_WORDS = 4  # captions that a word is in


def words_of(text: str) -> list[str]:
    """Its words, then its pairs of neighboring words."""
    words = re.findall(r"[a-z]+", text.lower())
    return words + [f"{a} {b}" for a, b in pairwise(words)]


class Teacher(nn.Module):
    """Bags of words and mean features -> embeddings of one space."""

    def __init__(self, vocabulary: dict[str, int], features: Tensor) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.words = nn.EmbeddingBag(len(vocabulary) + 1, WIDTH, mode="mean", padding_idx=0)
        self.text = nn.Sequential(nn.Dropout(0.2), nn.Linear(WIDTH, WIDTH))
        self.image = nn.Sequential(nn.Dropout(0.3), nn.Linear(features.shape[-1], WIDTH))
        self.scale = nn.Parameter(torch.tensor(2.7))
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("std", features.std(0) + 1e-3)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """R texts -> unit vectors `[R, WIDTH]`."""
        bags = [
            [self.vocabulary[word] for word in words_of(text) if word in self.vocabulary] or [0]
            for text in texts
        ]
        offsets = torch.tensor([0, *map(len, bags[:-1])]).cumsum(0)
        return F.normalize(
            self.text(self.words(torch.tensor([i for bag in bags for i in bag]), offsets)), dim=1
        )

    def embed_images(self, features: Tensor) -> Tensor:
        """Mean features `[B, C]` -> unit vectors `[B, WIDTH]`."""
        return F.normalize(self.image((features - self.mean) / self.std), dim=1)


def train_teacher(features: Tensor, texts: Sequence[Sequence[str]], steps: int, seed: int) -> Teacher:
    """ITC on mean features `[N, VIEWS, C]` and the texts of N images; equal texts of a batch are all right."""
    torch.manual_seed(seed)
    counts = Counter(word for own in texts for text in own for word in set(words_of(text)))
    known = [word for word, count in counts.items() if count >= LEAST_WORDS * (1 + (" " in word))]
    teacher = Teacher({word: i + 1 for i, word in enumerate(known)}, features.flatten(0, 1))
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-3, weight_decay=1e-2)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, step / 20) * (1 - step / steps)
        rows = torch.randperm(len(texts))[:BATCH].tolist()
        picked = [texts[row][int(torch.randint(len(texts[row]), ()))] for row in rows]
        views = torch.randint(features.shape[1], (len(rows),))
        logits = (
            teacher.embed_images(features[rows, views]) @ teacher.embed_texts(picked).T * teacher.scale.exp()
        )
        same = torch.tensor([[float(a == b) for b in picked] for a in picked])
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            print(f"teacher {seed}: step {step + 1}, itc {loss.item():.3f}", flush=True)
    return teacher.eval()


@torch.no_grad()
def read_images(net: Blip, pattern: str, store: FeatureStore) -> tuple[Tensor, Tensor, list[list[str]]]:
    """Mean features `[N, VIEWS, C]`, class tokens `[N, VIEWS, D]` and texts of the images that have features."""
    vision = require(net.vision, EfficientNet)
    means: list[Tensor] = []
    tokens: list[Tensor] = []
    texts: list[list[str]] = []
    for sample in sightloop.open_dataset(pattern):
        try:
            views = np.stack([store.get(sample, view) for view in range(VIEWS)]).astype(np.float32)
        except ImageError:
            continue
        trunk = torch.from_numpy(views)
        means.append(F.relu6(vision.head(trunk)).mean((2, 3)))
        pooled = vision(trunk).pooled
        tokens.append(pooled)
        texts.append(list(sample.captions))
    print(f"{pattern}: {len(texts)} images", flush=True)
    return torch.stack(means), torch.stack(tokens), texts


@torch.no_grad()
def text_states(model: sightloop.Model, net: Blip, texts: Sequence[str]) -> Tensor:
    """Class tokens `[R, D]` of R texts, before the projection."""
    states: list[Tensor] = []
    handle = net.text_projection.register_forward_hook(lambda _, inputs, __: states.append(inputs[0]))
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    tokens = model.tokenize(list(texts))
    for start in range(0, len(order), 256):
        net.embed_text(*tokens.rows(np.array(order[start : start + 256])))
    handle.remove()
    found = torch.cat(states)
    return found[torch.tensor(order).argsort()]


class Standard:
    """Inputs `[N, in]` with mean 0 and deviation 1, and the maps of them put back to inputs as they are."""

    def __init__(self, inputs: Tensor) -> None:
        self.mean, self.std = inputs.double().mean(0), inputs.double().std(0) + 1e-6

    def __call__(self, inputs: Tensor) -> Tensor:
        return (inputs.double() - self.mean) / self.std

    def undo(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A map `[out, in + 1]` of standardized inputs and 1 -> weight `[out, in]`, bias `[out]`."""
        plain = weight[:, :-1] / self.std
        return plain.float(), (weight[:, -1] - plain @ self.mean).float()


def ridge(inputs: Tensor, targets: Tensor, strength: float) -> Tensor:
    """The map `[out, in + 1]` of standardized inputs `[N, in]` and 1 to targets `[N, out]`."""
    gram = inputs.T @ inputs / len(inputs) + strength * torch.eye(inputs.shape[1], dtype=torch.float64)
    goal = targets.double().mean(0)
    weight = torch.linalg.solve(gram, inputs.T @ (targets.double() - goal) / len(inputs)).T
    return torch.cat([weight, goal[:, None]], 1)


def factors(left: Tensor, right: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Both maps `[out, in + 1]` in the `dim` directions that their products need most, each `[dim, in + 1]`."""
    u, s, vt = torch.linalg.svd(left.T @ right)
    root = s[:dim].sqrt()
    return (u[:, :dim] * root).T, (vt[:dim].T * root).T


def main(source: str, target: str, patterns: list[str], folders: list[str], **options: float) -> None:
    """Write OUT, a folder that `load` reads."""
    share, steps, seeds = options["share"], int(options["steps"]), int(options["seeds"])
    model = sightloop.load(source, device="cpu", dtype="float32")
    net = require(model.network, Blip)
    unpack(net)
    store = FeatureStore(folders)
    parts = [read_images(net, pattern, store) for pattern in patterns]
    means, tokens = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    texts = [own for part in parts for own in part[2]]
    unique = list(dict.fromkeys(text for own in texts for text in own))
    teachers = [train_teacher(means, texts, steps, seed) for seed in range(seeds)]
    states = text_states(model, net, unique)
    with torch.no_grad():
        flat = tokens.flatten(0, 1)
        image_goal = [t.embed_images(means.flatten(0, 1)) * (share / seeds) ** 0.5 for t in teachers]
        text_goal = [t.embed_texts(unique) * (share / seeds) ** 0.5 for t in teachers]
        image_goal.append(F.normalize(net.image_projection(flat), dim=1) * (1 - share) ** 0.5)
        text_goal.append(F.normalize(net.text_projection(states), dim=1) * (1 - share) ** 0.5)
    layers = (net.image_projection, net.text_projection)
    inputs, goals = (flat, states), (torch.cat(image_goal, 1), torch.cat(text_goal, 1))
    standards = [Standard(own) for own in inputs]
    maps = [
        ridge(standard(own), goal, options["ridge"])
        for standard, own, goal in zip(standards, inputs, goals, strict=True)
    ]
    for layer, standard, weight in zip(layers, standards, factors(*maps, len(layers[0].weight)), strict=True):
        plain, bias = standard.undo(weight)
        layer.weight.data.copy_(plain)
        layer.bias.data.copy_(bias)
    model.save(target)
    print(f"{target}: projections of {len(flat)} views and {len(unique)} texts", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("data", nargs="+")
    parser.add_argument("--features", nargs="+", required=True)
    parser.add_argument("--share", type=float, default=0.7)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--ridge", type=float, default=1e-3)
    given = vars(parser.parse_args())
    main(given.pop("model"), given.pop("out"), given.pop("data"), given.pop("features"), **given)
