"""Vectors of a further model, and texts that a model reads (OCR), for images that an index holds already."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

from sightloop.errors import ImageError
from sightloop.search.build import Action, BuildOptions, Indexed
from sightloop.search.embedding_server import unit_rows
from sightloop.search.rows import Table, table_of, vector_column
from sightloop.search.sources import read_row
from sightloop.search.store import Store, VectorSpace
from sightloop.types import Done, Event, Failed, JsonDict, Pixels

if TYPE_CHECKING:
    from sightloop.inference.model import Model

_Compute: TypeAlias = Callable[[Sequence[JsonDict], list[Pixels]], Table]  # of rows with their pixels
_TEXTS = ("texts", "words", "grams")


def fill_space(
    store: Store, space: VectorSpace, model: Model, options: BuildOptions
) -> Iterator[Event[Indexed]]:
    """Embeds every image that lacks the space's vector, and yields an event for each after its commit.

    A run that was killed goes on: what has its vector is left out.
    """

    def embed(rows: Sequence[JsonDict], batch: list[Pixels]) -> Table:
        import pyarrow as pa

        vectors = unit_rows(model.embed_images(batch), space, [_name(row) for row in rows])
        ids = pa.array([row["id"] for row in rows], pa.string())
        column = vector_column(vectors, space.dtype)
        return pa.table([ids, column], names=["id", space.column])

    return _fill(store, _lacking(store, space.column), model, options, embed, "updated")


def fill_texts(store: Store, reader: Model, options: BuildOptions) -> Iterator[Event[Indexed]]:
    """Reads the texts in every image that was not read yet, and yields an event for each after its commit.

    A run that was killed goes on: an image in which there is no text has an empty list of them.

    Args:
        store: of the index; the caller holds its lock.
        reader: model that reads text in images.
        options: of reading and committing.
    """

    def read(rows: Sequence[JsonDict], batch: list[Pixels]) -> Table:
        texts = [
            list(dict.fromkeys(label for region in regions if (label := region.label.strip())))
            for regions in reader.read_text(batch)
        ]
        full = [
            {name: row[name] for name in ("id", "captions", "labels")} | {"texts": own}
            for row, own in zip(rows, texts, strict=True)
        ]
        return table_of(full).select(["id", *_TEXTS])

    return _fill(store, _lacking(store, "texts"), reader, options, read, "read")


def _lacking(store: Store, column: str) -> list[JsonDict]:
    """The rows of files, scenes, and images in archives, that have nothing in a column."""
    lacking: list[JsonDict] = []
    for part in store.scan(["id", "root", "path", "start", "end", "captions", "labels", column]):
        lacking += part.filter(part[column].is_null()).drop_columns([column]).to_pylist()
    return sorted((row for row in lacking if row["path"]), key=lambda row: str(row["id"]))


def _fill(
    store: Store,
    lacking: Sequence[JsonDict],
    model: Model,
    options: BuildOptions,
    compute: _Compute,
    action: Action,
) -> Iterator[Event[Indexed]]:
    """Events of rows whose columns are computed from their images, batch by batch."""
    for start in range(0, len(lacking), options.commit_images):
        sources: list[str | bytes] = []
        rows: list[JsonDict] = []
        for row in lacking[start : start + options.commit_images]:
            try:
                sources.append(read_row(row))
                rows.append(row)
            except ImageError as error:
                yield Failed(_name(row), error.reason)
        yield from _compute_all(store, model, options, compute, sources, rows, action)


def _compute_all(
    store: Store,
    model: Model,
    options: BuildOptions,
    compute: _Compute,
    sources: list[str | bytes],
    rows: list[JsonDict],
    action: Action,
) -> Iterator[Event[Indexed]]:
    import pyarrow as pa

    batch: list[Pixels] = []
    own: list[JsonDict] = []
    tables: list[Table] = []
    done: list[JsonDict] = []
    committed = time.monotonic()
    stream = model.read(sources, workers=options.workers, isolate=options.isolate, limits=options.limits)
    for number, (row, pixels) in enumerate(zip(rows, stream, strict=True), 1):
        if isinstance(pixels, ImageError):
            yield Failed(_name(row), pixels.reason)
        else:
            batch.append(pixels)
            own.append(row)
        is_last = number == len(rows)
        if batch and (len(batch) >= model.sizer.size or is_last):
            tables.append(compute(own, batch))
            done += own
            batch, own = [], []
        if done and not batch and (is_last or time.monotonic() - committed > options.commit_seconds):
            store.update(pa.concat_tables(tables))
            yield from (Done(_name(row), Indexed(row["id"], action)) for row in done)
            tables, done, committed = [], [], time.monotonic()


def _name(row: JsonDict) -> str:
    return os.path.join(row["root"], row["path"])
