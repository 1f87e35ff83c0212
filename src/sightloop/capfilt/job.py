"""Job of a CapFilt run: its shards, its models with their fingerprints, and the content of job.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from sightloop.capfilt.manifest import stored_job
from sightloop.capfilt.options import CapFiltOptions
from sightloop.capfilt.remote_captioner import RemoteCaptioner, is_address
from sightloop.capfilt.shard import Job
from sightloop.data.datasets.dataset import Dataset
from sightloop.errors import ImageError, UsageError
from sightloop.inference.fingerprint import fingerprint, preprocessing_digest
from sightloop.types import JsonDict, JsonMapping

# Options that may change between calls of one run: they have no effect on the output. "device" and "ranker" are
# stored as kind of device and as fingerprint.
_FREE_OPTIONS = ("engine", "workers", "batch_size", "readers", "isolate", "device", "devices", "ranker")

_MAX_NOTES = 5  # about input files that are left out


def open_job(
    dataset: Dataset, out: Path | None, models: tuple[str, str], options: CapFiltOptions
) -> tuple[Job, JsonDict]:
    """Prepares a job.

    Args:
        dataset: The input; no stream.
        out: The output folder, whose `group` and `threads` are taken over if the options leave them open; None for
            an estimate.
        models: Captioner and filter, as `load` takes them; the captioner may be an address.
        options: Options of the run.

    Returns:
        The job, and the content of job.json.

    Raises:
        UsageError: The dataset is a stream, or models, data and options do not fit together.
    """
    if dataset.is_stream:
        raise UsageError("a stream cannot be resumed; `sightloop convert` makes shards of it")
    stored = {} if out is None else stored_job(out).get("settings", {})
    # A run that is finished is answered without torch; `check_device` compares the device before more is processed.
    kind = (options.device == "auto" and stored.get("device")) or device_kind(options.device)
    options = replace(
        options,
        group=options.group or stored.get("group") or (8 if kind == "cpu" else 32),
        threads=options.threads or stored.get("threads") or _default_threads(),
    )
    sources = _sources(models, options)
    _check(dataset, options, sources)
    remote = {role: RemoteCaptioner(source) for role, source in sources.items() if is_address(source)}
    fingerprints = {
        role: remote[role].fingerprint if role in remote else fingerprint(source)
        for role, source in sources.items()
    }
    settings = {
        name: getattr(options, name) for name in CapFiltOptions.__slots__ if name not in _FREE_OPTIONS
    }
    data_fingerprint, source_fingerprints = dataset.fingerprints()
    settings |= {"device": kind, "data": data_fingerprint, **fingerprints}
    settings |= {
        f"{role}, prepared": preprocessing_digest(source)
        for role, source in sources.items()
        if role not in remote
    }
    names = {
        role: f"{remote[role].model}, elsewhere" if role in remote else source
        for role, source in sources.items()
    }
    job = Job(dataset, options, sources, fingerprints, _split(dataset, options.block), out or Path())
    about: JsonDict = {
        "sightloop": version("sightloop"),
        "torch": version("torch"),
        "models": names,
        "notes": _notes(fingerprints, dataset.notes),
        "settings": settings,
        "units": len(job.shards),
        "sources": source_fingerprints,
    }
    return job, about


def _sources(models: tuple[str, str], options: CapFiltOptions) -> dict[str, str]:
    """The models that the mode needs, by role: "captioner", "filter", "ranker"."""
    sources: dict[str, str] = {}
    if options.mode != "filter-only":
        sources["captioner"] = models[0]
    if options.mode != "captioner-only":
        sources["filter"] = models[1]
    if options.ranker is not None:
        sources["ranker"] = options.ranker
    return sources


def _check(dataset: Dataset, options: CapFiltOptions, sources: Mapping[str, str]) -> None:
    """Raises `UsageError` if models, data and options do not fit together."""
    if any(is_address(sources.get(role, "")) for role in ("filter", "ranker")):
        raise UsageError(
            "filter and ranker must be models that `load` reads; only a captioner may be an address"
        )
    if is_address(sources.get("captioner", "")) and options.task == "dialogue":
        raise UsageError("task='dialogue': the captioner must be a model that `load` reads")
    if is_address(sources.get("captioner", "")) and options.num_beams > 1:
        raise UsageError(f"num_beams={options.num_beams}: a remote captioner samples its texts")
    start = 0
    for count in dataset.source_lengths if options.by_reference else ():
        with suppress(ImageError):
            if count and isinstance(dataset[start].image, bytes):
                raise UsageError(
                    f"by_reference: the images of {dataset.source_name(start)} are stored inside it; copy them"
                )
        start += count


def _notes(fingerprints: Mapping[str, str], dataset_notes: Sequence[str]) -> list[str]:
    notes = list(dataset_notes[:_MAX_NOTES])
    if len(dataset_notes) > _MAX_NOTES:
        notes.append(f"{len(dataset_notes) - _MAX_NOTES:,} more sources like these")
    if fingerprints.get("captioner") is not None and fingerprints["captioner"] == fingerprints.get("filter"):
        notes.append(
            "captioner and filter have the same weights: such a filter accepts more of the captioner's mistakes "
            "(Li et al. 2022, table 4: it drops 8 %, with separate weights 25 %); fine-tune two from one model"
        )
    return notes


def _split(dataset: Dataset, block: int) -> list[tuple[int, int]]:
    """(start, stop) of each output shard: at most `block` samples, all of one input shard.

    Input shards of 5 and 3 samples, block 4: [(0, 4), (4, 5), (5, 8)].
    """
    ranges: list[tuple[int, int]] = []
    start = 0
    for count in dataset.source_lengths:
        ranges += [(low, min(low + block, start + count)) for low in range(start, start + count, block)]
        start += count
    return ranges


def check_device(job: Job, about: JsonMapping) -> None:
    """Raises `UsageError` if device "auto" is of another kind here than where the run began."""
    began, here = about["settings"]["device"], device_kind(job.options.device)
    if here != began:
        raise UsageError(
            f"{job.out} holds a bootstrap with other settings (device: {began}, now {here}): use --device {began}, or "
            "name another --out"
        )


def _default_threads() -> int:
    import torch

    return torch.get_num_threads()


def device_kind(device: str) -> str:
    """Kind of a device: "cuda" for "cuda:1"; for "auto", the best that this machine has."""
    from sightloop.inference.load import choose_device  # imports torch

    return choose_device(device).type if device == "auto" else device.partition(":")[0]
