"""The job of a bootstrap: its settings, its units of work, what it says about its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from sightloop.capfilt.manifest import stored_job
from sightloop.capfilt.options import CapFiltOptions
from sightloop.capfilt.remote_captioner import RemoteCaptioner, is_address
from sightloop.capfilt.shard import Job
from sightloop.data.datasets.dataset import Dataset
from sightloop.errors import ImageError, UsageError
from sightloop.inference.fingerprint import fingerprint, preprocessing_digest
from sightloop.types import JsonDict

# What may differ from call to call of one job.
_FREE = ("engine", "workers", "batch_size", "readers", "isolate", "device", "ranker")


_NOTES = 5  # on what the data holds that is left out


def open_job(
    dataset: Dataset, out: Path | None, models: tuple[str, str], options: CapFiltOptions
) -> tuple[Job, JsonDict]:
    """The job, and what job.json says about it."""
    if dataset.is_stream:
        raise UsageError("a stream has no parts to go on from; `sightloop convert` makes shards of it")
    stored = {} if out is None else stored_job(out).get("settings", {})
    kind = device_kind(options.device)
    options = replace(
        options,
        group=options.group or stored.get("group") or (8 if kind == "cpu" else 32),
        threads=options.threads or stored.get("threads") or torch.get_num_threads(),
    )
    parts: dict[str, str] = {}
    if options.mode != "filter-only":
        parts["captioner"] = models[0]
    if options.mode != "captioner-only":
        parts["filter"] = models[1]
    if options.ranker is not None:
        parts["ranker"] = options.ranker
    _check(dataset, options, parts)
    remote = {part: RemoteCaptioner(source) for part, source in parts.items() if is_address(source)}
    stamps = {part: remote[part].stamp if part in remote else fingerprint(parts[part]) for part in parts}
    settings = {name: getattr(options, name) for name in CapFiltOptions.__slots__ if name not in _FREE}
    whole, sources = dataset.fingerprints()
    settings |= {"device": kind, "data": whole, **stamps}
    settings |= {
        f"{part}, prepared": preprocessing_digest(parts[part]) for part in parts if part not in remote
    }
    told = {part: f"{remote[part].model}, elsewhere" if part in remote else parts[part] for part in parts}
    about = {"sightloop": version("sightloop"), "torch": str(torch.__version__), "models": told}
    job = Job(dataset, options, parts, stamps, _units(dataset, options.block), out or Path())
    about |= {
        "notes": _notes(stamps, dataset.notes),
        "settings": settings,
        "units": len(job.shards),
        "sources": sources,
    }
    return job, about


def _check(dataset: Dataset, options: CapFiltOptions, parts: Mapping[str, str]) -> None:
    """What the models and the data together forbid."""
    if any(is_address(parts.get(part, "")) for part in ("filter", "ranker")):
        raise UsageError(
            "a filter or ranker must be a model that `load` reads; a captioner alone may be elsewhere"
        )
    if is_address(parts.get("captioner", "")) and options.num_beams > 1:
        raise UsageError(f"num_beams={options.num_beams}: a captioner elsewhere draws its texts")
    start = 0
    for count in dataset.source_lengths if options.by_reference else ():
        with suppress(ImageError):
            if count and isinstance(dataset[start].image, bytes):
                raise UsageError(
                    f"by_reference: the images of {dataset.source_name(start)} lie inside it; copy them"
                )
        start += count


def _notes(stamps: Mapping[str, str], left_out: Sequence[str]) -> list[str]:
    more = [f"{len(left_out) - _NOTES:,} more sources like these"] if len(left_out) > _NOTES else []
    notes = [*left_out[:_NOTES], *more]
    if stamps.get("captioner") is None or stamps["captioner"] != stamps.get("filter"):
        return notes
    return [
        *notes,
        "captioner and filter have the same weights: such a filter takes more of the captioner's mistakes for right "
        "(Li et al. 2022, table 4: 8 % dropped, with separate weights 25 %); fine-tune two from one model",
    ]


def _units(dataset: Dataset, block: int) -> list[tuple[int, int]]:
    """Blocks of records in order; none reaches over the end of a source."""
    units: list[tuple[int, int]] = []
    start = 0
    for count in dataset.source_lengths:
        units += [(low, min(low + block, start + count)) for low in range(start, start + count, block)]
        start += count
    return units


def device_kind(device: str) -> str:
    """The kind of a device: "cuda" of "cuda:1"."""
    if device != "auto":
        return device.partition(":")[0]
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
