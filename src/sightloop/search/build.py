"""Building an index: what is new, changed or moved among the entries of its sources, embedded and committed in batches.

An image is told by its path, size and time; where these differ, by its content. Every image is reported only after the
commit that holds it, so a killed run has lost nothing that it reported, and the next run goes on behind it.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import tee
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

import numpy as np

from sightloop.errors import ImageError
from sightloop.search.crew import Crew, open_crew
from sightloop.search.embedding_server import (
    Description,
    EmbeddingJob,
    NamedImage,
    Prepare,
    Spread,
    image_fields,
    unit_rows,
)
from sightloop.search.filters import ids_filter
from sightloop.search.rows import Table, merge_columns, table_of, vector_column
from sightloop.search.sources import Entry
from sightloop.search.store import Store, VectorSpace
from sightloop.types import Done, Event, Failed, Floats32, JsonDict, Limits, Pixels, Skipped

if TYPE_CHECKING:
    from sightloop.inference.model import Model

Action: TypeAlias = Literal["added", "changed", "moved", "updated", "removed", "read"]
_COMMIT_IMAGES = 1_024
_COMMIT_SECONDS = 5.0
_FEW_IMAGES, _FEW_SECONDS = 64, 2.0  # that are worth a commit of their own
_WAITING_EVENTS = 1_024
_TEXT_FIELDS = ("captions", "labels", "regions", "extra")


# Id, root, path, size, mtime, sha256 and stamp of a row.
_Columns: TypeAlias = tuple[str, str, str, int, int, str, int]


class Indexed(NamedTuple):
    """What was done for an image: "added", "changed" (new content), "moved" (found by content), "updated" (captions and
    the like; vectors of a further model), "read" (the texts in it) or "removed"."""

    id: str
    action: Action


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How images are read and committed.

    Args:
        workers: decoders.
        isolate: decode in child processes, which a hostile file may take down without harm to this one.
        limits: bounds on each image.
        commit_images: greatest number of images in a batch, which is committed whole.
        commit_seconds: seconds after which a smaller batch is committed; after 2 seconds one of 64 images is.
        keyframes_only: look at keyframes of videos alone, many times faster.
        warn: called with what of a damaged video is left out, and when a worker has died; by default `warnings.warn`.
        spread: workers that decode and embed the images that are new or changed; None for this process.
    """

    workers: int = 2
    isolate: bool = True
    limits: Limits = field(default_factory=Limits)
    commit_images: int = _COMMIT_IMAGES
    commit_seconds: float = _COMMIT_SECONDS
    keyframes_only: bool = False
    warn: Callable[[str], None] | None = None
    spread: Spread | None = None


@dataclass(frozen=True, slots=True)
class _Known:
    """A row that is in the index."""

    id: str
    root: str
    path: str
    size: int
    mtime: int
    sha256: str
    stamp: int


@dataclass(frozen=True, slots=True)
class _Work:
    """An image that has to be embedded: its entry, bytes and id."""

    entry: Entry
    data: bytes
    sha256: str
    id: str
    action: Action


@dataclass(frozen=True, slots=True)
class _Described:
    """An image with what its row holds of it."""

    work: _Work
    description: Description


@dataclass(frozen=True, slots=True)
class _Update:
    """New fields of a row whose image is known, and the event of that."""

    row: JsonDict
    event: Done[Indexed]


# What an entry needs, or what has been decided for it.
_Decision: TypeAlias = _Work | _Update | Skipped | Failed


