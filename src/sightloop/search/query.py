"""Queries: text, image, blend, keywords and negative text to hits of a store."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, Protocol, TypedDict

import numpy as np

from sightloop.errors import UsageError
from sightloop.search.calibration import check_cut
from sightloop.search.exact import top_rows
from sightloop.search.filters import Filter, ids_filter
from sightloop.search.hits import Hit, Hits
from sightloop.search.keywords import WORDS_WEIGHT, fuse_ranks, matched_words
from sightloop.search.rows import PUBLIC_COLUMNS, unit_vectors, vectors_of
from sightloop.search.store import Found, Store, VectorSpace
from sightloop.types import Floats32, ImageSource, JsonDict

_WITHOUT = re.compile(r"^(.*?)[,;]?\s+(?:without|with no|but no)\s+(?:any\s+)?(.+)$", re.IGNORECASE)
_POOL = 500  # candidates of fusion and of negative text
_TRIES = 4
_SAMPLE_ROWS = 4_096  # of the index, for its mean and for the spread of cosines


class SearchOptions(TypedDict, total=False):
    """Options of `Index.search`, as fields of `search.query.Query`."""

    image: ImageSource | None
    like: str | None
    vector: Any
    blend: float
    words: str | None
    without: str | None
    rerank: int
    cut: float | None
    background: str | PathLike[str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What is searched for. At least one of text, image, like, vector and words is given.

    Args:
        text: words for the model: "a red car"; "a beach without people" is a text with its negative.
        image: an image to find others like it.
        like: id of an image of the index, which is no hit itself.
        vector: a vector `[d]` of the index's space.
        blend: share of the text where there is an image too, 0 to 1.
        words: words that captions and other texts of an image hold.
        without: negative text: what is not wanted.
        where: filter of the rows.
        k: greatest number of hits.
        rerank: number of best hits that ITM scores again; 0 for none.
        cut: promised rate of false finds, 0 to 1: nothing is found where it would be exceeded; None for no cut.
        background: file of background texts for the cut, one a line; None for the captions of the index.
    """

    text: str | None = None
    image: ImageSource | None = None
    like: str | None = None
    vector: Any = None
    blend: float = 0.5
    words: str | None = None
    without: str | None = None
    where: Filter = field(default_factory=Filter)
    k: int = 20
    rerank: int = 0
    cut: float | None = None
    background: str | PathLike[str] | None = None

    def checked(self) -> Query:
        """The query with its negative taken out of its text. Raises UsageError for what cannot be searched."""
        if self.k < 1:
            raise UsageError(f"k={self.k}: must be at least 1")
        if self.rerank < 0:
            raise UsageError(f"rerank={self.rerank}: must be at least 0")
        if not 0 <= self.blend <= 1:
            raise UsageError(f"blend={self.blend:g}: must be from 0 (the image alone) to 1 (the text alone)")
        for name in ("text", "words", "without"):
            if (value := getattr(self, name)) is not None and not value.strip():
                raise UsageError(f"{name}: is empty; give words")
        targets = [name for name in ("image", "like", "vector") if getattr(self, name) is not None]
        if len(targets) > 1:
            raise UsageError(f"{' and '.join(targets)} exclude each other; give one")
        if not targets and self.text is None and self.words is None:
            raise UsageError("nothing to search for: give a text, an image, an id (like), a vector or words")
        if self.without is not None and not targets and self.text is None:
            raise UsageError("without: needs a text or an image beside it")
        if self.cut is not None:
            check_cut(self.cut)
            if self.text is None or targets:
                raise UsageError("cut: needs a text alone; images have no background texts to compare with")
        if self.rerank and self.text is None:
            raise UsageError("rerank: needs a text, which ITM compares with the images")
        if self.text is not None and self.without is None and (result := _WITHOUT.match(self.text)):
            return replace(self, text=result[1], without=result[2])
        return self

    def __str__(self) -> str:
        parts = [self.text or ""]
        parts += [f"like {self.like}"] if self.like else []
        parts += ["like an image"] if self.image is not None else []
        parts += ["like a vector"] if self.vector is not None else []
        parts += [f"words {self.words!r}"] if self.words else []
        parts += [f"without {self.without}"] if self.without else []
        return ", ".join(part for part in parts if part)


