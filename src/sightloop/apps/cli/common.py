"""What the commands over images share: loading the model, listing images, running one verb over them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, TypeVar

from cyclopts import Parameter

from sightloop.apps.cli.options import Dtype, RuntimeOptions
from sightloop.apps.cli.output import ProgressReporter, print_bundled_notice
from sightloop.errors import UnsupportedError
from sightloop.types import Bits, Done, Failed, Pixels, Skipped

if TYPE_CHECKING:
    from sightloop.annotation.runner import LoaderConfig
    from sightloop.inference.model import Model

T = TypeVar("T")

Paths = Annotated[
    str, Parameter(name="PATHS", required=True, help="Image files, folders (searched recursively) and globs.")
]


def prepare_threads() -> None:
    """Stops idle OpenMP threads from spinning, to leave the cores to image decoding. Call before importing torch.

    GNU OpenMP reads GOMP_SPINCOUNT when torch is imported; by default its threads spin for milliseconds after every
    matrix product.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def load(source: str, *, device: str, dtype: Dtype, quantize: Bits | None = None) -> Model:
    """`sightloop.load`, imported on the first call."""
    prepare_threads()
    from sightloop.inference.load import load

    return load(source, device=device, dtype=dtype, quantize=quantize)


def model_for(capability: str, runtime: RuntimeOptions, source: str | None = None) -> Model:
    """The model that the options name, checked for a capability.

    Prints a notice if the bundled model is used because none was named.

    Args:
        capability: What the model must be able to do: "caption".
        runtime: The options.
        source: Another model than that of the options, such as the ITM model of `caption`. It is not quantized.

    Raises:
        UnsupportedError: The model lacks the capability.
    """
    quantize = runtime.quantize if source is None else None
    model = load(source or runtime.source, device=runtime.device, dtype=runtime.dtype, quantize=quantize)
    require_capability(model, capability)
    if source is None and runtime.model is None:
        print_bundled_notice(capability)
    if runtime.batch_size is not None:
        model.batch_size = runtime.batch_size
    return model


def require_capability(model: Model, capability: str) -> None:
    """Raises `UnsupportedError`, with the command that lists capable models, if the model lacks the capability."""
    if capability not in model.capabilities:
        available = ", ".join(sorted(model.capabilities))
        raise UnsupportedError(
            f"{model.name} cannot {capability} (it can: {available}). `sightloop models --capability {capability}` "
            "lists models that can."
        )


def list_images(paths: Sequence[str]) -> Iterator[str | Skipped | Failed]:
    """The images that paths, folders and globs name, one by one."""
    from sightloop.annotation.inputs import find_images

    return find_images(paths)


def loader_config(runtime: RuntimeOptions, model: Model) -> LoaderConfig:
    """Batch size, workers and limits for loading the model's images."""
    from sightloop.annotation.runner import LoaderConfig
    from sightloop.types import Limits

    return LoaderConfig(model.batch_size, runtime.workers, limits=Limits(max_pixels=runtime.max_pixels))


def run_verb(
    progress: ProgressReporter,
    runtime: RuntimeOptions,
    model: Model,
    paths: Sequence[str],
    verb: Callable[[list[Pixels]], Sequence[T]],
) -> Iterator[Done[T]]:
    """Applies a verb to every image of the paths, reports each event, and yields those of images that are done.

    Args:
        progress: Reports every event.
        runtime: Options for loading images.
        model: Preprocesses the images.
        paths: Files, folders and globs.
        verb: Called with one batch of images; returns one value per image.

    Yields:
        The name and value of each image that was read, in the order of the paths.
    """
    from sightloop.annotation import runner

    progress.count_ahead(lambda: sum(1 for _ in list_images(paths)))
    with closing(runner.run([model], list_images(paths), verb, loader_config(runtime, model))) as events:
        for event in events:
            progress.event(event)
            if isinstance(event, Done):
                yield event
