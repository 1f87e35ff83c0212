"""What an evaluation is about: the samples without their images, and images read when a model needs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from sightloop.data.datasets.dataset import Dataset, open_dataset
from sightloop.data.rng import generator
from sightloop.errors import ImageError, UsageError
from sightloop.inference.model import Model
from sightloop.types import Done, Failed, JsonDict, Pixels, Sample

ImageVerb: TypeAlias = "Callable[[list[Sample], list[Pixels]], Sequence[JsonDict]]"


@dataclass(frozen=True, slots=True)
class Reading:
    """How images are read: by so many workers, apart from this process or in it."""

    workers: int = 2
    isolate: bool = True


class EvalDataset:
    """The samples of a dataset, or `samples` of them drawn by `seed`, in its order. Images stay where they are.

    name: of the data, for people. samples: without images. broken: key -> why the dataset cannot give the sample.
    """

    def __init__(self, data: str | Path | Sequence[str | Path] | Dataset, samples: int | None, seed: int):
        whole = data if isinstance(data, Dataset) else open_dataset(data)
        self.name = "a dataset" if isinstance(data, Dataset) else _name(data)
        if samples is not None and samples < 1:
            raise UsageError(f"samples={samples}: must be at least 1")
        if samples is not None and samples < len(whole):
            drawn = generator("evaluate", "samples", seed).choice(len(whole), samples, replace=False)
            whole = whole.select(sorted(drawn.tolist()))
        self.dataset = whole
        self.fingerprint = whole.fingerprint
        self.samples: list[Sample] = []
        self.broken: dict[str, str] = {}
        self._place: dict[str, int] = {}
        for index in range(len(whole)):
            try:
                sample = whole[index]
            except ImageError as error:
                self.broken[error.name] = error.reason
                continue
            self._place[sample.key] = index
            self.samples.append(replace(sample, image=b""))

    def picture(self, key: str) -> bytes | Path:
        """The encoded image of a sample, or its file. Raises `ImageError` where it is gone."""
        return self.dataset[self._place[key]].image

    def run(
        self, model: Model, reading: Reading, samples: Sequence[Sample], verb: ImageVerb
    ) -> Iterator[Done[JsonDict] | Failed]:
        """A verb over the images of these samples, in batches of the model's size: one event a sample, in order."""
        pictures: list[Pixels] = []
        owners: list[Sample] = []
        for sample, read in self._read(model, reading, samples):
            if isinstance(read, ImageError):
                yield Failed(sample.key, read.reason)
                continue
            owners.append(sample)
            pictures.append(read)
            if len(owners) == model.batch_size:
                yield from _finished(owners, verb(owners, pictures))
                owners, pictures = [], []
        if owners:
            yield from _finished(owners, verb(owners, pictures))

    def _read(
        self, model: Model, reading: Reading, samples: Iterable[Sample]
    ) -> Iterator[tuple[Sample, Pixels | ImageError]]:
        waiting: deque[tuple[Sample, ImageError | None]] = deque()

        def sources() -> Iterator[bytes | Path]:
            for sample in samples:
                try:
                    picture = self.picture(sample.key)
                except ImageError as error:  # it was there when the dataset was listed
                    waiting.append((sample, error))
                    continue
                waiting.append((sample, None))
                yield picture

        stream = model.read(sources(), workers=reading.workers, isolate=reading.isolate)
        for read in stream:
            while (first := waiting.popleft())[1] is not None:
                yield first[0], first[1]
            yield first[0], read
        for sample, error in waiting:
            assert error is not None
            yield sample, error


def _finished(samples: Sequence[Sample], values: Sequence[JsonDict]) -> Iterator[Done[JsonDict]]:
    for sample, value in zip(samples, values, strict=True):
        yield Done(sample.key, value)


def _name(data: str | Path | Sequence[str | Path]) -> str:
    return str(data) if isinstance(data, str | Path) else " ".join(map(str, data))
