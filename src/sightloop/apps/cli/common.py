"""What the commands over images share: loading the model, listing images, running one verb over them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from cyclopts import Parameter

from sightloop.apps.cli.checks import ImageInputs, check_adapter, check_capability, check_checkpoint
from sightloop.apps.cli.options import DeviceListOptions, Dtype, RuntimeOptions
from sightloop.apps.cli.output import (
    OutputTable,
    ProgressReporter,
    is_interactive,
    print_bundled_notice,
    print_detail,
    print_message,
    say_if_slow,
)
from sightloop.checkpoints.catalog import has_capability
from sightloop.errors import UnsupportedError
from sightloop.types import Bits, Done, Failed, JsonDict, Pixels, Skipped

if TYPE_CHECKING:
    from sightloop.annotation.runner import ImageReader, LoaderConfig
    from sightloop.apps.cli.device_pool import DevicePool
    from sightloop.inference.model import Model

T = TypeVar("T")

_MIN_WEIGHTS_OF_HINT = 50_000_000  # below, a model is fast anyway

Paths = Annotated[
    str, Parameter(name="PATHS", required=True, help="Image files, folders (searched recursively) and globs.")
]


def prepare_threads() -> None:
    """Stops idle OpenMP threads from spinning, to leave the cores to image decoding. Call before importing torch.

    GNU OpenMP reads GOMP_SPINCOUNT when torch is imported; by default its threads spin for milliseconds after every
    matrix product.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def load(
    source: str,
    *,
    device: str,
    dtype: Dtype,
    quantize: Bits | None = None,
    lora: Path | None = None,
) -> Model:
    """`sightloop.load`, imported on the first call."""
    prepare_threads()
    from sightloop.inference.load import load

    return load(source, device=device, dtype=dtype, quantize=quantize, lora=lora)


def check_model(capability: str, runtime: RuntimeOptions) -> None:
    """Checks the options, and that the model exists and has a capability, before anything is loaded.

    Args:
        capability: What the model must be able to do: "caption".
        runtime: The options.

    Raises:
        UsageError: An option has a bad value.
        CheckpointError: There is no such model.
        UnsupportedError: The model is known to lack the capability.
    """
    runtime.check()
    if runtime.lora is not None:
        check_adapter(runtime.lora)
    check_capability(runtime.model, capability)
    check_checkpoint(runtime.source)


def start_reading() -> None:
    """Starts the process that decodes the first image, while the model is loaded. For commands that read images."""
    from sightloop.data.images.reader import start_early

    start_early()


def model_for(capability: str, runtime: RuntimeOptions, source: str | None = None) -> Model:
    """The model that the options name, checked for a capability.

    Prints a notice if the bundled model is used because none was named.

    Args:
        capability: What the model must be able to do: "caption".
        runtime: The options.
        source: Another model than that of the options, such as the ITM model of `caption`. It is not quantized, and
            gets no LoRA adapter.

    Raises:
        UnsupportedError: The model lacks the capability.
    """
    start = time.monotonic()
    name, is_main = source or runtime.source, source is None
    with say_if_slow(f"loading {name} ..."):
        model = load(
            name,
            device=runtime.device,
            dtype=runtime.dtype,
            quantize=runtime.quantize if is_main else None,
            lora=runtime.lora if is_main else None,
        )
    require_capability(model, capability)
    print_detail(f"{model.name}: loaded in {time.monotonic() - start:.1f} s")
    if source is None and runtime.model is None:
        print_bundled_notice(capability)
    if is_main:
        print_gain_of_auto(model, runtime)
    if runtime.batch_size is not None:
        model.batch_size = runtime.batch_size
    return model


def print_gain_of_auto(model: Model, runtime: RuntimeOptions) -> None:
    """Prints what --dtype auto would gain over float32: one line, on a terminal, for a model that is not small."""
    if runtime.dtype != "float32" or runtime.quantize is not None or not is_interactive():
        return
    if sum(weight.numel() for weight in model.module.parameters()) < _MIN_WEIGHTS_OF_HINT:
        return
    from sightloop.inference.load import gain_of_auto

    if gain := gain_of_auto(model):
        print_message(f"float32, the default, is exact; --dtype auto would use {gain}.")


