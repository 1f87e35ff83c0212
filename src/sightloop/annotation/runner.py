"""One verb over many images: read beside the model, in batches, every input accounted for and in its place."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import tee
from typing import Protocol, TypeVar

from sightloop.errors import ImageError
from sightloop.types import Done, Event, Failed, ImageSource, Limits, Pixels, Skipped

T = TypeVar("T")

# A run of this many inputs that need no reading ends one session of the reader: they must wait for the images
# before them, and would fill the memory where all but a few of millions of images are done already.
_MOST_WAITING = 65_536


class ImageReader(Protocol):
    """What reads and prepares images for one model: every `Model` is one."""

    def read(
        self, sources: Iterable[ImageSource], *, workers: int = 2, isolate: bool = True, limits: Limits = ...
    ) -> Iterator[Pixels | ImageError]:
        """One result for each source, in order."""
        ...


@dataclass(frozen=True, slots=True)
class LoaderConfig:
    """How images are read: so many to a batch, by so many workers, apart from this process or in it."""

    batch_size: int = 8
    workers: int = 2
    isolate: bool = True
    limits: Limits = field(default_factory=Limits)


def run(
    readers: Sequence[ImageReader],
    inputs: Iterable[str | Skipped | Failed],
    verb: Callable[..., Sequence[T]],
    reading: LoaderConfig,
) -> Generator[Event[T], None, None]:
    """Applies `verb` to every image that can be read and yields one event for each input, in the order of the inputs.

    `readers` prepare each image, usually one model; with two, each image is prepared for both. `verb` gets one list
    of `Pixels` for each reader, all of the same length, at most `reading.batch_size`, and returns one value an image.
    What is `Skipped` or `Failed` already passes through. An error of the verb (out of memory, say) is not caught.
    """
    rest = iter(inputs)
    for item in rest:
        if isinstance(item, str):
            session = _Session(item, rest)
            yield from _batched(session.results(readers, reading), verb, reading.batch_size)
        else:
            yield item


class _Session:
    """One use of the readers: from a first image until the inputs, or the room for waiting events, end."""

    def __init__(self, first: str, rest: Iterator[str | Skipped | Failed]) -> None:
        self._first = first
        self._rest = rest
        self._waiting: deque[str | Skipped | Failed] = deque()

    def results(
        self, readers: Sequence[ImageReader], reading: LoaderConfig
    ) -> Iterator[tuple[str, tuple[Pixels | ImageError, ...]] | Skipped | Failed]:
        """The events that need no reading, and each image's name with what the readers gave, in order."""
        feeds = tee(self._pictures(), len(readers))
        streams = [
            reader.read(feed, workers=reading.workers, isolate=reading.isolate, limits=reading.limits)
            for reader, feed in zip(readers, feeds, strict=True)
        ]
        try:
            for read in zip(*streams, strict=True):
                yield from self._before_picture()
                name = self._waiting.popleft()
                assert isinstance(name, str)
                yield name, read
            yield from self._before_picture()
        finally:  # an interrupted run ends its worker processes here and not at some later collection
            for stream in streams:
                if isinstance(stream, Generator):
                    stream.close()

    def _pictures(self) -> Iterator[str]:
        self._waiting.append(self._first)
        yield self._first
        idle = 0
        for item in self._rest:
            self._waiting.append(item)
            if isinstance(item, str):
                idle = 0
                yield item
            else:
                idle += 1
                if idle >= _MOST_WAITING:
                    return

    def _before_picture(self) -> Iterator[Skipped | Failed]:
        while self._waiting and not isinstance(self._waiting[0], str):
            event = self._waiting.popleft()
            assert not isinstance(event, str)
            yield event


def _batched(
    results: Iterator[tuple[str, tuple[Pixels | ImageError, ...]] | Skipped | Failed],
    verb: Callable[..., Sequence[T]],
    batch_size: int,
) -> Iterator[Event[T]]:
    held: list[
        tuple[str, tuple[Pixels, ...]] | Skipped | Failed
    ] = []  # events in order, images still without value
    good = 0
    try:
        for result in results:
            if isinstance(result, tuple):
                result = _picture_or_failure(*result)
            held.append(result)
            good += isinstance(result, tuple)
            if good == batch_size or (good == 0 and held):
                yield from _finish(held, verb)
                held, good = [], 0
        yield from _finish(held, verb)
    finally:
        if isinstance(results, Generator):
            results.close()


def _picture_or_failure(
    name: str, read: tuple[Pixels | ImageError, ...]
) -> tuple[str, tuple[Pixels, ...]] | Failed:
    prepared: list[Pixels] = []
    for result in read:
        if isinstance(result, ImageError):
            return Failed(name, result.reason)
        prepared.append(result)
    return name, tuple(prepared)


def _finish(
    held: list[tuple[str, tuple[Pixels, ...]] | Skipped | Failed], verb: Callable[..., Sequence[T]]
) -> Iterator[Event[T]]:
    pictures = [item[1] for item in held if isinstance(item, tuple)]
    values: Iterator[T] = iter(())
    if pictures:
        given = verb(*(list(column) for column in zip(*pictures, strict=True)))
        if len(given) != len(pictures):
            raise RuntimeError(f"the verb gave {len(given)} values for {len(pictures)} images")
        values = iter(given)
    for item in held:
        yield Done(item[0], next(values)) if isinstance(item, tuple) else item
