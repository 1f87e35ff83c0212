"""The command `sightloop index`: builds and updates an index over images."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from sightloop.apps.cli.checks import check_capability, check_checkpoint
from sightloop.apps.cli.common import model_for
from sightloop.apps.cli.options import IndexRuntimeOptions
from sightloop.apps.cli.output import RESUME_HINT, OutputTable, ProgressReporter, print_message, say_if_slow
from sightloop.errors import UsageError
from sightloop.types import Done, Limits

if TYPE_CHECKING:
    from sightloop.search.index import BuildOptions, Index, Spread

DEFAULT_STORE = "sightloop-index"
_ACTIONS = ("added", "changed", "moved", "updated", "read", "removed")


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingOptions:
    """What is read besides the images themselves."""

    read_text: Annotated[str | None, Parameter(metavar="MODEL")] = None
    """Model that reads the texts in images (OCR), which keywords then find, such as
    florence-community/Florence-2-base-ft. Every image of the index is read once. Default: not read."""

    keyframes: Annotated[bool, Parameter(negative=(), show_default=False)] = False
    """Look at keyframes of videos alone: many times faster, and scenes begin at keyframes."""


_READING, _RUNTIME = ReadingOptions(), IndexRuntimeOptions()


def index(
    *images: Annotated[
        str,
        Parameter(
            name="IMAGES",
            required=True,
            help="Folders (searched recursively), image files, videos, globs and datasets.",
        ),
    ],
    store: Annotated[str, Parameter(metavar="PATH")] = DEFAULT_STORE,
    prune: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    add_model: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    vectors: Literal["float16", "float32"] = "float16",
    judge: Annotated[str | None, Parameter(metavar="MODEL")] = None,
    reading: ReadingOptions = _READING,
    runtime: IndexRuntimeOptions = _RUNTIME,
) -> int:
    """Build an index over images for `sightloop search`, or update it: only new and changed images are embedded.

    Videos are indexed scene by scene. Files are told by path, size and time, then by content: one that was moved keeps
    its entry. Captions, labels and regions come from sidecars and datasets. The work is saved batch by batch; after an
    interruption, run the same command again.

    Args:
        store: Folder of the index, or qdrant://host:port/collection.
        prune: Remove entries below IMAGES whose files are gone.
        add_model: Add the vectors of a second --model to the index; without this another model is refused.
        vectors: Precision of the vectors in a new index.
        judge: Model with an ITM head that `search --rerank` uses. Default: the model itself, if it has one.
    """
    runtime.check()
    runtime.names()
    if add_model and runtime.model is None:
        raise UsageError("--add-model: name the model to add with --model.")
    _check_models({"embed": runtime.model, "match": judge, "read": reading.read_text})
    here = _on_this_machine(runtime)
    opened, name = _opened(store, vectors, here, add_model)
    if judge is not None:
        opened.remember(judge=judge)
    counts: Counter[str] = Counter()
    reader = None if reading.read_text is None else model_for("read", here, reading.read_text)
    options = _options(runtime, reading.keyframes, _spread(runtime, name))
    events = opened.build(images, prune=prune, reader=reader, options=options)
    table = OutputTable([], as_json=runtime.json)
    with ProgressReporter("indexing", table, RESUME_HINT) as progress, closing(events):
        for event in events:
            progress.event(event)
            if isinstance(event, Done):
                counts[event.value.action] += 1
                if runtime.json:
                    progress.row({"id": event.value.id, "name": event.name, "action": event.value.action})
    done = (
        ", ".join(f"{counts[action]:,} {action}" for action in _ACTIONS if counts[action]) or "nothing to do"
    )
    print_message(f"{store}: {len(opened):,} images; {done}.")
    return progress.status


def _check_models(sources: dict[str, str | None]) -> None:
    """Checks the model for each capability; without a name, that of "embed" is the bundled one."""
    for capability, source in sources.items():
        if source is not None:
            check_checkpoint(source)
        if source is not None or capability == "embed":
            check_capability(source, capability)


def _opened(
    store: str, vectors: Literal["float16", "float32"], runtime: IndexRuntimeOptions, add_model: bool
) -> tuple[Index, str]:
    """The index with the model of the options, made where there is none; and the model's name, "" without one."""
    from sightloop.search.index import Index, is_index, open_index

    if not is_index(store):
        if add_model:
            raise UsageError(f"--add-model: there is no index {store}; make it without --add-model first.")
        model = model_for("embed", runtime)
        return Index.create(store, model=model, dtype=vectors), model.name
    opened = open_index(store)
    space = opened.info.space()
    if runtime.model is None and not space.probe:
        return opened, ""
    model = model_for("embed", runtime, space.model if runtime.model is None else None)
    if add_model:
        opened.add_model(model, vectors)
    else:
        opened.use_model(model)
    return opened, model.name


def _on_this_machine(runtime: IndexRuntimeOptions) -> IndexRuntimeOptions:
    """The options for this process; with Ray, which is started here, actors may have devices that it lacks."""
    if runtime.engine != "ray":
        return runtime
    from sightloop.workers.ray_actors import start_ray

    with say_if_slow("starting Ray ..."):
        start_ray()  # before LanceDB, which is not made for forks
    return replace(runtime, device="auto")


def _spread(runtime: IndexRuntimeOptions, name: str) -> Spread | None:
    """The workers that embed; None for this process."""
    from sightloop.search.index import Spread

    if runtime.engine == "local" and runtime.copies == 1 and not runtime.names():
        return None
    own = {"dtype": runtime.dtype, "quantize": runtime.quantize, "lora": runtime.lora}
    return Spread(
        runtime.engine, runtime.copies, runtime.device, runtime.names(), {name: own}, runtime.batch_size
    )


def _options(runtime: IndexRuntimeOptions, keyframes_only: bool, spread: Spread | None) -> BuildOptions:
    from sightloop.search.index import BuildOptions

    limits = Limits(max_pixels=runtime.max_pixels)
    return BuildOptions(
        workers=runtime.workers,
        limits=limits,
        keyframes_only=keyframes_only,
        warn=print_message,
        spread=spread,
    )


COMMANDS = {
    index: (
        "Examples:\n"
        "  sightloop index photos --store photos.index\n"
        "  sightloop index photos shards/*.tar --store photos.index -m openai/clip-vit-base-patch32 --prune\n"
        "  sightloop search photos.index 'a red car'"
    )
}