def models_for(
    stack: ExitStack, capability: str, runtime: DeviceListOptions, source: str | None = None
) -> Model | DevicePool:
    """`model_for`, or with --devices a copy of the model on each device, until `stack` is closed."""
    devices = runtime.names()
    if not devices:
        return model_for(capability, runtime, source)
    prepare_threads()
    start, name, is_main = time.monotonic(), source or runtime.source, source is None
    with say_if_slow(f"loading {name} on {', '.join(devices)} ..."):
        from sightloop.apps.cli.device_pool import DevicePool

        options: JsonDict = {"dtype": runtime.dtype}
        if is_main:
            options |= {"quantize": runtime.quantize, "lora": runtime.lora}
        pool = stack.enter_context(DevicePool(name, devices, runtime.batch_size, **options))
    require_capability(pool, capability)
    print_detail(f"{pool.name}: loaded on {', '.join(devices)} in {time.monotonic() - start:.1f} s")
    if is_main and runtime.model is None:
        print_bundled_notice(capability)
    return pool


def require_capability(model: Model | DevicePool, capability: str) -> None:
    """Raises `UnsupportedError`, with the command that lists capable models, if the model lacks the capability."""
    if not has_capability(model.capabilities, capability):
        available = ", ".join(sorted(model.capabilities))
        raise UnsupportedError(
            f"{model.name} cannot {capability} (it can: {available}). `sightloop models --capability {capability}` "
            "lists models that can."
        )


def list_images(paths: Sequence[str], *, videos: bool = False) -> Iterator[str | Skipped | Failed]:
    """The images, or images and videos, that paths, folders and globs name, one by one."""
    from sightloop.annotation.inputs import find_images

    return find_images(paths, "image or video" if videos else "image")


def loader_config(
    runtime: RuntimeOptions, model: Model | DevicePool, *, videos: bool = False
) -> LoaderConfig:
    """Batch size, workers and limits for loading the model's images, or images and videos."""
    from sightloop.annotation.runner import LoaderConfig
    from sightloop.types import Limits

    return LoaderConfig(
        model.sizer,
        runtime.workers,
        limits=Limits(max_pixels=runtime.max_pixels),
        parallel=getattr(model, "parallel", 1),
        videos=videos,
    )


def report_without_images(activity: str, inputs: ImageInputs) -> int:
    """Reports why there is no image to process; the exit status, 1."""
    with ProgressReporter(activity, OutputTable([])) as progress:
        for event in inputs.events:
            progress.event(event)
    return 1


def run_verb(
    progress: ProgressReporter,
    runtime: RuntimeOptions,
    model: Model | DevicePool,
    inputs: ImageInputs,
    verb: Callable[[list[Pixels]], Sequence[T]],
    note_skipped: Callable[[str], None] | None = None,
    reader: ImageReader | None = None,
) -> Iterator[Done[T]]:
    """Applies a verb to every image, reports each event, and yields those of images that are done.

    Args:
        progress: Reports every event.
        runtime: Options for loading images.
        model: Preprocesses the images.
        inputs: The images.
        verb: Called with one batch of images; returns one value per image.
        note_skipped: Called with the name of each image that is skipped.
        reader: Preprocesses the images in place of the model.

    Yields:
        The name and value of each image that was read, in the order of the paths.
    """
    from sightloop.annotation import runner

    progress.count_ahead(lambda: sum(1 for _ in list_images(inputs.paths, videos=inputs.videos)))
    images = chain(inputs.events, inputs.images or ())
    with closing(
        runner.run([reader or model], images, verb, loader_config(runtime, model, videos=inputs.videos))
    ) as events:
        for event in events:
            progress.event(event)
            if isinstance(event, Done):
                yield event
            elif isinstance(event, Skipped) and note_skipped is not None:
                note_skipped(event.name)