class Encoder(Protocol):
    """What turns queries into vectors of a space, and scores images again."""

    def embed_text(self, text: str) -> Floats32:
        """float32 `[d]`, unit length."""
        ...

    def embed_image(self, image: ImageSource) -> Floats32:
        """float32 `[q, d]`, unit length."""
        ...

    def match(self, text: str, rows: Sequence[JsonDict]) -> tuple[Floats32, Floats32]:
        """ITM logits of "match" and ITM probabilities of the images of rows, float32 `[n]` each."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class SpaceSample:
    """Vectors of some rows of an index.

    Args:
        vectors: float32 `[n, d]`.
        rows: rows of the index when it was taken.
    """

    vectors: Floats32
    rows: int

    @classmethod
    def take(cls, store: Store, space: VectorSpace) -> SpaceSample:
        """A sample of a store."""
        parts = [
            vectors_of(part[space.column], space.width)
            for part in store.scan([space.column], limit=_SAMPLE_ROWS)
        ]
        vectors = np.concatenate(parts) if parts else np.zeros((0, space.width), np.float32)
        return cls(vectors.reshape(-1, space.dim), store.count())

    def mean(self) -> Floats32:
        """float32 `[d]`."""
        return self.vectors.mean(axis=0) if len(self.vectors) else np.zeros(self.vectors.shape[1], np.float32)

    def standardized(self, query: Floats32, cosines: Floats32) -> Floats32:
        """Cosines with a query, less their mean over the sample and divided by their spread there."""
        own = self.vectors @ query
        return (cosines - own.mean()) / max(1e-6, float(own.std())) if len(own) > 1 else cosines


@dataclass(frozen=True, slots=True, eq=False)
class Searcher:
    """Search of one vector space of a store.

    Args:
        store: of the index.
        space: whose vectors are compared.
        encoder: makes the encoder when a query needs it.
        sample: of the space.
        text_mean: mean of the vectors of texts `[d]`, taken off before a text is blended with an image.
    """

    store: Store
    space: VectorSpace
    encoder: Callable[[], Encoder]
    sample: Callable[[], SpaceSample]
    text_mean: Callable[[], Floats32]

    def search(self, query: Query) -> Hits:
        """Hits of a checked query, all of one commit."""
        vector = self._vector(query)
        version, hits = self.store.version(), self._found(query, vector)
        for _ in range(_TRIES):
            if self.store.version() == version:
                break
            version, hits = self.store.version(), self._found(query, vector)
        total = self.store.count()
        return Hits(str(query), tuple(self._reranked(query, hits)[: query.k]), total)

    def _vector(self, query: Query) -> Floats32 | None:
        """The vector that is compared with those of the images: unit length `[d]`; None for words alone."""
        image: Floats32 | None = None
        if query.vector is not None:
            image = unit_vectors(query.vector, self.space.dim, "query")[0]
        elif query.image is not None:
            image = self.encoder().embed_image(query.image)[0]
        elif query.like is not None:
            image = self._vector_of(query.like)
        if query.text is None:
            return image
        text = self.encoder().embed_text(query.text)
        if image is None:
            return text
        text, image = text - self.text_mean(), image - self.sample().mean()
        blended = query.blend * text / np.linalg.norm(text) + (1 - query.blend) * image / np.linalg.norm(
            image
        )
        return unit_vectors(blended, self.space.dim, "blend")[0]

    def _vector_of(self, identity: str) -> Floats32:
        for part in self.store.scan([self.space.column], ids_filter([identity])):
            if part.num_rows:
                return unit_vectors(
                    vectors_of(part[self.space.column], self.space.width)[:, : self.space.dim],
                    self.space.dim,
                    "like",
                )[0]
        raise UsageError(
            f"like={identity!r}: the index has no such id; `sightloop search --json` prints the ids"
        )

    def _found(self, query: Query, vector: Floats32 | None) -> list[Hit]:
        wanted = max(query.k, query.rerank) + (query.like is not None)
        pool = max(wanted, _POOL) if query.words or query.without else wanted
        columns = [*PUBLIC_COLUMNS, "words", *([self.space.column] if vector is not None else [])]
        rows: dict[str, JsonDict] = {}
        cosines: dict[str, float] = {}
        rankings: list[list[str]] = []
        by_words: list[str] = []
        word_scores: list[float] = []
        if vector is not None:
            result = self.store.nearest(self.space, vector, pool, query.where, columns)
            rankings.append(self._take(result, vector, rows, cosines))
        if query.words:
            result = self.store.by_words(query.words, pool, query.where, columns)
            by_words, word_scores = self._take(result, vector, rows, cosines), result.scores.tolist()
            rankings.append(by_words)
        if query.without is not None and vector is not None:
            rankings[0] = self._without(query.without, rankings[0], cosines, rows, vector)
        if len(rankings) > 1:
            scores: Mapping[str, float] = fuse_ranks(rankings, (1.0, WORDS_WEIGHT))
        elif vector is None:
            scores = dict(zip(by_words, word_scores, strict=True))
        else:
            scores = {name: cosines[name] for name in rankings[0]}
        places = {name: rank for rank, name in enumerate(by_words, 1)}
        hits: list[Hit] = []
        for name, score in scores.items():
            if name == query.like:
                continue
            matched = tuple(matched_words(query.words, rows[name]["words"])) if query.words else ()
            row = {column: rows[name][column] for column in PUBLIC_COLUMNS}
            hits.append(
                Hit(len(hits) + 1, name, score, cosines.get(name), None, places.get(name), matched, row)
            )
        return hits

    def _take(
        self, result: Found, vector: Floats32 | None, rows: dict[str, JsonDict], cosines: dict[str, float]
    ) -> list[str]:
        """Notes the rows of a result with their cosines; their ids in order."""
        table = result.rows
        if not table.num_rows:
            return []
        if vector is not None:
            vectors = vectors_of(table[self.space.column], self.space.width).reshape(-1, self.space.dim)
            lengths = np.maximum(np.linalg.norm(vectors, axis=1), 1e-12)
            values = (vectors @ vector / lengths).reshape(table.num_rows, -1).max(axis=1)
            table = table.drop_columns([self.space.column])
            cosines |= dict(zip(table["id"].to_pylist(), values.tolist(), strict=True))
        names: list[str] = table["id"].to_pylist()
        rows |= dict(zip(names, table.to_pylist(), strict=True))
        return names

    def _without(
        self,
        text: str,
        ranking: list[str],
        cosines: Mapping[str, float],
        rows: Mapping[str, JsonDict],
        vector: Floats32,
    ) -> list[str]:
        """A ranking by how far the text stands out less how far the negative text does, both in units of spread."""
        negative = self.encoder().embed_text(text)
        result = self.store.nearest(self.space, negative, len(ranking), ids_filter(ranking), ["id"])
        against = dict(zip(result.rows["id"].to_pylist(), result.scores.tolist(), strict=True))
        own = np.array([cosines[name] for name in ranking], np.float32)
        other = np.array([against.get(name, 0.0) for name in ranking], np.float32)
        sample = self.sample()
        scores = sample.standardized(vector, own) - sample.standardized(negative, other)
        return [ranking[i] for i in top_rows(scores.astype(np.float32), len(ranking))]

    def _reranked(self, query: Query, hits: list[Hit]) -> list[Hit]:
        """The best hits in the order of ITM logit + ITC cosine, as the evaluation of the BLIP code does."""
        if not query.rerank or query.text is None or not hits:
            return hits
        best, rest = hits[: query.rerank], hits[query.rerank :]
        logits, probabilities = self.encoder().match(query.text, [hit.row for hit in best])
        scores = [float(logit) + (hit.itc or 0.0) for logit, hit in zip(logits, best, strict=True)]
        order = sorted(range(len(best)), key=lambda i: (-scores[i], i))
        changed = [replace(best[i], score=scores[i], itm=float(probabilities[i])) for i in order]
        return [replace(hit, rank=rank) for rank, hit in enumerate([*changed, *rest], 1)]
