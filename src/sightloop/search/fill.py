"""Vectors of a further model for the images that an index holds already."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from sightloop.errors import ImageError
from sightloop.search.build import BuildOptions, Indexed, unit_rows
from sightloop.search.rows import vector_column
from sightloop.search.sources import read_entry
from sightloop.search.store import Store, VectorSpace
from sightloop.types import Done, Event, Failed, Floats32, Pixels

if TYPE_CHECKING:
    from sightloop.inference.model import Model


def fill_space(
    store: Store, space: VectorSpace, model: Model, options: BuildOptions
) -> Iterator[Event[Indexed]]:
    """Embeds every image that lacks the space's vector, and yields an event for each after its commit.

    A run that was killed goes on: what has its vector is left out.
    """
    lacking = _lacking(store, space)
    sources: list[str | bytes] = []
    rows: list[tuple[str, str]] = []  # id and name
    for start in range(0, len(lacking), options.commit_images):
        sources.clear()
        rows.clear()
        for identity, root, path in lacking[start : start + options.commit_images]:
            name = os.path.join(root, path)
            try:
                sources.append(read_entry(root, path))
                rows.append((identity, name))
            except ImageError as error:
                yield Failed(name, error.reason)
        yield from _embed(store, space, model, options, sources, rows)


def _lacking(store: Store, space: VectorSpace) -> list[tuple[str, str, str]]:
    """Id, root and path of the rows without a vector."""
    lacking: list[tuple[str, str, str]] = []
    for part in store.scan(["id", "root", "path", space.column]):
        chosen = part.filter(part[space.column].is_null())
        lacking += zip(*(chosen[name].to_pylist() for name in ("id", "root", "path")), strict=True)
    return sorted(lacking)


def _embed(
    store: Store,
    space: VectorSpace,
    model: Model,
    options: BuildOptions,
    sources: list[str | bytes],
    rows: list[tuple[str, str]],
) -> Iterator[Event[Indexed]]:
    batch: list[Pixels] = []
    names: list[tuple[str, str]] = []
    vectors: list[Floats32] = []
    done: list[tuple[str, str]] = []
    committed = time.monotonic()
    stream = model.read(sources, workers=options.workers, isolate=options.isolate, limits=options.limits)
    for number, (row, pixels) in enumerate(zip(rows, stream, strict=True), 1):
        if isinstance(pixels, ImageError):
            yield Failed(row[1], pixels.reason)
        else:
            batch.append(pixels)
            names.append(row)
        is_last = number == len(rows)
        if batch and (len(batch) >= model.sizer.size or is_last):
            vectors.append(unit_rows(model.embed_images(batch), space, [name for _, name in names]))
            done += names
            batch, names = [], []
        if done and not batch and (is_last or time.monotonic() - committed > options.commit_seconds):
            store.update(_table(done, np.concatenate(vectors), space))
            yield from (Done(name, Indexed(identity, "updated")) for identity, name in done)
            vectors, done, committed = [], [], time.monotonic()


def _table(rows: list[tuple[str, str]], vectors: Floats32, space: VectorSpace) -> Any:
    import pyarrow as pa

    ids = pa.array([identity for identity, _ in rows], pa.string())
    return pa.table([ids, vector_column(vectors, space.dtype)], names=["id", space.column])
