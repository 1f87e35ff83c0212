"""Frozen features as a task: nearest neighbours and a linear probe."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from sightloop.data.rng import generator
from sightloop.errors import UsageError
from sightloop.evaluation.predictions import Records, floats, packed
from sightloop.evaluation.results import ExampleCase, MetricTable, TaskScores
from sightloop.evaluation.task import EvalOptions, Events, TaskContext, TaskPhase
from sightloop.types import JsonDict, Pixels, Sample

_NEIGHBOURS, _HEAT = 20, 0.07


_FOLDS, _DECAY = 5, 1e-3


class ProbingTask:
    """k nearest neighbours and a linear probe over the embeddings of labelled images."""

    def __init__(self, options: EvalOptions) -> None:
        self.seed = options.seed
        self.settings: JsonDict = {}

    def wants(self, sample: Sample) -> bool:
        """It needs a label."""
        return sample.label is not None

    def phases(self) -> Sequence[TaskPhase]:
        """One."""
        return [TaskPhase("embedding images", "image", self._embed, "embed")]

    def _embed(self, work: TaskContext, samples: list[Sample]) -> Events:
        def verb(_: list[Sample], pictures: list[Pixels]) -> list[JsonDict]:
            return [{"image": packed(vector)} for vector in work.model().embed_images(pictures)]

        return work.pictures(samples, verb)

    def score(self, samples: Sequence[Sample], records: Records) -> TaskScores:
        """Both in five folds: each image is judged by what was learned on the four others."""
        keys = [sample.key for sample in samples]
        labels, true = np.unique([sample.label or "" for sample in samples], return_inverse=True)
        if len(labels) < 2 or len(samples) < _FOLDS:
            raise UsageError(f"features: needs at least two labels and {_FOLDS} images")
        vectors = np.stack([floats(records[key]["image"]) for key in keys])
        order = generator("evaluate", "folds", self.seed).permutation(len(keys))
        fold = np.empty(len(keys), np.int64)
        # Dealt class by class, so that every fold has of all classes.
        fold[order[np.argsort(true[order], kind="stable")]] = np.arange(len(keys)) % _FOLDS
        near, probe = np.empty(len(keys), np.int64), np.empty(len(keys), np.int64)
        for part in range(_FOLDS):
            held, rest = fold == part, fold != part
            near[held] = _neighbours(vectors[rest], true[rest], vectors[held], len(labels))
            probe[held] = _probe(vectors[rest], true[rest], vectors[held], len(labels))
        how = f"top-1 over {len(labels)} classes, {_FOLDS} folds drawn by the seed"
        said = {
            f"{_NEIGHBOURS}-NN": f"votes of the {_NEIGHBOURS} nearest, each exp(cosine / {_HEAT}) (Wu et al. 2018)",
            "linear probe": f"logistic regression on standardised embeddings, L2 {_DECAY:g}, L-BFGS",
        }
        measures = tuple(
            MetricTable(name, f"{words}; {how}", "images", keys, found == true)
            for (name, words), found in zip(said.items(), (near, probe), strict=True)
        )
        right = (near == true).astype(np.float64) + (probe == true)
        cases = tuple(
            ExampleCase(
                key,
                float(right[i]),
                float(near[i] != probe[i]),
                (
                    ("label", str(labels[true[i]])),
                    ("k-NN", str(labels[near[i]])),
                    ("probe", str(labels[probe[i]])),
                ),
            )
            for i, key in enumerate(keys)
        )
        return TaskScores(
            measures, cases=cases, ranked="right or wrong by both; disputed: one of them is right"
        )


def _neighbours(
    bank: NDArray[np.float32], true: NDArray[np.int64], asked: NDArray[np.float32], classes: int
) -> NDArray[np.int64]:
    out = np.empty(len(asked), np.int64)
    k = min(_NEIGHBOURS, len(bank))
    for low in range(0, len(asked), 1024):
        cosine = asked[low : low + 1024].astype(np.float64) @ bank.T.astype(np.float64)
        best = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
        votes = np.zeros((len(cosine), classes))
        weight = np.exp((np.take_along_axis(cosine, best, 1) - 1) / _HEAT)
        np.add.at(votes, (np.arange(len(cosine))[:, None], true[best]), weight)
        out[low : low + 1024] = votes.argmax(1)
    return out


def _probe(
    bank: NDArray[np.float32], true: NDArray[np.int64], asked: NDArray[np.float32], classes: int
) -> NDArray[np.int64]:
    """Multinomial logistic regression in float64 from zero weights: no randomness in it."""
    x, targets = torch.from_numpy(bank.astype(np.float64)), torch.from_numpy(true)
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-6)
    x = (x - mean) / scale
    weight = torch.zeros(x.shape[1] + 1, classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        value = torch.nn.functional.cross_entropy(x @ weight[:-1] + weight[-1], targets)
        value = value + _DECAY / 2 * weight[:-1].square().sum()
        torch.autograd.backward(value)
        return value

    solver.step(loss)  # pyright: ignore[reportUnknownMemberType]
    rest = (torch.from_numpy(asked.astype(np.float64)) - mean) / scale
    return (rest @ weight[:-1] + weight[-1]).argmax(1).numpy()
