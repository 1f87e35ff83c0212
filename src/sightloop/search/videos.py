"""Videos in an index: one that is new, changed or moved is cut into scenes, and each is a row with its times.

A scene is what is between two cuts, in parts of at most `LONGEST` seconds. Its vector is that of some frames: each of
unit length, their mean, of unit length again (CLIP4Clip's mean, arXiv:2104.08860). Neighbors that look nearly equal are
one row. The rows of a video are committed together.
"""

from __future__ import annotations

import hashlib
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from sightloop.data.video.reader import find_scenes, read_frames, video_info
from sightloop.data.video.sampling import at_times, keyframes
from sightloop.errors import ImageError, UnsupportedError, os_error_reason
from sightloop.search.build import UPDATED, BuildOptions, Indexed, is_there, row_of, with_texts
from sightloop.search.embedding_server import unit_rows
from sightloop.search.filters import Condition, Filter
from sightloop.search.rows import merge_columns, table_of, vector_column
from sightloop.search.sources import Entry
from sightloop.search.store import Store, VectorSpace
from sightloop.types import Done, Event, Failed, Floats32, Skipped, VideoFrame, VideoScene

if TYPE_CHECKING:
    from sightloop.inference.model import Model

LONGEST: Final = 8.0  # seconds of a part
FRAMES: Final = 3  # of a part, in the middles of its thirds
SAME: Final = 0.97  # cosine from which two neighbors are one row
_KEYFRAME_GAP: Final = 1.0  # seconds between two keyframes that are embedded
_AT_ONCE: Final = 32  # frames
_BLOCK: Final = 1 << 20
_SCENES: Final = Filter((((Condition("start", ">=", 0.0),),),))


@dataclass(slots=True)
class KnownVideo:
    """A video that is in the index.

    Attributes:
        ids: of its scenes.
        root, path, size, mtime, sha256, stamp: as in a row.
    """

    root: str
    path: str
    size: int
    mtime: int
    sha256: str
    stamp: int
    ids: list[str] = field(default_factory=list[str])

    @property
    def name(self) -> str:
        """Where it is."""
        return os.path.join(self.root, self.path)


def known_videos(store: Store) -> dict[str, KnownVideo]:
    """The videos of an index by name."""
    videos: dict[str, KnownVideo] = {}
    columns = ("root", "path", "size", "mtime", "sha256", "stamp")
    for part in store.scan(("id", *columns), _SCENES):
        for row in part.to_pylist():
            name = os.path.join(row["root"] or "", row["path"] or "")
            if name not in videos:
                videos[name] = KnownVideo(*(row[column] for column in columns))
            videos[name].ids.append(row["id"])
    return videos


def index_videos(
    store: Store,
    models: Sequence[tuple[VectorSpace, Model]],
    entries: Iterable[Entry | Failed],
    options: BuildOptions,
) -> Generator[Event[Indexed]]:
    """Indexes videos and yields an event for each, after its commit. A run that was killed goes on with the next video.

    Args:
        store: of the index; the caller holds its lock.
        models: with their vector spaces.
        entries: of `sources.list_videos`.
        options: of reading.
    """
    known: dict[str, KnownVideo] | None = None
    for entry in entries:
        if isinstance(entry, Failed):
            yield entry
            continue
        known = known_videos(store) if known is None else known
        try:
            yield _index_video(store, models, entry, known, options)
        except (ImageError, UnsupportedError) as error:
            yield Failed(entry.name, error.reason if isinstance(error, ImageError) else str(error))
        except OSError as error:
            yield Failed(entry.name, os_error_reason(error))


def _index_video(
    store: Store,
    models: Sequence[tuple[VectorSpace, Model]],
    entry: Entry,
    known: dict[str, KnownVideo],
    options: BuildOptions,
) -> Event[Indexed]:
    before = known.get(entry.name)
    same_file = before is not None and (before.size, before.mtime) == (entry.size, entry.mtime)
    if before is not None and same_file and before.stamp == entry.stamp:
        return Skipped(entry.name, "it is in the index")
    sha256 = before.sha256 if before is not None and same_file else _hash_file(entry.name)
    now = KnownVideo(entry.root, entry.path, entry.size or 0, entry.mtime, sha256, entry.stamp)
    moved = None if before is not None else _moved(known, sha256)
    old = before or moved
    if old is not None and old.sha256 == sha256:
        now.ids = old.ids
        rows = {name: row_of(entry, name, now.size, sha256) for name in now.ids}
        store.update(table_of(with_texts(store, rows)).select(UPDATED))
        known.pop(old.name)
        known[now.name] = now
        return Done(entry.name, Indexed(now.ids[0], "updated" if before is not None else "moved"))
    scenes = embed_scenes(entry.name, models, keyframes_only=options.keyframes_only, warn=options.warn)
    now.ids = _new_ids(entry.path, sha256, len(scenes), known)
    height, width = video_info(entry.name, warn=_ignore).size
    rows = [
        row_of(entry, name, now.size, sha256)
        | {"start": scene.start, "end": scene.end, "width": width, "height": height}
        for name, scene in zip(now.ids, scenes, strict=True)
    ]
    columns = {
        space.column: vector_column(np.stack([scene.vectors[i] for scene in scenes]), space.dtype)
        for i, (space, _) in enumerate(models)
    }
    if before is not None:
        store.delete(before.ids)
    store.add(merge_columns(table_of(rows), columns))
    known[now.name] = now
    return Done(entry.name, Indexed(now.ids[0], "changed" if before is not None else "added"))


