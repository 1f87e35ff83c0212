"""The null of an index: background texts scored against it as queries are, and kept with the index."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sightloop.data.atomic import write_json
from sightloop.errors import UsageError
from sightloop.search.calibration import (
    JUDGED,
    MAX_BACKGROUND,
    MIN_BACKGROUND,
    POOL,
    Background,
    NullScores,
    best_mean,
    choose_background,
    log_odds,
    verdict,
)
from sightloop.search.encoder import ModelEncoder
from sightloop.search.filters import Filter, ids_filter
from sightloop.search.hits import Hits
from sightloop.search.query import Query
from sightloop.search.rows import vectors_of
from sightloop.search.score_weights import ITC_SIGNALS, ITM_SIGNALS, ScoreKind, learn_scores
from sightloop.search.store import Found, Store, VectorSpace
from sightloop.types import Floats, Floats32, JsonDict

_COLUMNS = ("id", "root", "path", "sha256", "start", "end")
_PREFIX = "calibration-"
_IDS_AT_ONCE = 500
_CAPTION_IMAGES = 20_000  # rows whose captions are looked at


@dataclass(frozen=True, slots=True, eq=False)
class NoMatch:
    """Scores of queries and of background texts against the rows of an index that a filter takes.

    Args:
        store: of the index.
        space: whose vectors are compared.
        where: the filter.
        embed_texts: texts to unit vectors `[n, d]`.
        match: ITM probabilities `[n]` of a text with the images of rows, NaN for those that are gone; None for the
            ITC score.
        judge: name of the model that `match` asks.
        background: file with background texts, one a line; None for the captions of the index.
        notify: called with the number of texts scored and of all of them, while the null is made.
    """

    store: Store
    space: VectorSpace
    where: Filter
    embed_texts: Callable[[Sequence[str]], Floats32]
    match: Callable[[str, Sequence[JsonDict]], Floats32] | None = None
    judge: str = ""
    background: Path | None = None
    notify: Callable[[int, int], None] | None = None

    @classmethod
    def of_query(
        cls,
        query: Query,
        store: Store,
        space: VectorSpace,
        encoder: ModelEncoder,
        notify: Callable[[int, int], None] | None = None,
    ) -> NoMatch:
        """The calibration of a query's cut: by ITM if the query is re-ranked, else by ITC."""

        def match(text: str, rows: Sequence[JsonDict]) -> Floats32:
            return encoder.match(text, rows)[1]

        file = None if query.background is None else Path(query.background)
        judge = (encoder.judge or encoder.model).name
        chosen = (match, judge) if query.rerank else (None, "")
        return cls(store, space, query.where, encoder.model.embed_texts, *chosen, file, notify)

    @property
    def kind(self) -> ScoreKind:
        """ "itm" if a model judges, else "itc"."""
        return "itc" if self.match is None else "itm"

    def background_texts(self) -> list[tuple[str, str]]:
        """Background texts: (id of its own image or "", text).

        Raises:
            UsageError: the file cannot be read.
        """
        count = MAX_BACKGROUND[self.kind]
        if self.background is None:
            ids: list[str] = []
            captions: list[list[str]] = []
            for part in self.store.scan(["id", "captions"], self.where, _CAPTION_IMAGES):
                ids += part["id"].to_pylist()
                captions += [texts or [] for texts in part["captions"].to_pylist()]
            order = sorted(range(len(ids)), key=ids.__getitem__)  # a scan has no stated order
            chosen = choose_background([captions[i] for i in order], count)
            return [(ids[order[image]], text) for image, text in chosen]
        texts = list(dict.fromkeys(line for line in _lines(self.background) if line))
        picked = np.random.default_rng(0).permutation(len(texts))[:count]
        return [("", texts[i]) for i in sorted(picked.tolist())]

    def calibrated(self) -> tuple[NullScores, Background] | None:
        """The null and its texts, kept from before or made now; None if there are fewer than 500 texts."""
        count = self.store.count()
        kept = self._read()
        if kept is not None and not kept[0].is_stale(count):
            return kept
        texts = self.background_texts()
        if len(texts) < MIN_BACKGROUND:
            return None
        vectors = self.embed_texts([text for _, text in texts])
        # As they are kept, so that a later process scores alike.
        bank = Background(_rounded(vectors), [own for own, _ in texts], _rounded(self._sample(texts)))
        absent: list[Floats] = []
        present: list[Floats] = []
        for number, (own, text) in enumerate(texts):
            pool = self._pool(bank.vectors[number], bool(own))
            absent.append(self._signals(pool, text, bank.vectors[number], bank, own, masked=bool(own)))
            if own:
                present.append(self._signals(pool, text, bank.vectors[number], bank, own))
            if self.notify is not None:
                self.notify(number + 1, len(texts))
        without = np.stack(absent)
        with_own = np.stack(present) if present else without[:0]
        weights, null_scores, own_scores = learn_scores(self.kind, without, with_own)
        source = "captions of the index" if self.background is None else str(self.background)
        null_scores.sort()
        own_scores.sort()
        null = NullScores(self.kind, null_scores, own_scores, count, source, self._key(), weights)
        self._write(null, bank)
        return null, bank

    def signals(self, text: str, vector: Floats32, bank: Background) -> Floats:
        """Signals of a query `[s]`, see `calibration`.

        Args:
            text: the query.
            vector: its unit vector `[d]`.
            bank: background texts.
        """
        return self._signals(self._pool(vector, False), text, vector, bank)

    def _sample(self, texts: Sequence[tuple[str, str]]) -> Floats32:
        """Vectors `[n, q, d]` of the images that background texts describe, else of some rows."""
        owners = sorted({own for own, _ in texts if own})
        column = self.space.column
        parts: list[Floats32] = []
        for low in range(0, len(owners), _IDS_AT_ONCE):
            chosen = ids_filter(owners[low : low + _IDS_AT_ONCE])
            parts += [
                vectors_of(part[column], self.space.width) for part in self.store.scan([column], chosen)
            ]
        if not owners:
            scan = self.store.scan([column], self.where, MAX_BACKGROUND["itc"])
            parts += [vectors_of(part[column], self.space.width) for part in scan]
        images = np.concatenate([np.zeros((0, self.space.width), np.float32), *parts])
        return _unit(images[images.any(axis=1)].reshape(-1, self.space.queries, self.space.dim))

    def _pool(self, vector: Floats32, one_more: bool) -> Found:
        """The rows that ITC ranks first, with their vectors."""
        wanted = (POOL if self.match is None else JUDGED) + one_more
        return self.store.nearest(self.space, vector, wanted, self.where, [*_COLUMNS, self.space.column])

    def _signals(
        self,
        pool: Found,
        text: str,
        vector: Floats32,
        bank: Background,
        own: str = "",
        *,
        masked: bool = False,
    ) -> Floats:
        """Signals of a text over a pool, `[s]`; NaN where there is no image.

        Args:
            pool: of `_pool`.
            text: the text.
            vector: its unit vector `[d]`.
            bank: background texts.
            own: id of the text's own image, if it is a background text.
            masked: leave its own image out.
        """
        table, wanted = pool.rows, POOL if self.match is None else JUDGED
        ids: list[str] = table["id"].to_pylist()
        rows = [i for i, identity in enumerate(ids) if not masked or identity != own][:wanted]
        if not rows:
            return np.full(len(ITC_SIGNALS if self.match is None else ITM_SIGNALS), np.nan)
        images = vectors_of(table[self.space.column], self.space.width)[rows]
        images = _unit(images.reshape(len(rows), -1, self.space.dim))  # [k, q, d]
        cosines = (images @ vector).max(axis=1)
        by_vectors = bank.signals(vector, cosines, images, [ids[i] for i in rows], own)
        if self.match is None:
            return by_vectors
        records = table.select(list(_COLUMNS)).to_pylist()
        odds = log_odds(self.match(text, [records[i] for i in rows]))
        return np.array([best_mean(odds[None])[0], odds.max(), *by_vectors])

    def _key(self) -> str:
        """What the scores depend on beside the rows."""
        digest = (
            ""
            if self.background is None
            else hashlib.sha256("\n".join(_lines(self.background)).encode()).hexdigest()
        )
        parts = [self.space.model, self.space.fingerprint, self.kind, self.judge, repr(self.where), digest]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _file(self) -> Path | None:
        """Where the null is kept; None for a store that is no folder."""
        folder = Path(self.store.name)
        return folder / f"{_PREFIX}{self._key()}.json" if folder.is_dir() else None

    def _read(self) -> tuple[NullScores, Background] | None:
        file = self._file()
        if file is None or not file.is_file():
            return None
        try:
            value = json.loads(file.read_text("utf-8"))
            null, owners = NullScores.from_json(value), list(map(str, value["owners"]))
            vectors = np.frombuffer(base64.b64decode(value["vectors"]), np.float16).astype(np.float32)
            images = np.frombuffer(base64.b64decode(value["sample"]), np.float16).astype(np.float32)
            images = images.reshape(-1, self.space.queries, self.space.dim)
            bank = Background(vectors.reshape(len(owners), self.space.dim), owners, images)
        except (OSError, ValueError, KeyError, TypeError):  # of another version, or damaged: it is made anew
            return None
        return (null, bank) if null.key == self._key() else None

    def _write(self, null: NullScores, bank: Background) -> None:
        if (file := self._file()) is None:
            return
        vectors, sample = (
            base64.b64encode(array.astype(np.float16).tobytes()).decode()
            for array in (bank.vectors, bank.images)
        )
        texts = {"owners": list(bank.owners), "vectors": vectors, "sample": sample}
        with suppress(OSError):  # a folder that may only be read: it is made again next time
            write_json(null.as_json() | texts, file)


def apply_cut(hits: Hits, text: str, vector: Floats32, cut: float, no_match: NoMatch) -> Hits:
    """Hits of a text, or none where the promised rate of false finds refuses them; the note says which and why.

    Without enough background texts the hits stay, and the note says that nothing is promised.
    """
    calibrated = no_match.calibrated()
    if calibrated is None:
        count = len(no_match.background_texts())
        return replace(
            hits,
            note=f"no cut: a promise needs {MIN_BACKGROUND} background texts, and there are {count:,} "
            f"({'captions of the index' if no_match.background is None else no_match.background}); "
            "name a file with --background",
        )
    null, bank = calibrated
    is_found, words = verdict(null, null.score(no_match.signals(text, vector, bank)), cut)
    return replace(hits, hits=hits.hits if is_found else (), note=words)


def _rounded(vectors: Floats32) -> Floats32:
    return vectors.astype(np.float16).astype(np.float32)


def _unit(images: Floats32) -> Floats32:
    """Vectors `[..., d]` of unit length again, which rounding took away."""
    return images / np.maximum(np.linalg.norm(images, axis=-1, keepdims=True), 1e-12)


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: the background texts cannot be read as UTF-8 text: {error}") from error
