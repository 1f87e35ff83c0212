"""Image embeddings as an evaluation task: k-nearest-neighbor classifier and linear probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sightloop.data.rng import generator
from sightloop.errors import UsageError
from sightloop.evaluation.predictions import Records, floats, packed
from sightloop.evaluation.results import ExampleCase, MetricTable, TaskScores
from sightloop.evaluation.task import EvalOptions, TaskPhase, over_images
from sightloop.types import Floats32, Integers, JsonDict, Pixels, Sample

if TYPE_CHECKING:
    from sightloop.inference.model import Model

_NEIGHBORS = 20
_TEMPERATURE = 0.07
_FOLDS = 5
_WEIGHT_DECAY = 1e-3
_QUERY_BATCH = 1024


class ProbingTask:
    """k nearest neighbors and a linear probe over the embeddings of labeled images, cross-validated."""

    def __init__(self, options: EvalOptions) -> None:
        self.seed = options.seed
        self.settings: JsonDict = {}

    def wants(self, sample: Sample) -> bool:
        """It needs a label."""
        return sample.label is not None

    def phases(self) -> Sequence[TaskPhase]:
        """One: the embeddings."""
        return [TaskPhase("embedding images", "image", over_images(self._embed), "embed")]

    def _embed(self, model: Model, samples: list[Sample], images: list[Pixels]) -> list[JsonDict]:
        return [{"image": packed(vector)} for vector in model.embed_images(images)]

    def score(self, samples: Sequence[Sample], records: Records) -> TaskScores:
        """Top-1 of both in five folds: the label of each image is predicted from the images of the four others."""
        keys = [sample.key for sample in samples]
        labels, true = np.unique([sample.label or "" for sample in samples], return_inverse=True)
        if len(labels) < 2 or len(samples) < _FOLDS:
            raise UsageError(f"features: needs at least two labels and {_FOLDS} images")
        vectors = np.stack([floats(records[key]["image"]) for key in keys])  # [N, P]
        fold = _stratified_folds(true, self.seed)
        by_neighbors, by_probe = np.empty(len(keys), np.int64), np.empty(len(keys), np.int64)
        for part in range(_FOLDS):
            test, train = fold == part, fold != part
            by_neighbors[test] = _knn_predict(vectors[train], true[train], vectors[test], len(labels))
            by_probe[test] = _probe_predict(vectors[train], true[train], vectors[test], len(labels))
        method = f"top-1 over {len(labels)} classes, {_FOLDS} folds drawn by the seed"
        protocols = {
            f"{_NEIGHBORS}-NN": (
                f"votes of the {_NEIGHBORS} nearest, each exp(cosine / {_TEMPERATURE}) (Wu et al. 2018)"
            ),
            "linear probe": f"logistic regression on standardized embeddings, L2 {_WEIGHT_DECAY:g}, L-BFGS",
        }
        metrics = tuple(
            MetricTable(name, f"{protocol}; {method}", "images", keys, (predicted == true).astype(np.float64))
            for (name, protocol), predicted in zip(protocols.items(), (by_neighbors, by_probe), strict=True)
        )
        correct = (by_neighbors == true).astype(np.float64) + (by_probe == true)  # [N], of the two
        cases = tuple(
            ExampleCase(
                key,
                float(correct[i]),
                float(by_neighbors[i] != by_probe[i]),
                (
                    ("label", str(labels[true[i]])),
                    ("k-NN", str(labels[by_neighbors[i]])),
                    ("probe", str(labels[by_probe[i]])),
                ),
            )
            for i, key in enumerate(keys)
        )
        return TaskScores(
            metrics, cases=cases, ranked="right or wrong by both; disputed: only one of them is right"
        )


def _stratified_folds(true: Integers, seed: int) -> Integers:
    """Fold of every image, `[N]`; each fold has images of every class that has enough of them.

    Images in random order, sorted by class, get the folds 0, 1, 2, 3, 4, 0, 1, ... in turn.
    """
    order = generator("evaluate", "folds", seed).permutation(len(true))
    fold = np.empty(len(true), np.int64)
    fold[order[np.argsort(true[order], kind="stable")]] = np.arange(len(true)) % _FOLDS
    return fold


def _knn_predict(vectors: Floats32, true: Integers, queries: Floats32, classes: int) -> Integers:
    """Classes of query embeddings by weighted votes of their nearest neighbors (Wu et al. 2018, section 3.4).

    Args:
        vectors: embeddings of the labeled images, `[N, P]`, unit length.
        true: their classes, `[N]`.
        queries: embeddings to classify, `[Q, P]`, unit length.
        classes: number of classes C.

    Returns:
        predicted classes `[Q]`.
    """
    predicted = np.empty(len(queries), np.int64)
    k = min(_NEIGHBORS, len(vectors))
    for low in range(0, len(queries), _QUERY_BATCH):
        batch = queries[low : low + _QUERY_BATCH].astype(np.float64)
        cosine = batch @ vectors.T.astype(np.float64)  # [B, N]
        nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :k]  # [B, k]
        weight = np.exp((np.take_along_axis(cosine, nearest, 1) - 1) / _TEMPERATURE)  # [B, k]
        votes = np.zeros((len(cosine), classes))  # [B, C]
        np.add.at(votes, (np.arange(len(cosine))[:, None], true[nearest]), weight)
        predicted[low : low + _QUERY_BATCH] = votes.argmax(1)
    return predicted


def _probe_predict(vectors: Floats32, true: Integers, queries: Floats32, classes: int) -> Integers:
    """Classes of `queries` `[Q, P]` by multinomial logistic regression on `vectors` `[N, P]`.

    In float64 and from zero weights, so that it is deterministic.
    """
    import torch  # here, because the other tasks score their predictions without it

    x, targets = torch.from_numpy(vectors.astype(np.float64)), torch.from_numpy(true)
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-6)  # [P]
    x = (x - mean) / scale  # [N, P]
    weight = torch.zeros(x.shape[1] + 1, classes, dtype=torch.float64, requires_grad=True)  # last row: bias
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(x @ weight[:-1] + weight[-1], targets)
        value = value + _WEIGHT_DECAY / 2 * weight[:-1].square().sum()
        torch.autograd.backward(value)
        return value

    optimizer.step(loss)  # pyright: ignore[reportUnknownMemberType]
    standardized = (torch.from_numpy(queries.astype(np.float64)) - mean) / scale  # [Q, P]
    return (standardized @ weight[:-1] + weight[-1]).argmax(1).numpy()
