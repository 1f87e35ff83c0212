"""The command `sightloop models`: the catalog of known checkpoints."""

from __future__ import annotations

import sys
from dataclasses import asdict
from itertools import groupby
from typing import Annotated

from cyclopts import Parameter

from sightloop.apps.cli.output import Column, OutputTable
from sightloop.checkpoints import catalog
from sightloop.errors import UsageError

_COLUMNS = [Column(key) for key in ("model", "capabilities", "pixels", "parameters", "memory", "license")]


def models(
    *,
    capability: Annotated[str | None, Parameter(metavar="NAME")] = None,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> int:
    """List the known models: capabilities, image size, parameters, memory, license, and which one to start with.

    Args:
        capability: List only models with this capability (caption, detect, ...), the recommended one first, with their
            published metrics. Default: all models.
        json: Print one JSON object per line instead of a table.
    """
    if capability not in (None, "ask", *catalog.CAPABILITIES):
        raise UsageError(f"--capability {capability}: must be one of {', '.join(catalog.CAPABILITIES)}.")
    show_models("answer" if capability == "ask" else capability, as_json=json)
    return 0


def show_models(capability: str | None, *, as_json: bool) -> None:
    """Prints the catalog, or only the models with a capability, the recommended one first."""
    if capability is None:
        entries = list(catalog.CATALOG)
    else:
        matches = (catalog.find(name) for name in catalog.who_can(capability))
        entries = [entry for entry in matches if entry is not None]
    if sys.stdout.isatty() and not as_json:
        _show_on_terminal(entries, capability)
        return
    rows = OutputTable(_COLUMNS, as_json=as_json)
    for entry in entries:
        if as_json:
            recommended_for = [key for key, name in catalog.RECOMMENDED.items() if name == entry.name]
            derived = {"memory_mb": entry.memory_mb, "where": entry.where, "recommended_for": recommended_for}
            rows.row(asdict(entry) | derived)
            continue
        cells = (entry.name, " ".join(entry.capabilities), entry.image_size, f"{entry.parameters:.1f} M")
        cells = (*cells, f"{entry.memory_mb} MB", entry.license)
        rows.row({column.key: cell for column, cell in zip(_COLUMNS, cells, strict=True)})


def _show_on_terminal(entries: list[catalog.CatalogEntry], capability: str | None) -> None:
    width = max(len(entry.name) for entry in entries)
    for capabilities, group in groupby(entries, key=lambda entry: entry.capabilities):
        print(f"Can {', '.join(capabilities)}:")
        for entry in group:
            memory = f"{entry.memory_mb / 1000:.1f} GB" if entry.memory_mb > 99 else f"{entry.memory_mb} MB"
            size = f"{entry.image_size:3} px {entry.parameters:5.0f} M {memory:>7}"
            note = f" (training data); {entry.where}, no download" if entry.name == catalog.BUNDLED else ""
            print(f"  {entry.name:<{width}} {size}  {entry.license}{note}")
            for figure in entry.quality if capability is not None else ():
                print(f"      {figure}")
        print()
    print(
        "px: side of the image in pixels. M: parameters in millions. GB: weights in float32; half of it in bfloat16."
    )
    print("The process itself and the images need more memory on top.\n")
    print("Which one to start with:")
    for name, description in catalog.CAPABILITIES.items():
        if capability in (None, name):
            print(f"  {name:<10} {catalog.recommended_for(name).name}")
            print(f"  {'':<10} {description}")


COMMANDS = {models: "Examples:\n  sightloop models\n  sightloop models --capability caption --json"}