class KnownRows:
    """What an index holds, by name, by content and by id. Rows become objects when they are asked for.

    Args:
        store: of the index.
    """

    def __init__(self, store: Store) -> None:
        self._by_name: dict[str, _Known | _Columns] = {}
        self._by_content: dict[str, list[str]] | None = None  # names; made when it is asked for
        self._ids: set[str] = set()
        columns = ("id", "root", "path", "size", "mtime", "sha256", "stamp")
        for part in store.scan((*columns, "start")):
            # Much faster than `to_pylist`, which makes a Python object of each Arrow scalar first. Numbers that are not
            # known become -1, because NumPy would make floats of a column with nulls.
            self._ids.update(part["id"].to_numpy().tolist())
            part = part.filter(part["start"].is_null())  # `search.videos` knows of the scenes of videos
            numbers = {name: part[name].fill_null(-1) for name in ("size", "mtime", "stamp")}
            values = [numbers.get(name, part[name]).to_numpy().tolist() for name in columns]
            names = map(os.path.join, (root or "" for root in values[1]), (path or "" for path in values[2]))
            # Vectors from outside may have no path.
            self._by_name |= {
                name: row for name, row in zip(names, zip(*values, strict=True), strict=True) if row[2]
            }

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[_Known]:
        return iter([row for name in list(self._by_name) if (row := self._row(name)) is not None])

    def named(self, entry: Entry) -> _Known | None:
        """The row of an entry."""
        return self._row(entry.name)

    def moved(self, sha256: str) -> _Known | None:
        """A row with this content whose file is gone."""
        if self._by_content is None:
            self._by_content = {}
            for name, row in self._by_name.items():
                content = row.sha256 if isinstance(row, _Known) else row[5]
                self._by_content.setdefault(content, []).append(name)
        for name in self._by_content.get(sha256, ()):
            row = self._row(name)
            if row is not None and not is_there(row.root, row.path):
                return row
        return None

    def put(self, row: _Known, before: _Known | None = None) -> None:
        """Takes in a row, in place of an earlier state."""
        name = os.path.join(row.root, row.path)
        if before is not None:
            old = os.path.join(before.root, before.path)
            self._by_name.pop(old, None)
            if self._by_content is not None:
                self._by_content[before.sha256].remove(old)
        self._by_name[name] = row
        if self._by_content is not None:
            self._by_content.setdefault(row.sha256, []).append(name)
        self._ids.add(row.id)

    def _row(self, name: str) -> _Known | None:
        row = self._by_name.get(name)
        if isinstance(row, tuple):
            row = self._by_name[name] = _Known(*row)
        return row

    def new_id(self, path: str, sha256: str) -> str:
        """16 hex digits of a path and a content; the same in every run that finds the same rows before."""
        number, digits = 0, ""
        while not digits or digits in self._ids:
            text = f"{path}\0{sha256}\0{number or ''}"
            digits = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
            number += 1
        return digits


def is_there(root: str, path: str) -> bool:
    """Whether the file of a row, or the dataset that holds it, exists."""
    return os.path.lexists(os.path.join(root, path)) or (os.path.isfile(root) and root != path)