def _moved(known: dict[str, KnownVideo], sha256: str) -> KnownVideo | None:
    return next(
        (
            video
            for video in known.values()
            if video.sha256 == sha256 and not is_there(video.root, video.path)
        ),
        None,
    )


def _new_ids(path: str, sha256: str, count: int, known: dict[str, KnownVideo]) -> list[str]:
    """16 hex digits for each scene; the same in every run that finds the same videos before."""
    taken = {name for video in known.values() for name in video.ids}
    copy = 0
    while True:
        texts = [f"{path}\0{sha256}\0{copy or ''}\0{scene}" for scene in range(count)]
        ids = [hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16] for text in texts]
        if taken.isdisjoint(ids):
            return ids
        copy += 1


def _hash_file(name: str) -> str:
    digest = hashlib.sha256()
    with open(name, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class EmbeddedScene:
    """A part of a video with its vector in each space.

    Args:
        start: in seconds.
        end: likewise, exclusive.
        vectors: of each model, float32 `[q * d]`, each of unit length.
    """

    start: float
    end: float
    vectors: tuple[Floats32, ...]


def embed_scenes(
    name: str,
    models: Sequence[tuple[VectorSpace, Model]],
    *,
    keyframes_only: bool = False,
    warn: Callable[[str], None] | None = None,
) -> list[EmbeddedScene]:
    """The scenes of a video with their vectors, near-equal neighbors as one.

    Args:
        name: path of the video.
        models: with their vector spaces.
        keyframes_only: look at keyframes alone.
        warn: called with what could not be read; by default `warnings.warn`.

    Raises:
        ImageError: nothing of it can be read.
        UnsupportedError: PyAV is not installed.
    """
    scenes = find_scenes(name, keyframes_only=keyframes_only, warn=warn)
    parts = [part for scene in scenes for part in split_scene(scene)]
    times = [
        part.start + (part.end - part.start) * (2 * i + 1) / (2 * FRAMES)
        for part in parts
        for i in range(FRAMES)
    ]
    sampling = keyframes(_KEYFRAME_GAP) if keyframes_only else at_times(times)
    sides = [side for _, model in models if (side := _side(model))]
    frames = read_frames(name, sampling, side=max(sides) if len(sides) == len(models) else None, warn=_ignore)
    starts = [part.start for part in parts]
    within: list[int] = []
    vectors: list[list[Floats32]] = [[] for _ in models]
    for batch in _batches(frames):
        within += [max(0, bisect_right(starts, frame.time + 1e-3) - 1) for frame in batch]
        for i, (space, model) in enumerate(models):
            made = model.embed_images([frame.pixels for frame in batch])
            vectors[i].append(unit_rows(made, space, [f"{name} at {frame.time:.2f} s" for frame in batch]))
    if not within:
        raise ImageError(name, "no frame of it can be decoded")
    stacked = [np.concatenate(own) for own in vectors]
    chosen = np.array(within)
    embedded: list[EmbeddedScene] = []
    for number in sorted(set(within)):
        means = tuple(
            _mean(own[chosen == number], space) for own, (space, _) in zip(stacked, models, strict=True)
        )
        embedded.append(EmbeddedScene(parts[number].start, parts[number].end, means))
    return _join_equal(embedded, parts, models[0][0])


def split_scene(scene: VideoScene) -> Iterator[VideoScene]:
    """A scene in equal parts of at most `LONGEST` seconds."""
    count = max(1, math.ceil((scene.end - scene.start) / LONGEST - 1e-6))
    step = (scene.end - scene.start) / count
    for i in range(count):
        yield VideoScene(
            scene.start + i * step, scene.end if i == count - 1 else scene.start + (i + 1) * step
        )


def _join_equal(
    scenes: Sequence[EmbeddedScene], parts: Sequence[VideoScene], space: VectorSpace
) -> list[EmbeddedScene]:
    """Neighbors whose vectors are nearly those of the first of them as one scene; parts without frames go before."""
    joined: list[EmbeddedScene] = []
    for scene in scenes:
        if joined and float(joined[-1].vectors[0] @ scene.vectors[0]) / space.queries >= SAME:
            scene = EmbeddedScene(joined[-1].start, scene.end, joined.pop().vectors)
        joined.append(scene)
    ends = [*(scene.start for scene in joined[1:]), parts[-1].end]
    starts = [parts[0].start, *(scene.start for scene in joined[1:])]
    return [
        EmbeddedScene(start, end, scene.vectors)
        for start, end, scene in zip(starts, ends, joined, strict=True)
    ]


def _mean(vectors: Floats32, space: VectorSpace) -> Floats32:
    """`[n, q * d]`, each of unit length -> `[q * d]`, likewise."""
    mean = vectors.mean(axis=0).reshape(-1, space.dim)
    return (mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)).reshape(-1)


def _batches(frames: Iterable[VideoFrame]) -> Iterator[list[VideoFrame]]:
    batch: list[VideoFrame] = []
    for frame in frames:
        batch.append(frame)
        if len(batch) == _AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _side(model: Model) -> int | None:
    """The shorter side in pixels that suffices: twice that which a model sees; None for that of the video itself."""
    spec = model.image_spec
    if spec.patches is not None or spec.tiles:
        return None
    return 2 * max([spec.shortest_edge or 0, *(spec.resize or ()), *(spec.crop or ())]) or None


def _ignore(warning: str) -> None:
    """What cannot be read was said when the scenes were searched."""
