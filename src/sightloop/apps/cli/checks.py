"""Checks of what a command line names (models, data, images), made before torch and a model are loaded."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import cast

from sightloop.checkpoints import catalog
from sightloop.errors import UnsupportedError, UsageError, similar_path
from sightloop.types import Failed, JsonDict, Skipped

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_HUB_URL = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True, slots=True)
class ImageInputs:
    """The inputs of a command, read up to the first image.

    Attributes:
        paths: Files, folders and globs, as on the command line.
        events: What precedes the first image: paths that do not exist, files that are skipped.
        images: The first image and all that follows; None if there is no image.
        videos: Whether there may be videos among them.
    """

    paths: Sequence[str]
    events: tuple[Skipped | Failed, ...]
    images: Iterator[str | Skipped | Failed] | None
    videos: bool = False


def read_ahead(paths: Sequence[str], *, videos: bool = False) -> ImageInputs:
    """Searches the images that `paths` name, up to the first one, which starts like an image.

    Args:
        paths: Files, folders and globs.
        videos: Whether videos are taken too.
    """
    from sightloop.annotation.inputs import find_images, not_an_image

    events: list[Skipped | Failed] = []
    inputs = find_images(paths, "image or video" if videos else "image")
    for item in inputs:
        reason = not_an_image(item) if isinstance(item, str) else ""
        if isinstance(item, str) and not reason:
            return ImageInputs(paths, tuple(events), chain([item], inputs), videos)
        events.append(Failed(item, reason) if isinstance(item, str) else item)
    return ImageInputs(paths, tuple(events), None, videos)


def check_capability(source: str | None, capability: str) -> None:
    """Checks a capability of a model that the catalog knows.

    Args:
        source: Hub id, folder or weights file; None for the bundled model, because none is named.
        capability: What it must be able to do: "caption".

    Raises:
        UnsupportedError: The model lacks the capability; the message names one that has it.
    """
    name = catalog.BUNDLED if source is None else source
    if name != catalog.BUNDLED and os.path.exists(name):
        return
    entry = catalog.find_entry(name)
    if entry is None or catalog.has_capability(entry.capabilities, capability):
        return
    bundled = ", the bundled model that is used without --model," if source is None else ""
    raise UnsupportedError(
        f"{entry.name}{bundled} cannot {capability} (it can: {', '.join(sorted(entry.capabilities))}). Name another "
        f"one, such as -m {catalog.recommended_for(capability).name}; `sightloop models --capability {capability}` "
        "lists them."
    )


def check_checkpoint(source: str) -> None:
    """Checks that a checkpoint's files exist. A hub model that is in the cache is left to the loader.

    Args:
        source: Hub id, folder or weights file.

    Raises:
        UsageError: `source` is a URL.
        CheckpointError: No such folder, file or hub model, or its files are incomplete.
    """
    if _URL.match(source):
        hub = _HUB_URL.match(source)
        remedy = f"name it as {hub[1]}" if hub else "download the files, and name their folder"
        raise UsageError(f"--model {source}: a URL is not loaded; {remedy}.")
    from sightloop.checkpoints.hub import is_cached, locate

    if not is_cached(source):
        locate(source)


def checkpoint_files(source: str) -> list[Path]:
    """The files of a checkpoint that decide what it computes: its weights, and the small files beside them."""
    from sightloop.checkpoints import hub

    files = hub.locate(source)
    small = (path for path in files.folder.iterdir() if path.suffix in (".json", ".txt", ".model"))
    return [*files.weights, *sorted(path for path in small if path not in files.weights)]


def check_adapter(folder: Path) -> None:
    """Raises `UsageError` unless the folder has the files of a LoRA adapter."""
    missing = [name for name in _ADAPTER_FILES if not (folder / name).is_file()]
    if missing:
        raise UsageError(
            f"--lora {folder}: it has no {' and no '.join(missing)}; name the folder of a LoRA adapter."
        )


def check_output_folder(option: str, folder: Path | None) -> None:
    """Raises `UsageError` if an output folder is a file, or cannot be made or written to."""
    if folder is None:
        return
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{option} {folder}: this is a file; name a folder.")
    existing = next((path for path in (folder, *folder.parents) if path.exists()), Path())
    if not existing.is_dir():
        raise UsageError(f"{option} {folder}: {existing} is a file; name another folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(
            f"{option} {folder}: the folder {existing} cannot be written to; name another folder."
        )


def fine_tuned_labels(source: str) -> bool:
    """Whether a checkpoint was fine-tuned on classes, by its configuration."""
    from sightloop.checkpoints import hub

    config = (hub.locate(source).config or {}).get("config")
    return isinstance(config, dict) and bool(cast("JsonDict", config).get("labels"))


def check_data(option: str, sources: Iterable[str]) -> None:
    """Checks the paths of datasets. Patterns with braces, and what the files contain, are left to `open_dataset`.

    Args:
        option: The option, for messages: "--data".
        sources: Paths, globs and brace ranges; "-" is standard input.

    Raises:
        UsageError: A source is a URL or does not exist, a glob matches nothing, or a folder is empty.
    """
    for source in sources:
        if _URL.match(source) or source.startswith("pipe:"):
            raise UsageError(
                f"{option} {source}: a URL is not read; download the files, and name their path."
            )
        if source == "-" or (_has_braces(source) and not os.path.lexists(source)):
            continue
        if not os.path.exists(source):
            if not glob.has_magic(source):
                raise UsageError(f"{option} {source}: no such file or folder{similar_path(source) or '.'}")
            if next(glob.iglob(source, recursive=True), None) is None:
                raise UsageError(f"{option} {source}: the pattern matches no file.")
        elif os.path.isdir(source) and not any(files for _, _, files in os.walk(source, followlinks=True)):
            raise UsageError(f"{option} {source}: the folder is empty.")


def check_texts(option: str, texts: Iterable[str]) -> None:
    """Raises `UsageError` for a text that is blank."""
    if any(not text.strip() for text in texts):
        raise UsageError(f"{option}: a text is empty; give words, in quotes.")


def _has_braces(name: str) -> bool:
    return re.search(r"\{[^{}]*(\.\.|,)[^{}]*\}", name) is not None