class Builder:
    """One run over entries.

    Args:
        store: of the index; the caller holds its lock.
        models: with their vector spaces.
        options: of reading and committing.
        prepare: what else a row gets, from the bytes of its image: a hook for hashes.
    """

    def __init__(
        self,
        store: Store,
        models: Sequence[tuple[VectorSpace, Model]],
        options: BuildOptions,
        prepare: Prepare | None = None,
    ) -> None:
        self._store, self._models, self._options = store, models, options
        self._prepare = prepare
        self._known = KnownRows(store)
        self.archived: dict[str, set[str]] = {}  # by dataset of encoded images, the keys that it holds
        self._updates: list[JsonDict] = []
        self._rows: dict[Action, list[JsonDict]] = {"added": [], "changed": []}
        self._vectors: dict[Action, list[Sequence[Floats32]]] = {"added": [], "changed": []}
        self._waiting: list[Event[Indexed]] = []
        self._last_commit = time.monotonic()

    def run(self, entries: Iterable[Entry | Failed]) -> Generator[Event[Indexed]]:
        """Indexes entries and yields an event for each, in order, those of a batch after its commit."""
        crew = self._crew()
        items = self._embed_here(entries) if crew is None else self._embed_by(crew, entries)
        with closing(items):
            for item in items:
                self._add(item)
                if self._is_due():
                    yield from self._commit()
            yield from self._commit()

    def _crew(self) -> Crew | None:
        """Workers that embed; None for this process."""
        options = self._options
        if options.spread is None or not self._models:
            return None
        spaces = tuple((space, model.name) for space, model in self._models)
        job = EmbeddingJob(
            self._store.name, spaces, options.workers, options.isolate, options.limits, self._prepare
        )
        return open_crew(options.spread, job, options.warn)

    def _add(self, item: _Described | _Update | Skipped | Failed) -> None:
        """Takes in what belongs into the next commit."""
        if isinstance(item, _Update):
            self._updates.append(item.row)
            self._waiting.append(item.event)
        elif isinstance(item, _Described):
            work, (fields, vectors) = item.work, item.description
            row = row_of(work.entry, work.id, len(work.data), work.sha256)
            self._rows[work.action].append(row | fields)
            self._vectors[work.action].append(vectors)
            self._waiting.append(Done(work.entry.name, Indexed(work.id, work.action)))
        else:
            self._waiting.append(item)

    def _embed_here(
        self, entries: Iterable[Entry | Failed]
    ) -> Generator[_Described | _Update | Skipped | Failed]:
        """Decisions in order, with images embedded by this process."""
        size = self._models[0][1].sizer if self._models else None
        gathered: list[tuple[_Work, list[Pixels]] | _Update | Skipped | Failed] = []
        images = 0
        with closing(self._read(entries)) as with_pixels:
            for item in with_pixels:
                gathered.append(item)
                images += isinstance(item, tuple)
                if not images or images >= (size.size if size else 8):
                    yield from self._embedded(gathered)
                    gathered, images = [], 0
        yield from self._embedded(gathered)

    def _embed_by(
        self, crew: Crew, entries: Iterable[Entry | Failed]
    ) -> Generator[_Described | _Update | Skipped | Failed]:
        """Decisions in order, with images embedded by workers."""
        order: deque[_Decision] = deque()

        def batches() -> Iterator[list[NamedImage]]:
            batch: list[NamedImage] = []
            size, events = 0, 0
            for entry in entries:
                item = self._decide(entry)
                order.append(item)
                if isinstance(item, _Work):
                    batch.append(NamedImage(item.entry.name, item.data))
                    size += len(item.data)
                else:
                    events += 1
                if len(batch) >= crew.images or size >= crew.bytes or events >= _WAITING_EVENTS:
                    yield batch
                    batch, size, events = [], 0, 0
            yield batch

        with closing(crew.describe(batches())) as answered:
            for answers in answered:
                for answer in answers:
                    while not isinstance(item := order.popleft(), _Work):
                        yield item
                    yield (
                        Failed(item.entry.name, answer.reason)
                        if isinstance(answer, ImageError)
                        else _Described(item, answer)
                    )
                while order and not isinstance(item := order[0], _Work):
                    order.popleft()
                    yield item

    def _is_due(self) -> bool:
        """Whether to commit: often enough that a kill costs seconds, seldom enough that commits cost nothing."""
        changes = sum(map(len, self._rows.values())) + len(self._updates)
        if not changes:
            return len(self._waiting) >= _WAITING_EVENTS
        seconds, options = time.monotonic() - self._last_commit, self._options
        few = changes >= _FEW_IMAGES and seconds > _FEW_SECONDS
        return few or changes >= options.commit_images or seconds > options.commit_seconds

    def _read(
        self, entries: Iterable[Entry | Failed]
    ) -> Generator[tuple[_Work, list[Pixels]] | _Update | Skipped | Failed]:
        """What has to be embedded, with its pixels for each model; everything else as it is decided."""
        waiting: deque[_Decision] = deque()

        def sources() -> Iterator[bytes]:
            for entry in entries:
                item = self._decide(entry)
                waiting.append(item)
                if isinstance(item, _Work):
                    yield item.data
                elif len(waiting) > 65_536:  # events alone: let them out
                    return

        while True:
            feeds = tee(sources(), len(self._models))
            streams = [
                model.read(
                    feed,
                    workers=self._options.workers,
                    isolate=self._options.isolate,
                    limits=self._options.limits,
                )
                for (_, model), feed in zip(self._models, feeds, strict=True)
            ]
            ended = True
            try:
                for read in zip(*streams, strict=True):
                    while not isinstance(item := waiting.popleft(), _Work):
                        yield item
                    yield _pixels_or_failure(item, read)
                while waiting:
                    ended = False
                    item = waiting.popleft()
                    assert not isinstance(item, _Work)
                    yield item
            finally:
                for stream in streams:
                    if isinstance(stream, Generator):
                        stream.close()
            if ended:
                return

    def _decide(self, entry: Entry | Failed) -> _Decision:
        """What an entry needs."""
        if isinstance(entry, Failed):
            return entry
        if entry.size is None:
            self.archived.setdefault(entry.root, set()).add(entry.path)
        row = self._known.named(entry)
        if row is not None and row.mtime == entry.mtime and entry.size in (None, row.size):
            if row.stamp == entry.stamp:
                return Skipped(entry.name, "it is in the index")
            return self._update(entry, row, row.size, row.sha256, "updated")
        try:
            data = entry.data()
        except ImageError as error:
            return Failed(entry.name, error.reason)
        sha256 = hashlib.sha256(data).hexdigest()
        if row is not None and row.sha256 == sha256:
            return self._update(entry, row, len(data), sha256, "updated")
        if row is None and (row := self._known.moved(sha256)) is not None:
            return self._update(entry, row, len(data), sha256, "moved")
        if row is not None:
            return self._note(_Work(entry, data, sha256, row.id, "changed"), row)
        return self._note(_Work(entry, data, sha256, self._known.new_id(entry.path, sha256), "added"), None)

    def _note(self, work: _Work, before: _Known | None) -> _Work:
        entry = work.entry
        row = _Known(work.id, entry.root, entry.path, len(work.data), entry.mtime, work.sha256, entry.stamp)
        self._known.put(row, before)
        return work

    def _update(self, entry: Entry, row: _Known, size: int, sha256: str, action: Action) -> _Update:
        self._known.put(_Known(row.id, entry.root, entry.path, size, entry.mtime, sha256, entry.stamp), row)
        return _Update(row_of(entry, row.id, size, sha256), Done(entry.name, Indexed(row.id, action)))

    def _embedded(
        self, gathered: Sequence[tuple[_Work, list[Pixels]] | _Update | Skipped | Failed]
    ) -> Iterator[_Described | _Update | Skipped | Failed]:
        """Images embedded as one batch, and what is between them."""
        batch = [item for item in gathered if isinstance(item, tuple)]
        names = [work.entry.name for work, _ in batch]
        columns = [
            unit_rows(model.embed_images([pixels[i] for _, pixels in batch]), space, names)
            for i, (space, model) in enumerate(self._models)
            if batch
        ]
        number = 0
        for item in gathered:
            if not isinstance(item, tuple):
                yield item
                continue
            work, pixels = item
            fields = image_fields(work.data, pixels[0].size, self._prepare)
            yield _Described(work, Description(fields, [column[number] for column in columns]))
            number += 1

    def _commit(self) -> Iterator[Event[Indexed]]:
        """Writes what is noted, then lets the events of it go."""
        writers: dict[Action, Callable[[Table], None]] = {
            "added": self._store.add,
            "changed": self._store.upsert,
        }
        for action, write in writers.items():
            if rows := self._rows[action]:
                table = table_of(rows)
                columns = {
                    space.column: vector_column(np.stack([v[i] for v in self._vectors[action]]), space.dtype)
                    for i, (space, _) in enumerate(self._models)
                }
                write(merge_columns(table, columns))
                self._rows[action], self._vectors[action] = [], []
        if self._updates:
            last = {
                str(row["id"]): row for row in self._updates
            }  # a row that was updated twice: its last state
            full = table_of(with_texts(self._store, last))
            self._store.update(full.select(UPDATED))
            self._updates = []
        self._last_commit = time.monotonic()
        events, self._waiting = self._waiting, []
        yield from events


