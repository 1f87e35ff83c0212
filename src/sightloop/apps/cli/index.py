"""The command `sightloop index`: builds and updates an index over images."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from sightloop.apps.cli.checks import check_capability, check_checkpoint
from sightloop.apps.cli.common import model_for
from sightloop.apps.cli.options import RuntimeOptions
from sightloop.apps.cli.output import RESUME_HINT, OutputTable, ProgressReporter, print_message
from sightloop.errors import UsageError
from sightloop.types import Done, Limits

if TYPE_CHECKING:
    from sightloop.search.index import BuildOptions, Index

_RUNTIME = RuntimeOptions()
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


_READING = ReadingOptions()


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
    runtime: RuntimeOptions = _RUNTIME,
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
    if add_model and runtime.model is None:
        raise UsageError("--add-model: name the model to add with --model.")
    _check_models({"embed": runtime.model, "match": judge, "read": reading.read_text})
    opened = _opened(store, vectors, runtime, add_model)
    if judge is not None:
        opened.remember(judge=judge)
    counts: Counter[str] = Counter()
    reader = None if reading.read_text is None else model_for("read", runtime, reading.read_text)
    events = opened.build(images, prune=prune, reader=reader, options=_options(runtime, reading.keyframes))
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
    store: str, vectors: Literal["float16", "float32"], runtime: RuntimeOptions, add_model: bool
) -> Index:
    """The index with the model of the options, made where there is none."""
    from sightloop.search.index import Index, is_index, open_index

    if not is_index(store):
        if add_model:
            raise UsageError(f"--add-model: there is no index {store}; make it without --add-model first.")
        return Index.create(store, model=model_for("embed", runtime), dtype=vectors)
    opened = open_index(store)
    if runtime.model is None:
        space = opened.info.space()
        if space.probe:
            opened.use_model(model_for("embed", runtime, space.model))
    elif add_model:
        opened.add_model(model_for("embed", runtime), vectors)
    else:
        opened.use_model(model_for("embed", runtime))
    return opened


def _options(runtime: RuntimeOptions, keyframes_only: bool) -> BuildOptions:
    from sightloop.search.index import BuildOptions

    limits = Limits(max_pixels=runtime.max_pixels)
    return BuildOptions(
        workers=runtime.workers, limits=limits, keyframes_only=keyframes_only, warn=print_message
    )


COMMANDS = {
    index: (
        "Examples:\n"
        "  sightloop index photos --store photos.index\n"
        "  sightloop index photos shards/*.tar --store photos.index -m openai/clip-vit-base-patch32 --prune\n"
        "  sightloop search photos.index 'a red car'"
    )
}
