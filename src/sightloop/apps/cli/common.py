"""One verb over the images that a command names: the model, what it reads, every input accounted for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from sightloop.apps.cli.options import Dtype, MachineOptions
from sightloop.apps.cli.output import Screen, say_bundled
from sightloop.errors import UnsupportedError
from sightloop.types import Bits, Done, Failed, Skipped

if TYPE_CHECKING:
    from sightloop.annotation.runner import LoaderConfig
    from sightloop.inference.load import Model

Paths = Annotated[
    str, Parameter(name="PATHS", required=True, help="Files, folders (with all folders in them) and globs.")
]


def load(source: str, *, device: str, dtype: Dtype, quantize: Bits | None = None) -> Model:
    """`sightloop.load`, brought in by the first command that needs it."""
    # Images are decoded beside the model: threads of its matrix products that wait for each other must not burn the
    # cores meanwhile. GNU OpenMP reads this when torch is imported, and spins for milliseconds without it.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from sightloop.inference.load import load

    return load(source, device=device, dtype=dtype, quantize=quantize)


def model_for(capability: str, machine: MachineOptions, source: str | None = None) -> Model:
    """The model that the options name, or `source`; says so where it is the bundled one because none was named."""
    few = machine.quantize if source is None else None  # a judge is another model
    model = load(source or machine.source, device=machine.device, dtype=machine.dtype, quantize=few)
    require(model, capability)
    if source is None and machine.model is None:
        say_bundled(capability)
    if machine.batch_size is not None:
        model.batch_size = machine.batch_size
    return model


def require(model: Model, capability: str) -> None:
    """Raises UnsupportedError, with how to find models that can, for one that cannot."""
    if capability not in model.capabilities:
        able = ", ".join(sorted(model.capabilities))
        raise UnsupportedError(
            f"{model.name} cannot {capability} (it can: {able}). `sightloop models --job {capability}` lists models "
            "that can."
        )


def inputs(paths: Sequence[str]) -> Iterator[str | Skipped | Failed]:
    """The images that paths name."""
    from sightloop.annotation.inputs import find_images

    return find_images(paths)


def reading(machine: MachineOptions, model: Model) -> LoaderConfig:
    """How images are read beside the model."""
    from sightloop.annotation.runner import LoaderConfig
    from sightloop.types import Limits

    return LoaderConfig(model.batch_size, machine.workers, limits=Limits(max_pixels=machine.max_pixels))


def run(
    screen: Screen, machine: MachineOptions, model: Model, paths: Sequence[str], verb: Any
) -> Iterator[Done[Any]]:
    """Runs the verb over what the paths name, counts every event and yields those that are done."""
    from sightloop.annotation import runner

    screen.count_ahead(lambda: sum(1 for _ in inputs(paths)))
    with closing(runner.run([model], inputs(paths), verb, reading(machine, model))) as events:
        for event in events:
            screen.event(event)
            if isinstance(event, Done):
                yield event