def with_texts(store: Store, rows: dict[str, JsonDict]) -> list[JsonDict]:
    """Rows by their ids, with the texts that were read in their images, which are searched with the captions."""
    for part in store.scan(["id", "texts"], ids_filter(rows)):
        for known in part.to_pylist():
            rows[known["id"]]["texts"] = known["texts"]
    return list(rows.values())


UPDATED: Final = (
    *("id", "root", "path", "size", "mtime", "sha256", "stamp", *_TEXT_FIELDS),
    *("caption_keys", "label_keys", "extra_keys", "words", "grams", "path_key"),
)
"""Columns of an entry that change without its pixels."""


def row_of(entry: Entry, identity: str, size: int, sha256: str) -> JsonDict:
    """The record of an image or scene, its pixels aside."""
    row: JsonDict = {
        "id": identity,
        "root": entry.root,
        "path": entry.path,
        "size": size,
        "mtime": entry.mtime,
    }
    return row | {"sha256": sha256, "stamp": entry.stamp, "texts": None} | entry.fields


def _pixels_or_failure(
    work: _Work, read: tuple[Pixels | ImageError, ...]
) -> tuple[_Work, list[Pixels]] | Failed:
    pixels: list[Pixels] = []
    for result in read:
        if isinstance(result, ImageError):
            return Failed(work.entry.name, result.reason)
        pixels.append(result)
    return work, pixels
