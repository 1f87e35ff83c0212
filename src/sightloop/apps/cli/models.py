"""The list of known models, and which one to pick for which job."""

from __future__ import annotations

import sys
from dataclasses import asdict
from itertools import groupby
from typing import Annotated

from cyclopts import Parameter

from sightloop.apps.cli.output import Column, OutputTable
from sightloop.checkpoints import catalog
from sightloop.errors import UsageError

_COLUMNS = [Column(key) for key in ("model", "can do", "pixels", "parameters", "memory", "licence")]


def show_models(job: str | None, *, as_json: bool) -> None:
    """Prints what the catalogue knows; only what can do `job` where one is given, the recommended one first."""
    if job is None:
        entries = list(catalog.CATALOG)
    else:
        found = (catalog.find_entry(name) for name in catalog.models_for(job))
        entries = [entry for entry in found if entry is not None]
    if sys.stdout.isatty() and not as_json:
        _show_to_people(entries, job)
        return
    rows = OutputTable(_COLUMNS, as_json=as_json)
    for entry in entries:
        if as_json:
            picks = [name for name, pick in catalog.RECOMMENDED.items() if pick == entry.name]
            rows.row(asdict(entry) | {"memory_mb": entry.memory_mb, "where": entry.where, "pick_for": picks})
            continue
        cells = (entry.name, " ".join(entry.capabilities), entry.image_size, f"{entry.parameters:.1f} M")
        cells = (*cells, f"{entry.memory_mb} MB", entry.licence)
        rows.row({column.key: cell for column, cell in zip(_COLUMNS, cells, strict=True)})


def _show_to_people(entries: list[catalog.CatalogEntry], job: str | None) -> None:
    width = max(len(entry.name) for entry in entries)
    for jobs, alike in groupby(entries, key=lambda entry: entry.capabilities):
        print(f"Can {', '.join(jobs)}:")
        for entry in alike:
            memory = f"{entry.memory_mb / 1000:.1f} GB" if entry.memory_mb > 99 else f"{entry.memory_mb} MB"
            size = f"{entry.image_size:3} px {entry.parameters:5.0f} M {memory:>7}"
            note = f" (training data); {entry.where}, no download" if entry.name == catalog.BUNDLED else ""
            print(f"  {entry.name:<{width}} {size}  {entry.licence}{note}")
            for figure in entry.quality if job is not None else ():
                print(f"      {figure}")
        print()
    print("px: side of the image. M: parameters in millions. GB: memory of the weights in float32,")
    print("half of that in bfloat16; the program and the images at work come on top.\n")
    print("Which one to start with:")
    for name, what in catalog.CAPABILITIES.items():
        if job in (None, name):
            print(f"  {name:<10} {catalog.recommended_for(name).name}")
            print(f"  {'':<10} {what}")


def models(
    *,
    job: Annotated[str | None, Parameter(metavar="VERB")] = None,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> int:
    """List the known models: what each can do, its size, licence and memory, and which to pick for which job.

    Parameters
    ----------
    job
        Only the models for this verb (caption, detect, ...): the one to start with first, with the figures that are
        published for them.
    json
        Print one JSON object a line instead of a table.
    """
    if job not in (None, "ask", *catalog.CAPABILITIES):
        raise UsageError(f"--job {job}: must be one of {', '.join(catalog.CAPABILITIES)}.")
    show_models("answer" if job == "ask" else job, as_json=json)
    return 0


COMMANDS = {models: "Examples:\n  sightloop models\n  sightloop models --job caption --json"}
