"""Tasks in which a model chooses or scores: classes, matching pairs, features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from sightread.data.randomness import generator
from sightread.errors import UsageError
from sightread.pipelines.evaluation.measures import Case, Measure, Scored, remembered
from sightread.pipelines.evaluation.predictions import Records, floats, packed
from sightread.pipelines.evaluation.tasks import Events, Options, Phase, Work, row
from sightread.pipelines.evaluation.templates import TEMPLATES
from sightread.pipelines.metrics.matching import matching_curves, matching_scores
from sightread.pipelines.metrics.ptb import tokenize
from sightread.types import Pixels, Sample

Floats: TypeAlias = NDArray[np.float64]

_TOP = 5
_POOL = 200  # captions that a hard mismatch is chosen among
_NEIGHBOURS, _HEAT = 20, 0.07
_FOLDS, _DECAY = 5, 1e-3


class Classes:
    """Classification of labelled pictures: by the model's own layer where it was fine-tuned for these very labels,
    zero-shot otherwise."""

    def __init__(self, options: Options, samples: Sequence[Sample]) -> None:
        own = {sample.label for sample in samples if sample.label is not None}
        self.labels = sorted(own) if options.labels is None else list(options.labels)
        if strange := sorted(own - set(self.labels)):
            raise UsageError(f"labels: {strange[0]!r} is a label of the data, and not among those given")
        if len(self.labels) < 2:
            raise UsageError("classify: needs at least two labels")
        self.templates = options.sentences
        self.settings: dict[str, Any] = {"labels": self.labels, "templates": self.templates}

    def _named(self) -> str:
        known = [name for name, texts in TEMPLATES.items() if texts == self.templates]
        return f"the set {known[0]}" if known else " | ".join(self.templates)

    def wants(self, sample: Sample) -> bool:
        """It needs a label."""
        return sample.label is not None

    def phases(self) -> Sequence[Phase]:
        """One."""
        return [Phase("classifying", "top", self._classify, "classify")]

    def _classify(self, work: Work, samples: list[Sample]) -> Events:
        def verb(_: list[Sample], pictures: list[Pixels]) -> list[dict[str, Any]]:
            model = work.model()
            learned = tuple(self.labels) == model.labels
            found = model.classify(pictures, None if learned else self.labels, self.templates)
            best = np.argsort(-found, axis=1, kind="stable")[:, :_TOP]
            return [
                {"top": [[self.labels[j], float(row[j])] for j in chosen]}
                | ({"learned": True} if learned else {})
                for row, chosen in zip(found, best, strict=True)
            ]

        return work.pictures(samples, verb)

    def score(self, samples: Sequence[Sample], records: Records) -> Scored:
        """Top-1, top-5, the mean over classes, each class, and who is taken for whom."""
        keys = [sample.key for sample in samples]
        number = {label: i for i, label in enumerate(self.labels)}
        true = np.array([number[sample.label or ""] for sample in samples])
        tops = [records[key]["top"] for key in keys]
        first = np.array([number[top[0][0]] for top in tops])
        hit = (first == true).astype(np.float64)
        many = np.array(
            [s.label in [label for label, _ in top] for s, top in zip(samples, tops, strict=True)]
        )
        learned = any("learned" in records[key] for key in keys)
        how = (
            f"by the layer that was fine-tuned for these {len(self.labels)} classes"
            if learned
            else (
                f"zero-shot over {len(self.labels)} classes; {len(self.templates)} template(s) averaged as embeddings "
                f"(Radford et al. 2021, 3.1.4): {self._named()}"
            )
        )

        def per_class(table: Floats) -> float:
            of = table[:, 0].astype(np.int64)
            sizes = np.bincount(of)
            return float((np.bincount(of, table[:, 1])[sizes > 0] / sizes[sizes > 0]).mean())

        def accuracy(name: str, words: str, chosen: NDArray[np.int64], values: Floats) -> Measure:
            rows = [keys[i] for i in chosen]
            return Measure(name, f"{words}; {how}", "pictures", rows, values[chosen])

        whole = np.arange(len(keys))
        measures = [accuracy("top-1", "share whose label is the first", whole, hit)]
        if len(self.labels) > _TOP:
            measures.append(
                accuracy("top-5", "share whose label is among the first five", whole, many.astype(np.float64))
            )
        measures.append(
            Measure(
                "mean per class",
                f"mean over classes of the share of their pictures whose label is the first; {how}",
                "pictures",
                keys,
                np.stack([true, hit], 1),
                of_rows=per_class,
            )
        )
        for place, label in enumerate(self.labels):
            if len(mine := np.flatnonzero(true == place)):
                measures.append(accuracy(f"top-1[{label}]", f"of the pictures labelled {label}", mine, hit))
        table = np.zeros((len(self.labels),) * 2, np.int64)
        np.add.at(table, (true, first), 1)
        cases = tuple(_class_case(s, top) for s, top in zip(samples, tops, strict=True))
        how = "probability of the label less that of the best other; disputed: the first two are close"
        return Scored(tuple(measures), cases=cases, ranked=how, confusion=(tuple(self.labels), table))


class Matching:
    """Which score is a match: each caption with its picture, against captions of other pictures."""

    def __init__(self, options: Options, samples: Sequence[Sample]) -> None:
        self.judge = options.judge
        self.wrong = mismatches([s for s in samples if s.captions], options.seed)
        self.settings: dict[str, Any] = {"judge": options.judge, "seed": options.seed}

    def wants(self, sample: Sample) -> bool:
        """It needs captions."""
        return bool(sample.captions)

    def phases(self) -> Sequence[Phase]:
        """One: all pairs of a picture together."""
        if self.judge == "itc":
            return [Phase("comparing pairs", "scores", self._score_pairs, "embed")]
        without = ' For the cosine of the embeddings: judge="itc", --judge-by itc.'
        return [Phase("judging pairs", "scores", self._score_pairs, "match", without)]

    def _score_pairs(self, work: Work, samples: list[Sample]) -> Events:
        def verb(some: list[Sample], pictures: list[Pixels]) -> list[dict[str, Any]]:
            texts = [
                t for s in some for i, own in enumerate(s.captions) for t in (own, *self.wrong[s.key][i])
            ]
            owner = [place for place, s in enumerate(some) for _ in range(3 * len(s.captions))]
            model = work.model()
            if self.judge == "itm":
                scores = model.match([pictures[place] for place in owner], texts)
            else:
                vectors = model.embed_texts(texts)
                images = model.embed_images(pictures)[owner].reshape(len(texts), -1, vectors.shape[1])
                scores = (images * vectors[:, None]).sum(2).max(1)
            ends = np.cumsum([3 * len(sample.captions) for sample in some])[:-1]
            return [{"scores": part.reshape(-1, 3).tolist()} for part in np.split(scores, ends)]

        return work.pictures(samples, verb)

    def score(self, samples: Sequence[Sample], records: Records) -> Scored:
        """For random and for hard mismatches: curves, calibration, the recommended threshold and its cost."""
        rows = [row(sample.key, i) for sample in samples for i in range(len(sample.captions))]
        table = np.array([each for sample in samples for each in records[sample.key]["scores"]], np.float64)
        what = "ITM probability" if self.judge == "itm" else "ITC cosine"
        kinds = {
            "random": "the caption of another picture, drawn by the seed",
            "hard": f"of {_POOL} captions of other pictures, drawn by the seed, the one that shares most words",
        }
        measures: list[Measure] = []
        curves: dict[str, tuple[str, str, Floats]] = {}
        for column, (kind, words) in enumerate(kinds.items(), 1):
            pairs = table[:, [0, column]]
            family = remembered(_pair_scores)
            for name in family(pairs):
                protocol = f"{what}; every caption with its picture against as many mismatches: {words}"
                if said := _SAID.get(name):
                    protocol = f"{said}; {protocol}"
                measures.append(
                    Measure(
                        f"{name} ({kind})",
                        protocol,
                        "captions",
                        rows,
                        pairs,
                        of_rows=lambda drawn, name=name, family=family: family(drawn)[name],
                    )
                )
            drawn = matching_curves(pairs.T.ravel(), np.repeat([1, 0], len(pairs)))
            curves[f"ROC ({kind})"] = (
                "false matches",
                "matches found",
                np.stack([drawn.false_positive_rate, drawn.recall], 1),
            )
            curves[f"precision and recall ({kind})"] = (
                "recall",
                "precision",
                np.stack([drawn.recall, drawn.precision], 1),
            )
        cases = tuple(_pair_case(sample, records[sample.key]["scores"], self.wrong) for sample in samples)
        how = "score of a caption less that of its hard mismatch, the worst of a picture; disputed: both are close"
        return Scored(tuple(measures), cases=cases, ranked=how, curves=curves)


_SAID = {
    "roc_auc": "area under the ROC curve, ties count half",
    "average_precision": "area under precision and recall",
    "accuracy": "share of pairs on the right side of 0.5",
    "recommended_threshold": "the threshold with the fewest wrong pairs; both kinds of error cost the same",
    "false_match_rate": "mismatches taken for matches at the recommended threshold",
    "missed_match_rate": "matches lost at the recommended threshold",
    "ece": "expected calibration error, 15 bins (Guo et al. 2017)",
    "temperature": "what divides the logits for the least log loss, fitted on these pairs",
    "ece_calibrated": "calibration error with that temperature, on the same pairs",
}


def mismatches(samples: Sequence[Sample], seed: int) -> dict[str, list[tuple[str, str]]]:
    """For every caption of every sample a wrong one drawn at random, and a hard one: of 200 drawn, the one that shares
    the most words. A function of the seed and the samples; no caption of the picture itself, in whatever spelling.

    Raises UsageError where no other picture has another caption.
    """
    texts = [(sample.key, text) for sample in samples for text in sample.captions]
    tokens = tokenize(text for _, text in texts)
    bags = [set(line.split()) for line in tokens]
    found: dict[str, list[tuple[str, str]]] = {}
    place = 0
    for sample in samples:
        own = set(tokens[place : place + len(sample.captions)])
        chosen: list[tuple[str, str]] = []
        for index in range(len(sample.captions)):
            random = generator("evaluate", "mismatch", seed, sample.key, index)
            order = random.permutation(len(texts)) if len(texts) <= 4 * _POOL else None
            drawn = random.integers(len(texts), size=2 * _POOL) if order is None else order
            others = [j for j in drawn.tolist() if texts[j][0] != sample.key and tokens[j] not in own][:_POOL]
            if not others:
                raise UsageError("matching: needs captions that differ from picture to picture")
            bag = bags[place + index]
            hard = max(others, key=lambda j: len(bag & bags[j]) / max(1, len(bag | bags[j])))
            chosen.append((texts[others[0]][1], texts[hard][1]))
        found[sample.key] = chosen
        place += len(sample.captions)
    return found


class Features:
    """k nearest neighbours and a linear probe over the embeddings of labelled pictures."""

    def __init__(self, options: Options) -> None:
        self.seed = options.seed
        self.settings: dict[str, Any] = {}

    def wants(self, sample: Sample) -> bool:
        """It needs a label."""
        return sample.label is not None

    def phases(self) -> Sequence[Phase]:
        """One."""
        return [Phase("embedding pictures", "image", self._embed, "embed")]

    def _embed(self, work: Work, samples: list[Sample]) -> Events:
        def verb(_: list[Sample], pictures: list[Pixels]) -> list[dict[str, Any]]:
            return [{"image": packed(vector)} for vector in work.model().embed_images(pictures)]

        return work.pictures(samples, verb)

    def score(self, samples: Sequence[Sample], records: Records) -> Scored:
        """Both in five folds: each picture is judged by what was learned on the four others."""
        keys = [sample.key for sample in samples]
        labels, true = np.unique([sample.label or "" for sample in samples], return_inverse=True)
        if len(labels) < 2 or len(samples) < _FOLDS:
            raise UsageError(f"features: needs at least two labels and {_FOLDS} pictures")
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
            Measure(name, f"{words}; {how}", "pictures", keys, found == true)
            for (name, words), found in zip(said.items(), (near, probe), strict=True)
        )
        right = (near == true).astype(np.float64) + (probe == true)
        cases = tuple(
            Case(
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
        return Scored(measures, cases=cases, ranked="right or wrong by both; disputed: one of them is right")


def _pair_scores(pairs: Floats) -> dict[str, float]:
    scores = matching_scores(pairs.T.ravel(), np.repeat([1, 0], len(pairs)))
    return {name: value for name, value in scores.items() if not name.endswith("_at_recommended")}


def _class_case(sample: Sample, top: list[tuple[str, float]]) -> Case:
    mine = dict(top).get(sample.label or "", 0.0)
    wrong = max((p for label, p in top if label != sample.label), default=0.0)
    close = -(top[0][1] - top[1][1]) if len(top) > 1 else -1.0
    lines = (("label", sample.label or ""), ("model", ", ".join(f"{label} {p:.2f}" for label, p in top[:3])))
    return Case(sample.key, mine - wrong, close, lines)


def _pair_case(sample: Sample, scores: list[list[float]], wrong: Mapping[str, list[tuple[str, str]]]) -> Case:
    """By the caption that its hard mismatch comes nearest to, or beats."""
    margins = [own - hard for own, _, hard in scores]
    worst = int(np.argmin(margins))
    lines = (
        (f"own {scores[worst][0]:.3f}", sample.captions[worst]),
        (f"hard {scores[worst][2]:.3f}", wrong[sample.key][worst][1]),
    )
    return Case(sample.key, margins[worst], -abs(margins[worst]), lines)


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
