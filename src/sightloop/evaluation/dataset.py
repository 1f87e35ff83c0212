"""The evaluation dataset: annotations in memory, images decoded on demand and given to a model in batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from sightloop.data.datasets.dataset import Dataset, open_dataset
from sightloop.data.rng import generator
from sightloop.errors import ImageError, UsageError
from sightloop.evaluation.predictions import Records
from sightloop.types import Done, Failed, JsonDict, Pixels, Sample

if TYPE_CHECKING:
    from sightloop.inference.model import Model

DataSource: TypeAlias = "str | Path | Sequence[str | Path]"
PredictionEvents: TypeAlias = (
    "Iterator[Done[JsonDict] | Failed]"  # one per sample, with the fields of its record
)
# (model, samples, their images) -> fields of the record of each sample
PredictBatch: TypeAlias = "Callable[[Model, list[Sample], list[Pixels]], Sequence[JsonDict]]"


class EvalDataset:
    """The samples of a dataset, or some drawn by a seed, in the order of the dataset.

    Attributes:
        name: of the data, for people.
        dataset: the selected part of the source.
        fingerprint: of that part.
        samples: annotations without images.
        broken: key of a sample that the dataset cannot read -> reason.
    """

    def __init__(
        self,
        data: DataSource | Dataset,
        samples: int | None,
        seed: int,
        *,
        workers: int = 2,
        isolate: bool = True,
    ) -> None:
        """Reads the annotations.

        Args:
            data: a source for `open_dataset`, or a dataset.
            samples: number of samples to draw; None for all.
            seed: of the draw.
            workers: of the image reader, as in `Model.read`.
            isolate: decode in child processes, as in `Model.read`.
        """
        dataset = data if isinstance(data, Dataset) else open_dataset(data)
        self.name = "a dataset" if isinstance(data, Dataset) else _source_name(data)
        self._whole = dataset
        if samples is not None and samples < 1:
            raise UsageError(f"samples={samples}: must be at least 1")
        if samples is not None and samples < len(dataset):
            drawn = generator("evaluate", "samples", seed).choice(len(dataset), samples, replace=False)
            dataset = dataset.select(sorted(drawn.tolist()))
        self.dataset = dataset
        self.fingerprint = dataset.fingerprint
        self.samples: list[Sample] = []
        self.broken: dict[str, str] = {}
        self._workers, self._isolate = workers, isolate
        self._index_of: dict[str, int] = {}
        for index in range(len(dataset)):
            try:
                sample = dataset[index]
            except ImageError as error:
                self.broken[error.name] = error.reason
                continue
            self._index_of[sample.key] = index
            self.samples.append(replace(sample, image=b""))

    @property
    def source_fingerprint(self) -> str:
        """Fingerprint of all of the data, whatever part is evaluated."""
        return self._whole.fingerprint

    def image(self, key: str) -> bytes | Path:
        """The encoded image of a sample, or its file. Raises `ImageError` if it no longer exists."""
        return self.dataset[self._index_of[key]].image

    def readable(self, records: Records) -> list[Sample]:
        """The samples whose images no earlier pass failed to read."""
        return [sample for sample in self.samples if "failed" not in records.get(sample.key, {})]

    def map_images(self, model: Model, samples: Sequence[Sample], predict: PredictBatch) -> PredictionEvents:
        """Applies `predict` in batches of the model's size; one event per sample, in order."""
        batch: list[Sample] = []
        images: list[Pixels] = []
        for sample, image in self._read(model, samples):
            if isinstance(image, ImageError):
                yield Failed(sample.key, image.reason)
                continue
            batch.append(sample)
            images.append(image)
            if len(batch) >= model.sizer.size:
                yield from _as_events(batch, _predict(model, predict, batch, images))
                batch, images = [], []
        if batch:
            yield from _as_events(batch, _predict(model, predict, batch, images))

    def _read(self, model: Model, samples: Iterable[Sample]) -> Iterator[tuple[Sample, Pixels | ImageError]]:
        """Every sample with its prepared image, in order.

        The reader takes sources ahead of its results. A sample without source never reaches it: it waits in the queue
        with its error until the results of the samples before it are out.
        """
        pending: deque[tuple[Sample, ImageError | None]] = deque()

        def sources() -> Iterator[bytes | Path]:
            for sample in samples:
                try:
                    image = self.image(sample.key)
                except ImageError as error:  # it existed when the dataset was listed
                    pending.append((sample, error))
                    continue
                pending.append((sample, None))
                yield image

        for image in model.read(sources(), workers=self._workers, isolate=self._isolate):
            while (first := pending.popleft())[1] is not None:
                yield first[0], first[1]
            yield first[0], image
        for sample, error in pending:
            assert error is not None
            yield sample, error


def _predict(
    model: Model, predict: PredictBatch, samples: Sequence[Sample], images: Sequence[Pixels]
) -> Sequence[JsonDict]:
    """Predictions of a batch, in halves where memory runs out."""

    def call(pairs: Sequence[tuple[Sample, Pixels]]) -> Sequence[JsonDict]:
        return predict(model, [sample for sample, _ in pairs], [image for _, image in pairs])

    return model.sizer.run(call, list(zip(samples, images, strict=True)))


def _as_events(samples: Sequence[Sample], records: Sequence[JsonDict]) -> Iterator[Done[JsonDict]]:
    for sample, record in zip(samples, records, strict=True):
        yield Done(sample.key, record)


def _source_name(data: DataSource) -> str:
    return str(data) if isinstance(data, str | Path) else " ".join(map(str, data))
