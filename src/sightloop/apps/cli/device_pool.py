"""One model on several devices: a process for each, behind the verbs of one model.

The processes are given whole batches by as many threads of the caller, such as those of `annotation.runner`. Images and
videos are read once, in the caller's process.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import Queue
from types import TracebackType
from typing import Any

from sightloop.data.images.reader import BatchSize, BatchSizer
from sightloop.data.video.sampling import Sampling
from sightloop.errors import ImageError, SightloopError
from sightloop.inference.load import choose_device, load
from sightloop.inference.model import Preprocessor
from sightloop.types import Floats32, ImageSource, ImageSpec, JsonDict, JsonMapping, Limits, Pixels, Video
from sightloop.workers.processes import end_with_parent, threads_of_children, without_main_script


@dataclass(frozen=True, slots=True)
class _Description:
    """What the caller has to know of the model that a worker has loaded."""

    name: str
    capabilities: frozenset[str]
    image_spec: ImageSpec
    sampling: Sampling | None  # of videos


class DevicePool:
    """The same model on several devices, with the verbs that commands over many images need; a context manager.

    Each call of a verb goes whole to one process that is free, and waits for one; call from `len(devices)` threads.
    Results are those of the model on that device. On CPUs the threads of torch are divided among the processes.

    Args:
        source: As `load` takes it.
        devices: A process each; a device may be named twice.
        batch_size: Images in one call; None for the devices' default. "auto" is that default too: what a batch takes is
            measured in one process only.
        options: Further arguments of `load`.

    Raises:
        SightloopError: What `load` raises, or a process that ended.
    """

    def __init__(
        self, source: str, devices: Sequence[str], batch_size: BatchSize | None = None, **options: Any
    ) -> None:
        kinds = [choose_device(device) for device in devices]
        on_cpu = sum(kind.type == "cpu" for kind in kinds)
        threads = max(1, (os.cpu_count() or 1) // on_cpu) if on_cpu else 0
        self._idle: Queue[_ModelProcess] = Queue()
        self._processes = [_ModelProcess(source, device, threads, options) for device in devices]
        try:
            described = [process.started() for process in self._processes]
        except BaseException:
            self.close()
            raise
        for process in self._processes:
            self._idle.put(process)
        self.name, self.capabilities = described[0].name, described[0].capabilities
        self.image_spec, sampling = described[0].image_spec, described[0].sampling
        default = 8 if kinds[0].type == "cpu" else 32
        self.sizer = BatchSizer(default if batch_size in (None, "auto") else batch_size)
        self._preprocessor = Preprocessor(self.image_spec, self.sizer, sampling, self.parallel)

    @property
    def parallel(self) -> int:
        """Batches at once."""
        return len(self._processes)

    def read(
        self,
        sources: Iterable[ImageSource | Video],
        *,
        workers: int = 2,
        isolate: bool = True,
        limits: Limits | None = None,
    ) -> Iterator[Pixels | ImageError]:
        """Images and videos preprocessed for this model, as of `Model.read`, ahead by a batch for each device."""
        return self._preprocessor.read(sources, workers=workers, isolate=isolate, limits=limits)

    def caption(self, images: Sequence[Pixels], prompt: str | None = None, **decoding: Any) -> list[str]:
        """`Model.caption` of a batch."""
        return self._call("caption", (images, prompt), decoding)

    def match(self, images: Sequence[Pixels], texts: Sequence[str]) -> Floats32:
        """`Model.match` of a batch."""
        return self._call("match", (images, texts), {})

    def embed_images(self, images: Sequence[Pixels]) -> Floats32:
        """`Model.embed_images` of a batch."""
        return self._call("embed_images", (images,), {})

    def _call(self, verb: str, arguments: tuple[object, ...], options: JsonMapping) -> Any:
        process = self._idle.get()
        try:
            return process.call(verb, arguments, options)
        finally:
            self._idle.put(process)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.stop()

    def __enter__(self) -> DevicePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _ModelProcess:
    """A child process with a model, which ends when its parent is killed."""

    def __init__(self, source: str, device: str, threads: int, options: JsonMapping) -> None:
        self.device = device
        context = multiprocessing.get_context("spawn")
        self._pipe, child_end = context.Pipe()
        arguments = (child_end, source, device, dict(options))
        self._process = context.Process(target=_serve, args=arguments, daemon=False)
        with without_main_script(), threads_of_children(threads):
            self._process.start()
        child_end.close()  # so that the pipe ends when the child dies

    def started(self) -> _Description:
        """What was loaded. Raises what `load` raised."""
        return self._take()

    def call(self, verb: str, arguments: tuple[object, ...], options: JsonMapping) -> Any:
        """The result of a verb. Raises what the verb raised."""
        with suppress(BrokenPipeError, ConnectionError):  # it is dead, and `_take` says so
            self._pipe.send((verb, arguments, dict(options)))
        return self._take()

    def stop(self) -> None:
        """Kill the process if it is alive."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _take(self) -> Any:
        try:
            done, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(10)
            raise SightloopError(
                f"the process of the model on {self.device} ended (exit status {self._process.exitcode}; -9 often "
                "means too little memory: name fewer --devices, or use a smaller --batch-size)"
            ) from error
        if not done:
            raise answer
        return answer


def _serve(pipe: Connection, source: str, device: str, options: JsonDict) -> None:
    end_with_parent()
    with suppress(EOFError, ConnectionError):  # the parent is gone
        try:
            model = load(source, device=device, **options)
        except Exception as error:
            pipe.send((False, _as_sent(error)))
            return
        sampling = model.preprocessor.sampling
        pipe.send((True, _Description(model.name, model.capabilities, model.image_spec, sampling)))
        while True:
            verb, arguments, keywords = pipe.recv()
            model.batch_size = max(1, len(arguments[0]))  # the whole batch at once
            try:
                answer = (True, getattr(model, verb)(*arguments, **keywords))
            except Exception as error:
                answer = (False, _as_sent(error))
            pipe.send(answer)


def _as_sent(error: Exception) -> Exception:
    """An exception that any process can read: our own, or its text."""
    if isinstance(error, SightloopError):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
