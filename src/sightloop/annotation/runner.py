"""Batch runner: applies a function to many images that are read in parallel, one event for each input, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import tee
from typing import Protocol, TypeAlias, TypeVar

from sightloop.data.image_names import is_video_name
from sightloop.data.images.reader import BatchSize, BatchSizer
from sightloop.errors import ImageError
from sightloop.types import Done, Event, Failed, ImageSource, Limits, Pixels, Skipped, Video

S = TypeVar("S")
T = TypeVar("T")

# An input before it is processed: an image path, or an event that only has to be passed on.
_Input: TypeAlias = "str | Skipped | Failed"
# An image's path with its result from each reader.
_ReadImage: TypeAlias = "tuple[str, tuple[Pixels | ImageError, ...]]"
_PreparedImage: TypeAlias = "tuple[str, tuple[Pixels, ...]]"

# Events wait in memory until the images before them are done. After this many inputs in a row without an image the
# reading session ends, so that a run over millions of images that are mostly done keeps its memory bounded.
_MAX_WAITING = 65_536


class ImageReader(Protocol):
    """Reader and preprocessor of images for one model; every `Model` is one."""

    def read(
        self,
        sources: Iterable[ImageSource | Video],
        *,
        workers: int = 2,
        isolate: bool = True,
        limits: Limits = ...,
    ) -> Iterator[Pixels | ImageError]:
        """One result for each source, in order."""
        ...


@dataclass(frozen=True, slots=True)
class LoaderConfig:
    """Settings of image loading.

    Attributes:
        batch_size: Images in one call of the model, or what finds their number while it runs.
        workers: Parallel decoders.
        isolate: Decode in worker processes, so that a crash of a decoder does not end the run.
        limits: Largest image that is decoded.
        parallel: Calls of the verb at once, each on a thread: one for each device.
        videos: Whether files with the names of videos are read as such.
    """

    batch_size: BatchSize | BatchSizer = 8
    workers: int = 2
    isolate: bool = True
    limits: Limits = field(default_factory=Limits)
    parallel: int = 1
    videos: bool = False

    def sizer(self) -> BatchSizer:
        """What finds the size of the batches."""
        return self.batch_size if isinstance(self.batch_size, BatchSizer) else BatchSizer(self.batch_size)


def run(
    readers: Sequence[ImageReader],
    inputs: Iterable[str | Skipped | Failed],
    verb: Callable[..., Sequence[T]],
    loader: LoaderConfig,
) -> Generator[Event[T], None, None]:
    """Applies `verb` to batches of images and yields one event for each input, in input order.

    Args:
        readers: One for each preprocessing that `verb` needs, usually one model.
        inputs: Image paths; `Skipped` and `Failed` are passed on.
        verb: Called with one list of `Pixels` for each reader, all of one length of at most `loader.batch_size`;
            returns one value for each image. Where memory runs out it is called again with half of them. Its other
            errors are not caught.
        loader: Batch size and image reading.
    """
    iterator, sizer = iter(inputs), loader.sizer()
    for item in iterator:
        if isinstance(item, str):
            session = _Session(item, iterator)
            yield from _batches(session.results(readers, loader), verb, sizer, loader.parallel)
        else:
            yield item


class _Session:
    """One pass of the readers: from a first image to the end of the inputs, or to `_MAX_WAITING`.

    The readers pull image paths ahead of their results. `_waiting` holds all inputs pulled so far and not yet
    yielded, so results and passed-on events can be put into input order again:

        inputs    a  b  Skipped(c)  d
        readers   pulled a, b, d; returned a
        _waiting  b  Skipped(c)  d
    """

    def __init__(self, first: str, rest: Iterator[_Input]) -> None:
        self._first = first
        self._rest = rest
        self._waiting: deque[_Input] = deque()

    def results(
        self, readers: Sequence[ImageReader], loader: LoaderConfig
    ) -> Iterator[_ReadImage | Skipped | Failed]:
        """Passed-on events, and each image's path with the results of all readers, in input order."""
        feeds = tee(self._sources(loader.videos), len(readers))
        streams = [
            reader.read(feed, workers=loader.workers, isolate=loader.isolate, limits=loader.limits)
            for reader, feed in zip(readers, feeds, strict=True)
        ]
        try:
            for read in zip(*streams, strict=True):
                yield from self._leading_events()
                name = self._waiting.popleft()
                assert isinstance(name, str)
                yield name, read
            yield from self._leading_events()
        finally:  # ends worker processes now, not at a later garbage collection
            for stream in streams:
                if isinstance(stream, Generator):
                    stream.close()

    def _sources(self, videos: bool) -> Iterator[str | Video]:
        return (Video(path) if videos and is_video_name(path) else path for path in self._paths())

    def _paths(self) -> Iterator[str]:
        self._waiting.append(self._first)
        yield self._first
        events_in_a_row = 0
        for item in self._rest:
            self._waiting.append(item)
            if isinstance(item, str):
                events_in_a_row = 0
                yield item
            else:
                events_in_a_row += 1
                if events_in_a_row >= _MAX_WAITING:
                    return

    def _leading_events(self) -> Iterator[Skipped | Failed]:
        while self._waiting and not isinstance(self._waiting[0], str):
            event = self._waiting.popleft()
            assert not isinstance(event, str)
            yield event


