"""Images given to several workers, with the answers in order; what a worker had that died is given again."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from sightloop.errors import ImageError, SightloopError
from sightloop.search.embedding_server import Description, EmbeddingJob, EmbeddingServer, NamedImage, Spread
from sightloop.workers.engine import Engine, Worker, WorkerError
from sightloop.workers.processes import Processes
from sightloop.workers.ray_actors import RayEngine

_MAX_DEATHS = 5  # of workers at one batch, with no answer in between
_BATCHES_AT_ONCE = 2  # of a model, in one request
_CPU_BATCH, _GPU_BATCH = 8, 32
_MAX_BYTES = 32 << 20  # of images in one request


@dataclass(eq=False, slots=True)
class _Batch:
    """Images of one request.

    Attributes:
        parts: what is left to be answered; the first of them is in work, or is the next.
        answers: of the parts before.
        deaths: of workers since the last answer.
    """

    parts: deque[Sequence[NamedImage]]
    answers: list[Description | ImageError] = field(default_factory=list["Description | ImageError"])
    deaths: int = 0


class Crew:
    """Workers that describe images. They start when there is work for them.

    Args:
        make_engine: makes the creator of workers, when the first is needed.
        count: number of workers.
        images: greatest number of images in a request.
        warn: called when a worker has died.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        count: int,
        images: int = _BATCHES_AT_ONCE * _CPU_BATCH,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        self._make_engine, self._count, self._warn = make_engine, count, warn
        self.images, self.bytes = images, _MAX_BYTES
        self._engine: Engine | None = None
        self._workers: dict[int, Worker] = {}
        self._busy: dict[int, _Batch] = {}
        self._waiting: deque[_Batch] = deque()

    def describe(self, batches: Iterable[Sequence[NamedImage]]) -> Generator[list[Description | ImageError]]:
        """The answers to each batch, in order. Closing the generator ends the workers.

        Args:
            batches: read ahead by as many as there are workers.

        Raises:
            SightloopError: what a worker raised, or workers that die one after the other at one batch.
        """
        source, is_read = iter(batches), False
        order: deque[_Batch] = deque()
        try:
            while not is_read or order:
                while not is_read and len(self._waiting) < self._count and len(order) < 3 * self._count:
                    images = next(source, None)
                    if images is None:
                        is_read = True
                        break
                    order.append(_Batch(deque([images] if images else [])))
                    if images:
                        self._waiting.append(order[-1])
                    self._give()
                while order and not order[0].parts:
                    yield order.popleft().answers
                if self._busy:
                    self._take()
                    self._give()
        finally:
            self._stop()

    def _give(self) -> None:
        """Gives what waits to workers that are free."""
        for number in range(self._count):
            if self._waiting and number not in self._busy:
                if self._engine is None:
                    self._engine = self._make_engine()
                if number not in self._workers:
                    self._workers[number] = self._engine.start(number)
                batch = self._busy[number] = self._waiting.popleft()
                self._workers[number].give(list(batch.parts[0]))

    def _take(self) -> None:
        """Waits for workers, and takes their answers."""
        assert self._engine is not None
        ready = self._engine.ready([self._workers[number] for number in self._busy])
        for number in [number for number in self._busy if self._workers[number] in ready]:
            try:
                (answer,) = self._workers[number].take()
            except EOFError:
                self._bury(number)
                continue
            if isinstance(answer, WorkerError):
                raise answer.error
            assert isinstance(answer, list)
            batch = self._busy.pop(number)
            batch.parts.popleft()
            batch.answers += answer
            batch.deaths = 0
            if batch.parts:
                self._waiting.appendleft(batch)

    def _bury(self, number: int) -> None:
        """What a dead worker had is done again: the first time whole, then image by image."""
        ending, batch = self._workers.pop(number).stop(), self._busy.pop(number)
        batch.deaths += 1
        images = batch.parts[0]
        names = images[0].name + (f" and {len(images) - 1} images after it" if len(images) > 1 else "")
        if batch.deaths >= _MAX_DEATHS:
            raise SightloopError(
                f"{batch.deaths} workers ended one after the other ({ending}), the last at {names}; -9 often means too "
                "little memory: use fewer copies of the model or a smaller --batch-size. What is in the index stays"
            )
        if len(images) == 1 and batch.deaths > 1:
            batch.parts.popleft()
            batch.answers.append(ImageError(images[0].name, f"took a worker down twice ({ending})"))
        else:
            self._warn(f"a worker ended ({ending}); what it had is embedded again: {names}")
            if batch.deaths > 1:
                batch.parts.popleft()
                batch.parts.extendleft(reversed([[image] for image in images]))
        if batch.parts:
            self._waiting.appendleft(batch)

    def _stop(self) -> None:
        for worker in self._workers.values():
            worker.stop()
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        self._workers, self._busy, self._waiting = {}, {}, deque()


def open_crew(spread: Spread, job: EmbeddingJob, warn: Callable[[str], None] | None = None) -> Crew:
    """The crew of a run.

    Args:
        spread: where it works.
        job: what its workers have to know.
        warn: called when a worker has died; by default `warnings.warn`.
    """
    count = len(spread.devices) or spread.copies
    kind = _kind_of((*spread.devices, spread.device)[0])
    make = partial(EmbeddingServer, job, spread)

    def make_engine() -> Engine:
        if spread.engine == "ray":
            return RayEngine(make, count, None, on_gpus=kind == "cuda")
        return Processes(make, max(1, (os.cpu_count() or 1) // count) if kind == "cpu" else 0)

    own = spread.batch_size if isinstance(spread.batch_size, int) else None
    size = own or (_CPU_BATCH if kind == "cpu" else _GPU_BATCH)
    return Crew(make_engine, count, _BATCHES_AT_ONCE * size, warn or warnings.warn)


def _kind_of(device: str) -> str:
    """Kind of a device: "cuda" for "cuda:1"; for "auto", the best that this machine has."""
    from sightloop.inference.load import choose_device

    return choose_device(device).type if device == "auto" else device.partition(":")[0]
