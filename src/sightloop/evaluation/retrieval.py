"""Retrieval between images and captions: ITC alone, and with the top k re-ranked by ITM."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from sightloop.errors import SightloopError, UsageError
from sightloop.evaluation.predictions import Records, floats, integers, packed
from sightloop.evaluation.results import ExampleCase, MetricTable, TaskScores
from sightloop.evaluation.task import EvalOptions, Events, TaskContext, TaskPhase, row
from sightloop.inference.rerank import ImageCache, cosines, pairs_to_match, top_k
from sightloop.metrics import RetrievalScores, score_retrieval
from sightloop.protocols import Embedder, require
from sightloop.types import Done, Encoded, Failed, Floats32, Integers, JsonDict, Pixels, Sample

_SAMPLES_AT_ONCE = 256  # whose texts are embedded together, those of like length in one pass
_KS = (1, 5, 10)
# Samples with their encoded images, B of them -> the record of each.
MatchBatch: TypeAlias = Callable[[Sequence[Sample], Encoded], Sequence[JsonDict]]
_ITC_ALONE = " For ITC alone, without re-ranking: rerank=[], --rerank 0."


class RetrievalTask:
    """Every image against every caption. Equal captions are embedded and scored once; each counts in the recall."""

    def __init__(self, options: EvalOptions) -> None:
        self.options = options
        self.max_k = max(options.rerank, default=0)
        self.settings: JsonDict = {"judged": self.max_k}
        self._images = ImageCache()

    def wants(self, sample: Sample) -> bool:
        """Whether the sample has captions."""
        return bool(sample.captions)

    def phases(self) -> Sequence[TaskPhase]:
        """Images, texts, then the pairs that ITC ranks highest."""
        self._images = ImageCache()
        phases = [
            TaskPhase("embedding images", "image", self.embed_images, "embed"),
            TaskPhase("embedding texts", "texts", self._embed_texts, "embed"),
            TaskPhase("matching pairs", "judged", self._match, "rank", _ITC_ALONE),
        ]
        return phases[: 2 + bool(self.max_k)]

    def _embed_texts(self, work: TaskContext, samples: list[Sample]) -> Events:
        model = work.model
        known: dict[str, Floats32] = {}
        for sample in work.readable():
            if "texts" in (record := work.records.get(sample.key, {})):
                rows = floats(record["texts"]).reshape(len(sample.captions), -1)
                known |= dict(zip(sample.captions, rows, strict=True))
        for low in range(0, len(samples), _SAMPLES_AT_ONCE):
            some = samples[low : low + _SAMPLES_AT_ONCE]
            new = list(dict.fromkeys(t for sample in some for t in sample.captions if t not in known))
            if new:
                known |= dict(zip(new, model.embed_texts(new), strict=True))
            for sample in some:
                yield Done(sample.key, {"texts": packed(np.stack([known[text] for text in sample.captions]))})

    def embed_images(self, work: TaskContext, samples: list[Sample]) -> Events:
        """Events of samples with the vectors of their images."""
        from sightloop.tasks.embed import embed_images  # imports torch, which scoring does not need

        model = work.model

        def predict(batch: list[Sample], images: list[Pixels]) -> list[JsonDict]:
            image = model.encode(images)
            for row_index, sample in enumerate(batch):
                self.keep(sample.key, image, row_index)
            embedded = embed_images(require(model.network, Embedder), image).cpu().numpy()
            return [{"image": packed(vector)} for vector in embedded]

        return work.map_images(samples, predict)

    def keep(self, key: str, image: Encoded, number: int) -> None:
        """Keeps one of B encoded images, tokens `[B, N, D]`, for the pairs, where they are matched."""
        if self.max_k:
            self._images.put(key, image, number)

    def _match(self, work: TaskContext, samples: list[Sample]) -> Events:
        model = work.model
        space = _Space.of(work.readable(), work.records)
        chosen = pairs_to_match(*space.candidates(space.similarity(), self.max_k))
        rows_of = {key: space.number[rows] for key, rows in zip(space.keys, chosen, strict=True)}
        texts = model.tokenize(space.distinct)

        def match(batch: Sequence[Sample], image: Encoded) -> list[JsonDict]:
            rows = [np.unique(rows_of[sample.key]) for sample in batch]
            logits = model.match_scores(image, texts, rows)
            return [
                {"judged": packed(own), "logits": packed(values[:, 1])}
                for own, values in zip(rows, logits, strict=True)
            ]

        not_cached: list[Sample] = []
        for sample in samples:
            if (image := self._images.pop(sample.key)) is None:
                not_cached.append(sample)
            else:
                yield Done(sample.key, match([sample], image)[0])
        for event in self.match_again(work, not_cached, match):
            if isinstance(event, Failed):  # it is among the candidates already
                raise SightloopError(f"{event.name}: could be read before, and now cannot: {event.reason}")
            yield event

    def match_again(self, work: TaskContext, samples: list[Sample], match: MatchBatch) -> Events:
        """Events of the images that were not kept: encoded again, then matched."""
        return work.map_images(samples, lambda batch, images: match(batch, work.model.encode(images)))

    def score(self, samples: Sequence[Sample], records: Records) -> TaskScores:
        """Recall and median rank both ways, for ITC and for each k."""
        space = _Space.of(samples, records)
        similarity = space.similarity()
        rankings = {"": (score_retrieval(similarity, space.owner, _KS), "ITC: cosine of the embeddings")}
        for k in sorted(set(self.options.rerank)):
            if k > self.max_k:
                raise UsageError(f"rerank={k}: the predictions have the top {self.max_k} only")
            texts_of, images_of = space.candidates(similarity, k)
            pairs = space.rerank_scores(records)
            by_image = (texts_of, pairs(np.arange(len(space.keys))[:, None], texts_of, similarity))
            by_text = (images_of, pairs(images_of, np.arange(len(space.owner))[:, None], similarity))
            scores = score_retrieval(similarity, space.owner, _KS, "expected", by_image, by_text)
            words = f"the {k} best by ITC re-ranked by ITM logit + ITC cosine, as the BLIP code does"
            rankings[f", k={k}"] = (scores, words)
        metrics = [
            metric
            for name, (scores, words) in rankings.items()
            for metric in _metrics(name, scores, words, space)
        ]
        how = "ITC cosine of the best own caption minus that of the best other; disputed: both are close"
        return TaskScores(tuple(metrics), cases=_cases(samples, similarity, space), ranked=how)


@dataclass(frozen=True, slots=True)
class _Space:
    """Embedding space of the samples: n images, m texts, d distinct texts.

    Args:
        keys: of the images, n.
        owner: image of each text, int64 `[m]`.
        number: index of each text in `distinct`, int64 `[m]`.
        distinct: every text once, d.
        rows: names of the texts, m.
        images: embeddings `[n, P]`, or `[n, Q, P]` for several vectors an image.
        texts: embeddings of the distinct texts `[d, P]`.
    """

    keys: list[str]
    owner: Integers
    number: Integers
    distinct: list[str]
    rows: list[str]
    images: Floats32
    texts: Floats32

    @classmethod
    def of(cls, samples: Sequence[Sample], records: Records) -> _Space:
        index_of: dict[str, int] = {}
        vectors: list[Floats32] = []
        number: list[int] = []
        for sample in samples:
            embedded = floats(records[sample.key]["texts"]).reshape(len(sample.captions), -1)
            for text, vector in zip(sample.captions, embedded, strict=True):
                if text not in index_of:
                    index_of[text] = len(vectors)
                    vectors.append(vector)
                number.append(index_of[text])
        images = np.stack([floats(records[sample.key]["image"]) for sample in samples])
        width = len(vectors[0])
        if images.shape[1] > width:  # several vectors an image
            images = images.reshape(len(images), -1, width)
        return cls(
            [sample.key for sample in samples],
            np.repeat(np.arange(len(samples)), [len(sample.captions) for sample in samples]),
            np.array(number, np.int64),
            list(index_of),
            [row(sample.key, i) for sample in samples for i in range(len(sample.captions))],
            images,
            np.stack(vectors),
        )

    def similarity(self) -> Floats32:
        """ITC cosines `[n, m]`; equal texts have equal columns, to the bit."""
        table = cosines(self.images, self.texts)
        return table if len(self.distinct) == len(self.number) else np.take(table, self.number, axis=1)

    def candidates(self, similarity: Floats32, k: int) -> tuple[Integers, Integers]:
        """The k best texts of each image `[n, k]`, and the k best images of each text `[m, k]`."""
        _, first = np.unique(self.number, return_index=True)
        columns = similarity.T if len(first) == len(self.number) else similarity.T[first]
        return top_k(similarity, k), top_k(columns, k)[self.number]

    def rerank_scores(self, records: Records) -> Callable[[Integers, Integers, Floats32], Floats32]:
        """Function of images `[...]`, texts `[...]` and the ITC cosines `[n, m]` -> ITM logit + ITC cosine `[...]`."""
        texts = [integers(records[key]["judged"]) for key in self.keys]
        logits = np.concatenate([floats(records[key]["logits"]) for key in self.keys])
        # A pair (image i, distinct text j) is the number i * d + j; those that were scored, ascending.
        count = len(self.distinct)
        scored = np.concatenate([own + i * count for i, own in enumerate(texts)])

        def scores(image: Integers, text: Integers, similarity: Floats32) -> Floats32:
            pair = image * count + self.number[text]
            index = np.searchsorted(scored, pair).clip(max=len(scored) - 1)
            if (scored[index] != pair).any():
                raise UsageError(
                    "the predictions lack pairs that their embeddings rank highest: remove the file"
                )
            return logits[index] + similarity[image, text]

        return scores


def _metrics(name: str, scores: RetrievalScores, words: str, space: _Space) -> Iterator[MetricTable]:
    ties = "equal scores count as the mean over their orders"
    size = f"{len(space.keys):,} images x {len(space.owner):,} texts; {ties}"
    for way, unit, rows in (
        ("image-to-text", "images", space.keys),
        ("text-to-image", "texts", space.rows),
    ):
        for k in _KS:
            yield MetricTable(
                f"{way} recall@{k}{name}",
                f"share of {unit} with a correct match among the first {k}; {words}; {size}",
                unit,
                rows,
                scores.each[f"{way} recall@{k}"],
            )
        yield MetricTable(
            f"{way} median rank{name}",
            f"median rank of the best correct match; {words}; {size}",
            unit,
            rows,
            scores.each[f"{way} rank"],
            of_rows=lambda table: float(np.median(table)),
        )


def _cases(samples: Sequence[Sample], similarity: Floats32, space: _Space) -> tuple[ExampleCase, ...]:
    """Quality is by how much the best caption of an image beats the best of the others; disputed are near ties."""
    starts = np.concatenate([[0], np.cumsum(np.bincount(space.owner, minlength=len(samples)))])
    texts = [text for sample in samples for text in sample.captions]
    cases: list[ExampleCase] = []
    for i, sample in enumerate(samples):
        others = similarity[i].copy()
        others[starts[i] : starts[i + 1]] = -np.inf
        best = int(others.argmax())
        own = starts[i] + int(similarity[i, starts[i] : starts[i + 1]].argmax())
        if not np.isfinite(others[best]):
            continue
        margin = float(similarity[i, own] - others[best])
        lines = (
            (f"own {similarity[i, own]:.3f}", texts[own]),
            (f"other {others[best]:.3f}", texts[best]),
        )
        cases.append(ExampleCase(sample.key, margin, -abs(margin), lines))
    return tuple(cases)