def _batches(
    results: Iterator[_ReadImage | Skipped | Failed],
    verb: Callable[..., Sequence[T]],
    sizer: BatchSizer,
    parallel: int,
) -> Iterator[Event[T]]:
    """Processes batches, up to `parallel` at once, and yields their events in input order."""
    batches = _collect(results, sizer)
    try:
        with closing(in_parallel(lambda batch: _process(batch, verb, sizer), batches, parallel)) as processed:
            for events in processed:
                yield from events
    finally:
        batches.close()


def in_parallel(work: Callable[[S], T], items: Iterable[S], parallel: int) -> Generator[T]:
    """What `work` makes of each item, in order; up to `parallel` at once, each on a thread."""
    if parallel == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(parallel, thread_name_prefix="sightloop-device") as pool:
        working: deque[Future[T]] = deque()
        try:
            for item in items:
                working.append(pool.submit(work, item))
                if len(working) > parallel:  # one more than there are devices waits, so that none does
                    yield working.popleft().result()
            while working:
                yield working.popleft().result()
        finally:
            for future in working:
                future.cancel()


def _collect(
    results: Iterator[_ReadImage | Skipped | Failed], sizer: BatchSizer
) -> Generator[list[_PreparedImage | Skipped | Failed], None, None]:
    """Batches of readable images, with the events between them; events before any image by themselves."""
    pending: list[_PreparedImage | Skipped | Failed] = []  # in input order
    images = 0  # in pending
    try:
        for result in results:
            item = _pixels_or_failure(*result) if isinstance(result, tuple) else result
            pending.append(item)
            images += isinstance(item, tuple)
            if images >= sizer.size or images == 0:
                yield pending
                pending, images = [], 0
        if pending:
            yield pending
    finally:
        if isinstance(results, Generator):
            results.close()


def _pixels_or_failure(name: str, results: tuple[Pixels | ImageError, ...]) -> _PreparedImage | Failed:
    prepared: list[Pixels] = []
    for result in results:
        if isinstance(result, ImageError):
            return Failed(name, result.reason)
        prepared.append(result)
    return name, tuple(prepared)


def _process(
    pending: list[_PreparedImage | Skipped | Failed], verb: Callable[..., Sequence[T]], sizer: BatchSizer
) -> list[Event[T]]:
    """Calls `verb` for the pending images; all pending events in order."""
    images = [item[1] for item in pending if isinstance(item, tuple)]

    def call(part: Sequence[tuple[Pixels, ...]]) -> Sequence[T]:
        results = verb(*(list(column) for column in zip(*part, strict=True)))
        if len(results) != len(part):
            raise RuntimeError(f"the verb returned {len(results)} values for {len(part)} images")
        return results

    values = iter(sizer.run(call, images))
    return [Done(item[0], next(values)) if isinstance(item, tuple) else item for item in pending]
