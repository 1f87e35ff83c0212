"""What a worker of an index does: images in, their vectors, sizes, EXIF and hashes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from sightloop.data.images.reader import BatchSize, ImagePool
from sightloop.errors import ImageError, UsageError
from sightloop.search.exif import read_exif
from sightloop.search.rows import unit_vectors
from sightloop.search.store import VectorSpace
from sightloop.types import Floats32, JsonDict, Limits, Pixels, Size

if TYPE_CHECKING:
    from sightloop.inference.model import Model

Prepare = Callable[[bytes], JsonDict]  # what else a row gets, from the bytes of its image


class NamedImage(NamedTuple):
    """An image on its way to a worker: its name for messages, and the encoded bytes."""

    name: str
    data: bytes


class Description(NamedTuple):
    """What a row holds of an image: fields, and a vector `[q * d]` for each space."""

    fields: JsonDict
    vectors: Sequence[Floats32]


@dataclass(frozen=True, slots=True)
class Spread:
    """Where images are embedded, in place of the process that writes the index.

    Args:
        engine: "local" for processes of this machine, "ray" for actors of a Ray cluster.
        copies: of the models, a worker each.
        device: of all workers; "auto" and "cuda" are the GPUs of a machine in turn.
        devices: a worker on each, in place of `copies` and `device`.
        load_options: by the name of a model, further arguments of `load`.
        batch_size: images in one pass; None for the device's default.
    """

    engine: Literal["local", "ray"] = "local"
    copies: int = 1
    device: str = "auto"
    devices: tuple[str, ...] = ()
    load_options: Mapping[str, JsonDict] = field(default_factory=dict[str, JsonDict])
    batch_size: BatchSize | None = None

    def __post_init__(self) -> None:
        """Raises `UsageError` for a value out of range."""
        if self.copies < 1:
            raise UsageError(f"copies={self.copies}: must be at least 1")
        if self.engine not in ("local", "ray"):
            raise UsageError(f"engine={self.engine!r}: must be 'local' or 'ray'")


@dataclass(frozen=True, slots=True)
class EmbeddingJob:
    """What a worker has to know.

    Args:
        index: name of the index, for messages.
        spaces: its vector spaces, each with the name of the model that fills it.
        readers: decoders of each worker.
        isolate: decode in child processes.
        limits: bounds on each image.
        prepare: what else a row gets; a function of a module.
    """

    index: str
    spaces: tuple[tuple[VectorSpace, str], ...]
    readers: int = 2
    isolate: bool = True
    limits: Limits = field(default_factory=Limits)
    prepare: Prepare | None = None


class EmbeddingServer:
    """What answers inside a worker.

    Args:
        job: of the run.
        spread: of the run, which tells device and precision.
        number: slot of the worker.

    Raises:
        UsageError: a model is not the one whose vectors the index holds.
    """

    def __init__(self, job: EmbeddingJob, spread: Spread, number: int) -> None:
        from sightloop.inference.load import device_of_worker, load
        from sightloop.search.models import check_model

        self._job = job
        self._models: list[tuple[VectorSpace, Model]] = []
        device = device_of_worker(spread.device, number, spread.devices)
        for space, name in job.spaces:
            model = load(name, device=device, **spread.load_options.get(name, {}))
            if spread.batch_size is not None:
                model.batch_size = spread.batch_size
            check_model(model, space, job.index)
            self._models.append((space, model))
        self._pools = [
            ImagePool(model.image_spec, limits=job.limits, workers=job.readers)
            for _, model in self._models
            if job.isolate
        ]

    def answer(self, request: object, send: Callable[[object], None]) -> list[Description | ImageError]:
        """A description of each `NamedImage` of a request, or why it cannot be read."""
        assert isinstance(request, tuple | list)
        images: list[NamedImage] = list(request)
        columns = [self._read(place, images) for place in range(len(self._models))]
        failed: dict[int, ImageError] = {}
        batch: list[tuple[int, list[Pixels]]] = []
        for i, each in enumerate(zip(*columns, strict=True)):
            pixels = [read for read in each if not isinstance(read, ImageError)]
            if len(pixels) == len(each):
                batch.append((i, pixels))
            else:
                reason = next(read.reason for read in each if isinstance(read, ImageError))
                failed[i] = ImageError(images[i].name, reason)
        names = [images[i].name for i, _ in batch]
        vectors = [
            unit_rows(model.embed_images([pixels[place] for _, pixels in batch]), space, names)
            for place, (space, model) in enumerate(self._models)
            if batch
        ]
        described = {
            i: Description(
                image_fields(images[i].data, pixels[0].size, self._job.prepare),
                [column[row] for column in vectors],
            )
            for row, (i, pixels) in enumerate(batch)
        }
        return [failed[i] if i in failed else described[i] for i in range(len(images))]

    def _read(self, place: int, images: Sequence[NamedImage]) -> list[Pixels | ImageError]:
        """The images as the model in a place sees them, all of them decoded in parallel."""
        sources = [image.data for image in images]
        if self._pools:
            return [future.result() for future in [self._pools[place].submit(source) for source in sources]]
        model, job = self._models[place][1], self._job
        return list(model.read(sources, workers=job.readers, isolate=False, limits=job.limits))


def image_fields(data: bytes, size: Size, prepare: Prepare | None) -> JsonDict:
    """Fields of a row that an image's bytes tell: size, EXIF, and what `prepare` adds."""
    exif = read_exif(data)
    height, width = size
    fields: JsonDict = {"width": width, "height": height, "time": exif.time}
    fields |= {"latitude": exif.latitude, "longitude": exif.longitude}
    return fields | (prepare(data) if prepare else {})


def unit_rows(vectors: Floats32, space: VectorSpace, names: Sequence[str]) -> Floats32:
    """Vectors `[n, q * d]`, each of unit length; UsageError, with the image's name, for NaN and zero."""
    each = [name for name in names for _ in range(space.queries)]
    return unit_vectors(vectors.reshape(-1, space.dim), space.dim, "vectors", each).reshape(len(vectors), -1)
