"""An index over one's own images: built, updated, searched and read by `open_index` and `Index`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from os import PathLike, fspath
from typing import TYPE_CHECKING, Unpack

import numpy as np

from sightloop.data.copies.duplicates import KINDS, DuplicateKind
from sightloop.errors import UnsupportedError, UsageError
from sightloop.reports import html
from sightloop.reports.notebook import NotebookProgress
from sightloop.search.build import Builder, BuildOptions, Indexed
from sightloop.search.duplicates import DuplicateReport, check_kinds, duplicates_in_index, hash_columns
from sightloop.search.embedding_server import Spread
from sightloop.search.fill import fill_space, fill_texts
from sightloop.search.filters import parse_filters
from sightloop.search.hits import Hits
from sightloop.search.no_match import NoMatch, apply_cut
from sightloop.search.opening import create_store, is_index, open_store
from sightloop.search.outside import OutsideRows, add_outside
from sightloop.search.prune import find_gone
from sightloop.search.query import Query, Searcher, SearchOptions, SpaceSample
from sightloop.search.rows import PUBLIC_COLUMNS, Table, vectors_of
from sightloop.search.sources import list_entries, list_videos
from sightloop.search.stats import IndexStats
from sightloop.search.store import IndexInfo, Store, VectorDtype, VectorSpace
from sightloop.search.videos import index_videos
from sightloop.types import Done, Event, Floats32, JsonDict

if TYPE_CHECKING:
    from sightloop.inference.model import Model
    from sightloop.search.encoder import MemoryCache, ModelEncoder

_BACKGROUND = (
    "a photo", "a photo of a person", "a photo of an animal", "a photo of food", "a landscape", "a city street",
    "a room", "a close-up of an object", "a vehicle", "people doing something", "a document", "a drawing",
)  # fmt: skip


class Index:
    """An index. Use `open_index`, or `Index.create` for a new one.

    Reading never waits for a writer and sees each commit at once. One process writes at a time; a second one is
    refused with a UsageError.

    Args:
        store: that holds the rows.
        model: of the first vector space; loaded by its name when it is needed.
        judge: model with an ITM head, for re-ranking; the model itself if it has one.
        memory_bytes: budget of the cache of image memories.
    """

    def __init__(
        self,
        store: Store,
        model: Model | None = None,
        judge: Model | None = None,
        memory_bytes: int = 1 << 30,
    ) -> None:
        self.store = store
        self._models: dict[str, Model] = {}
        self._judge = judge
        self._memory_bytes = memory_bytes
        self._memories: MemoryCache | None = None
        self._samples: dict[str, SpaceSample] = {}
        self._text_means: dict[str, Floats32] = {}
        self.on_calibration: Callable[[int, int], None] | None = None
        if model is not None:
            self.use_model(model)

    @classmethod
    def create(
        cls,
        path: str | PathLike[str],
        *,
        model: Model | None = None,
        dim: int | None = None,
        dtype: VectorDtype = "float16",
        name: str = "",
    ) -> Index:
        """A new index.

        Args:
            path: a folder that does not exist or is empty, or qdrant://host:port/collection.
            model: whose vectors it will hold.
            dim: width of vectors from outside, in place of a model.
            dtype: of vectors in the store.
            name: of the model that made the vectors from outside, for messages.

        Raises:
            UsageError: the place is taken, or neither a model nor a width is given.
        """
        if dtype not in ("float16", "float32"):
            raise UsageError(f"dtype={dtype!r}: must be 'float16' or 'float32'")
        if (model is None) == (dim is None):
            raise UsageError("give a model, or dim= for vectors from outside")
        if model is not None:
            from sightloop.search.models import space_of

            space = space_of(model, "vector", dtype)
        elif dim is not None and dim >= 1:
            space = VectorSpace("vector", name, "", dim, dtype=dtype)
        else:
            raise UsageError(f"dim={dim}: must be at least 1")
        index = cls(create_store(fspath(path), IndexInfo((space,))))
        if model is not None:
            index._models[space.column] = model
        return index

    # What it is.

    @property
    def info(self) -> IndexInfo:
        """Its vector spaces and notes."""
        return self.store.info()

    def __len__(self) -> int:
        return self.store.count()

    def __repr__(self) -> str:
        models = ", ".join(space.model or f"vectors of {space.dim}" for space in self.info.spaces)
        return f"Index({self.store.name!r}: {len(self):,} images, {models})"

    def _repr_html_(self) -> str:
        stats = self.stats()
        models = ", ".join(space.model or f"vectors of {space.dim}" for space in stats.models)
        rows = [("index", stats.name), ("images", f"{stats.images:,}"), ("model", models)]
        return html.table(("", ""), rows, text_columns=(0, 1))

    def stats(self) -> IndexStats:
        """Numbers of images, by folder, and the models."""
        return IndexStats.of(self.store)

    def rows(
        self, columns: Sequence[str] = PUBLIC_COLUMNS, where: Sequence[str] | str = ()
    ) -> list[JsonDict]:
        """Records of all images that the filter takes, vectors aside."""
        return self.to_arrow(columns, where).to_pylist()

    def to_arrow(
        self,
        columns: Sequence[str] = PUBLIC_COLUMNS,
        where: Sequence[str] | str = (),
        *,
        vectors: bool = False,
    ) -> Table:
        """A table of all images, ordered by id; with `vectors`, also the columns of all spaces."""
        import pyarrow as pa

        names = [*columns, *(space.column for space in self.info.spaces if vectors)]
        names = list(dict.fromkeys(["id", *names]))
        parts = list(self.store.scan(names, parse_filters(where, "where")))
        if not parts:
            return pa.table({name: [] for name in names})
        return pa.concat_tables(parts).select(names).sort_by("id")

    def vectors(self, model: str | None = None) -> tuple[list[str], Floats32]:
        """Ids, and the vectors float32 `[n, d]` of a model (`[n, q, d]` for several an image), ordered by id."""
        space = self.info.space(model)
        table = self.to_arrow(["id", space.column])
        vectors = vectors_of(table[space.column], space.width)
        return table["id"].to_pylist(), vectors if space.queries == 1 else vectors.reshape(
            -1, space.queries, space.dim
        )

    def to_numpy(self, model: str | None = None) -> Floats32:
        """The vectors of `vectors`, in the order of ids."""
        return self.vectors(model)[1]

    # Writing.

    def add(
        self,
        images: str | PathLike[str] | Iterable[str | PathLike[str]],
        *,
        prune: bool = False,
        reader: Model | None = None,
        options: BuildOptions | None = None,
    ) -> Counter[str]:
        """Indexes what is new or changed in folders, files, globs and datasets; videos by scene.

        Args:
            images: one source or several.
            prune: also remove rows below these sources whose files are gone.
            reader: model that reads the texts in all images of the index that were not read yet, for keywords (OCR).
            options: of reading and committing.

        Returns:
            How many were added, changed, moved, updated, read, skipped, failed and removed.

        Raises:
            UsageError: another process writes.
        """
        counts: Counter[str] = Counter()
        sources = [images] if isinstance(images, str | PathLike) else list(images)
        progress = NotebookProgress("indexing", "images")
        with closing(self.build(sources, prune=prune, reader=reader, options=options)) as events:
            for event in events:
                value = getattr(event, "value", None)
                counts[value.action if isinstance(value, Indexed) else type(event).__name__.lower()] += 1
                progress.add()
        progress.end()
        return counts

    def build(
        self,
        sources: Iterable[str | PathLike[str]],
        *,
        prune: bool = False,
        reader: Model | None = None,
        options: BuildOptions | None = None,
    ) -> Generator[Event[Indexed]]:
        """`add` as a stream: an event for each image, after the commit that holds it."""
        names = [fspath(source) for source in sources]
        with self.store.writing():
            models = [(space, self._model(space)) for space in self.info.spaces]
            options = options or BuildOptions()
            builder = Builder(self.store, models, options, hash_columns)
            yield from builder.run(list_entries(names))
            yield from index_videos(self.store, models, list_videos(names), options)
            for space, model in models:
                if space.column in self.info.notes.get("unfilled", ()):
                    yield from fill_space(self.store, space, model, options)
                    self._note_filled(space)
            if reader is not None:
                yield from fill_texts(self.store, reader, options)
            if prune:
                gone = find_gone(self.store, names, builder.archived)
                self.store.delete([identity for identity, _ in gone])
                for identity, name in gone:
                    yield Done(name, Indexed(identity, "removed"))
            self.store.maintain()

    def add_vectors(
        self,
        vectors: object,
        rows: OutsideRows | None = None,
        *,
        ids: Sequence[str] | None = None,
    ) -> list[str]:
        """Adds vectors that were made elsewhere.

        Args:
            vectors: `[n, d]`, of any length but zero; stored with unit length.
            rows: records of n images with fields of `search.rows.PUBLIC_COLUMNS`, a mapping each; or a mapping of
                columns, or a pyarrow.Table. None are needed.
            ids: of the rows, in place of `id` in the records; random where neither is given.

        Returns:
            The ids.

        Raises:
            UsageError: another shape, NaN, zero, ids that are taken or repeated; the message names the first.
        """
        with self.store.writing():
            names = add_outside(self.store, self.info.space(), vectors, rows, ids)
            self.store.maintain()
        return names

    def delete(self, ids: Sequence[str] | None = None, *, where: Sequence[str] | str = ()) -> int:
        """Removes rows by id, or all that a filter takes; no file is touched. Returns how many there were."""
        chosen = parse_filters(where, "where")
        if (ids is None) == (not chosen):
            raise UsageError("give ids, or a filter (where=)")
        with self.store.writing():
            if ids is None:
                ids = [name for part in self.store.scan(["id"], chosen) for name in part["id"].to_pylist()]
            before = self.store.count()
            self.store.delete(list(ids))
            return before - self.store.count()

    def prune(self) -> int:
        """Removes rows whose files are gone, of folders that are there. Returns how many."""
        with self.store.writing():
            gone = find_gone(self.store)
            self.store.delete([identity for identity, _ in gone])
            return len(gone)

    # Searching.

    def search(
        self,
        text: str | None = None,
        k: int = 20,
        *,
        where: Sequence[str] | str = (),
        **options: Unpack[SearchOptions],
    ) -> Hits:
        """Images that a query describes, best first.

        Args:
            text: words for the model; "a beach without people" has a negative text.
            k: greatest number of hits.
            where: filters, such as "width>1000" or ["label=cat", "time>=2024-05"].
            options: image, like, vector, blend, words, without, rerank, cut and background, as in `search.query.Query`.

        Raises:
            UsageError: nothing to search for, or a wrong option.
        """
        return self.find(Query(text=text, k=k, where=parse_filters(where, "where"), **options))

    def search_many(
        self, texts: Sequence[str], k: int = 20, *, where: Sequence[str] | str = ()
    ) -> list[Hits]:
        """`search` of several texts."""
        return [self.search(text, k, where=where) for text in texts]

    def find(self, query: Query, model: str | None = None) -> Hits:
        """Hits of a query in the first vector space, or in that of a model."""
        space, query = self.info.space(model), query.checked()
        hits = self.searcher(space).search(query)
        if query.cut is None or query.text is None:
            return hits
        vector = self.encoder(space).embed_text(query.text)
        return apply_cut(hits, query.text, vector, query.cut, self._no_match(query, space))

    def duplicates(
        self,
        kinds: Sequence[DuplicateKind] = KINDS,
        *,
        where: Sequence[str] | str = (),
        model: str | None = None,
    ) -> DuplicateReport:
        """Identical images, copies and look-alikes in the index, with the evidence of each pair.

        Args:
            kinds: to search: "identical", "copy", "look-alike".
            where: filters of the rows.
            model: whose vectors tell look-alikes; by default the first.
        """
        return duplicates_in_index(
            self.store, self.info.space(model), parse_filters(where, "where"), check_kinds(kinds)
        )

    def searcher(self, space: VectorSpace) -> Searcher:
        """The search of one vector space."""
        return Searcher(
            self.store,
            space,
            lambda: self.encoder(space),
            lambda: self._sample(space),
            lambda: self._text_mean(space),
        )

    def encoder(self, space: VectorSpace) -> ModelEncoder:
        """The model of a space with its judge: the one in use, or that which the index remembers."""
        from sightloop.search.encoder import MemoryCache, ModelEncoder

        if self._memories is None:
            self._memories = MemoryCache(self._memory_bytes)
        if self._judge is None and (judge := self.info.notes.get("judge")):
            self.use_judge(_loaded(judge))
        return ModelEncoder(self._model(space), self._judge, self._memories)

    def use_model(self, model: Model) -> None:
        """Uses a loaded model for the space that is its own. Raises UsageError if there is none."""
        from sightloop.search.models import check_model

        spaces = self.info.spaces
        space = next((space for space in spaces if space.model == model.name), spaces[0])
        check_model(model, space, self.store.name)
        self._models[space.column] = model

    def use_judge(self, judge: Model) -> None:
        """Uses a loaded model with an ITM head for re-ranking. Raises UnsupportedError if it has none."""
        if "match" not in judge.capabilities:
            raise UnsupportedError(f"{judge.name} cannot match; re-ranking needs an ITM head")
        self._judge = judge

    def add_model(self, model: Model, dtype: VectorDtype = "float16") -> VectorSpace:
        """Adds a column for a second model's vectors, which `add` then fills. UsageError if it is there already."""
        from sightloop.search.models import space_of

        info = self.info
        if any(space.model == model.name for space in info.spaces):
            raise UsageError(f"{self.store.name}: has the vectors of {model.name} already")
        space = space_of(model, f"vector_{len(info.spaces) + 1}", dtype)
        with self.store.writing():
            unfilled = [*info.notes.get("unfilled", ()), space.column]
            notes = {**info.notes, "unfilled": unfilled}
            self.store.set_info(replace(info, spaces=(*info.spaces, space), notes=notes))
        self._models[space.column] = model
        return space

    def remember(self, **notes: object) -> None:
        """Keeps facts with the index, as JSON values."""
        with self.store.writing():
            info = self.info
            self.store.set_info(replace(info, notes={**info.notes, **notes}))

    # Below: nothing public.

    def _note_filled(self, space: VectorSpace) -> None:
        info = self.info
        unfilled = [column for column in info.notes["unfilled"] if column != space.column]
        self.store.set_info(replace(info, notes={**info.notes, "unfilled": unfilled}))

    def _model(self, space: VectorSpace) -> Model:
        model = self._models.get(space.column)
        if model is None:
            if not space.probe:
                raise UsageError(
                    f"{self.store.name}: its vectors came from outside; search by vector or by words"
                )
            from sightloop.inference.load import load
            from sightloop.search.models import check_model

            model = load(space.model)
            check_model(model, space, self.store.name)
            self._models[space.column] = model
        return model

    def _no_match(self, query: Query, space: VectorSpace) -> NoMatch:
        """The calibration of a query's cut."""
        progress = NotebookProgress("calibrating the cut", "texts")

        def count(done: int, total: int) -> None:
            del done
            progress.add(total=total)

        return NoMatch.of_query(query, self.store, space, self.encoder(space), self.on_calibration or count)

    def _sample(self, space: VectorSpace) -> SpaceSample:
        kept = self._samples.get(space.column)
        rows = self.store.count()
        if kept is None or abs(rows - kept.rows) > 0.1 * kept.rows:
            kept = self._samples[space.column] = SpaceSample.take(self.store, space)
        return kept

    def _text_mean(self, space: VectorSpace) -> Floats32:
        if space.column not in self._text_means:
            encoder = self.encoder(space)
            vectors = [encoder.embed_text(text) for text in _BACKGROUND]
            self._text_means[space.column] = np.mean(vectors, axis=0)
        return self._text_means[space.column]


def open_index(
    path: str | PathLike[str],
    *,
    model: Model | str | None = None,
    judge: Model | str | None = None,
    memory_bytes: int = 1 << 30,
) -> Index:
    """Opens an index for reading and writing.

    Args:
        path: its folder, or qdrant://host:port/collection.
        model: loaded already, or its name; by default loaded by the name that the index remembers when it is needed.
        judge: model with an ITM head, for re-ranking; by default the model itself.
        memory_bytes: budget of the cache of image memories, which re-ranking uses.

    Raises:
        UsageError: there is no index, or the model is not that of its vectors.
    """
    index = Index(open_store(fspath(path)), memory_bytes=memory_bytes)
    if model is not None:
        index.use_model(_loaded(model))
    if judge is not None:
        index.use_judge(_loaded(judge))
    return index


def _loaded(model: Model | str) -> Model:
    if not isinstance(model, str):
        return model
    from sightloop.inference.load import load

    return load(model)


__all__ = [
    "BuildOptions",
    "Hits",
    "Index",
    "IndexStats",
    "Indexed",
    "Query",
    "Spread",
    "is_index",
    "open_index",
    "parse_filters",
]
