"""The command `sightloop bootstrap`: captioning and filtering of a dataset (CapFilt)."""

from __future__ import annotations

import json as jsonlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from sightloop.apps.cli.checks import check_capability, check_checkpoint, check_data, check_output_folder
from sightloop.apps.cli.common import prepare_threads
from sightloop.apps.cli.options import (
    BatchSizeOption,
    DevicesOption,
    Dtype,
    check_at_least,
    integer,
    option_name,
    parse_devices,
)
from sightloop.apps.cli.output import RESUME_HINT, OutputTable, ProgressReporter, print_message, say_if_slow
from sightloop.checkpoints.catalog import BUNDLED
from sightloop.errors import UsageError
from sightloop.types import JsonDict

if TYPE_CHECKING:
    from sightloop.capfilt.bootstrap import CapFiltSummary
    from sightloop.capfilt.estimate import Estimate

_EPILOGUE = (
    "Examples:\n"
    "  sightloop bootstrap web.tar --captioner run-c/model --filter run-f/model --out better\n"
    "  sightloop bootstrap photos --mode filter-only --threshold 0.7 --out better\n"
    "  sightloop bootstrap web.tar --captions 10 --keep top-k-itc --ranker M --out better\n"
    "  sightloop bootstrap talks.tar --task dialogue --captioner M --filter M --captions 8 --out better"
)
_TEXTS_GROUP = Group(
    "Captioning and filtering",
    help=(
        "A run is resumed with the same values. With another --keep, --threshold or --top, a finished run is filtered "
        "again by its stored scores; other changes need another output folder."
    ),
    sort_key=10,
)
_EXECUTION_GROUP = Group(
    "Execution",
    help="When a run is resumed, --engine, --workers, --batch-size, --readers and the N of --device cuda:N may change.",
    sort_key=20,
)


@Parameter(name="*", group=_TEXTS_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """Which texts are generated and kept, as in `sightloop.capfilt.options.CapFiltOptions`."""

    task: Literal["captions", "dialogue"] = "captions"
    """captions: CapFilt; dialogue: answer the questions of the data's dialogues, and keep the turns whose answer, a
    person's or a written one, the filter calls true, sensible, grounded and safe (--threshold each)."""

    mode: Literal["both", "captioner-only", "filter-only"] = "both"
    """both: caption and filter; captioner-only: add captions, filter nothing; filter-only: filter the existing
    texts."""

    keep: Literal["matching", "best", "top-k-itc"] = "matching"
    """matching: every text with an ITM probability of --threshold or more; best: the one with the highest; top-k-itc:
    the --top texts with the highest image-text cosine."""

    threshold: float = 0.5
    """Minimum ITM probability of a text that matches, 0 to 1."""

    top: Annotated[int, Parameter(converter=integer)] = 2
    """top-k-itc: number of texts kept per image."""

    ranker: str | None = None
    """top-k-itc: embedding model that computes the cosine. Default: the filter."""

    captions: Annotated[int, Parameter(converter=integer)] = 1
    """Synthetic captions per image, or answers per question."""

    top_p: float = 0.9
    """Nucleus sampling of captions: sample from the most probable tokens whose probabilities sum to this."""

    num_beams: Annotated[int, Parameter(converter=integer)] = 1
    """Above 1: beam search with this number of beams instead of sampling."""

    min_tokens: Annotated[int, Parameter(converter=integer)] = 5
    """Minimum length of a caption in tokens, EOS included."""

    max_tokens: Annotated[int, Parameter(converter=integer)] = 20
    """Maximum length of a caption in tokens, EOS included."""

    prompt: str | None = None
    """Beginning of every caption. Default: none."""

    seed: Annotated[int, Parameter(converter=integer)] = 0
    """Random seed of sampling."""


@Parameter(name="*", group=_EXECUTION_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionOptions:
    """Output format, processes, device and precision."""

    to: Literal["tar", "parquet"] = "tar"
    """Format of the output shards."""

    by_reference: Annotated[bool, Parameter(negative=(), show_default=False)] = False
    """Parquet: store the paths of image files instead of their bytes."""

    block: Annotated[int, Parameter(converter=integer)] = 1000
    """Samples per output shard, the most work that is lost if the process is killed."""

    engine: Literal["local", "ray"] = "local"
    """local: processes on this machine; ray: a Ray cluster whose machines share the disk of DATA and the output."""

    workers: Annotated[int, Parameter(converter=integer)] = 1
    """Processes, each with its own copy of the models."""

    batch_size: BatchSizeOption = None
    """Images that each worker decodes ahead, rounded up to a multiple of --group; auto: 64, or as many as fit 256 MB.
    Changes speed and memory, not results. Default: --group."""

    group: Annotated[int | None, Parameter(converter=integer)] = None
    """Images per forward pass. Changes the last digits of scores. Default: 8 on a CPU, 32 on a GPU."""

    threads: Annotated[int | None, Parameter(converter=integer)] = None
    """CPU threads per worker. Changes the last digits of scores. Default: all cores."""

    readers: Annotated[int, Parameter(converter=integer)] = 2
    """Processes per worker that decode images."""

    device: str = "auto"
    """cpu, cuda, cuda:N, mps, or auto: a GPU if there is one, and the next GPUs for further workers."""

    devices: DevicesOption = None
    """A worker on each of these devices, in place of --workers and --device: cuda:0,cuda:1 or cpu,cpu."""

    dtype: Dtype = "float32"
    """Precision of weights and activations."""

    max_pixels: Annotated[int, Parameter(converter=integer)] = 128 * 1024 * 1024
    """Images with more pixels (width x height) than this count as failed."""

    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False
    """Print the summary, or the estimate, as one JSON object."""

    price: float | None = None
    """With --estimate: price of one worker per hour, in any currency. Default: no cost is estimated."""


_TEXTS, _EXECUTION = TextOptions(), ExecutionOptions()


def bootstrap(
    *data: Annotated[str, Parameter(name="DATA", required=True)],
    out: Annotated[Path | None, Parameter(alias="-o", metavar="FOLDER")] = None,
    captioner: str = BUNDLED,
    filter: str = BUNDLED,
    images: Annotated[Path | None, Parameter(metavar="FOLDER")] = None,
    estimate: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    texts: TextOptions = _TEXTS,
    execution: ExecutionOptions = _EXECUTION,
) -> int:
    """Clean a noisy dataset with CapFilt: generate captions, filter them and the web texts, keep what matches.

    The output folder becomes a dataset that every command reads; its subfolder evidence/ has the scores of every text,
    kept or not. An interrupted run is resumed by the same command, with the same result as without the interruption.

    Args:
        data: Folder, CSV, JSONL, Parquet or COCO file, or .tar shards; several are concatenated.
        out: Output folder. Required, except with --estimate, which writes nothing.
        captioner: Model that generates captions, or an OpenAI-compatible chat completions server,
            http://host:8000/v1#model, with its key in SIGHTLOOP_API_KEY.
        filter: ITM model that scores texts; best one that is not fine-tuned from the captioner.
        images: Folder that relative image paths in a table or a COCO file start from. Default: the file's folder.
        estimate: Process 64 images, print the estimated time, disk space and cost for all of them and for 10^4 to
            10^9 images, and write nothing.
    """
    options = _field_values(texts) | _field_values(execution)
    json, price = options.pop("json"), options.pop("price")
    options["devices"] = parse_devices(execution.devices, execution.device)
    if out is None and not estimate:
        raise UsageError("--out: name the output folder; only --estimate needs none.")
    _check(out, texts, execution, captioner, filter)
    check_data("DATA", data)
    prepare_threads()
    from sightloop.data.datasets.dataset import open_dataset

    dataset = open_dataset(
        list(data), images=images
    )  # before torch, so that a wrong file is reported at once
    with say_if_slow("starting ..."):
        from sightloop.capfilt.bootstrap import bootstrap as run_bootstrap
        from sightloop.capfilt.bootstrap import estimate as run_estimate
        from sightloop.capfilt.report import shares

    if estimate or out is None:
        result = run_estimate(dataset, captioner=captioner, filter=filter, price=price, **options)
        _print_estimate(result, as_json=json)
        return 0
    with ProgressReporter("bootstrapping", OutputTable([]), RESUME_HINT) as progress:
        if not dataset.is_stream:
            progress.count_ahead(lambda: len(dataset))
        summary = run_bootstrap(
            dataset, out=out, captioner=captioner, filter=filter, on_event=progress.event, **options
        )
    _print_summary(summary, shares(summary.texts), out, as_json=json)
    return 1 if summary.failed else 0


def _print_summary(
    summary: CapFiltSummary, shares: Mapping[str, Mapping[str, int]], out: Path, *, as_json: bool
) -> None:
    kept = [
        f"{counts['kept']:,} of {counts['total']:,} {source} texts"
        for source, counts in shares.items()
        if counts["total"]
    ]
    print_message(
        f"{out}: {summary.written:,} of {summary.samples:,} images; kept {' and '.join(kept) or 'no texts'}."
    )
    for note in summary.notes:
        print_message(f"note: {note}.")
    print_message(f"{out / 'report.html'}: what was kept and dropped, with images.")
    if as_json:
        print(jsonlib.dumps(asdict(summary)))


def _check(
    out: Path | None, texts: TextOptions, execution: ExecutionOptions, captioner: str, filter: str
) -> None:
    """Checks options and models before torch is loaded.

    Raises:
        UsageError: An option has a bad value.
        CheckpointError: There is no such model.
        UnsupportedError: A model is known to lack the capability of its part.
    """
    check_output_folder("--out", out)
    if not 0 <= texts.threshold <= 1:
        raise UsageError(f"--threshold {texts.threshold:g}: must be from 0 to 1.")
    if not 0 < texts.top_p <= 1:
        raise UsageError(f"--top-p {texts.top_p:g}: must be above 0 and at most 1.")
    for name in ("top", "captions", "num_beams", "max_tokens"):
        check_at_least(option_name(name), getattr(texts, name), 1)
    for name in ("block", "workers", "readers", "batch_size", "group", "threads", "max_pixels"):
        if isinstance(value := getattr(execution, name), int):
            check_at_least(option_name(name), value, 1)
    writes = "chat" if texts.task == "dialogue" else "caption"
    if texts.mode != "filter-only" and not re.match(r"https?://", captioner):
        check_capability(captioner, writes)
        check_checkpoint(captioner)
    if texts.task == "dialogue" and filter == BUNDLED:
        raise UsageError(
            "--filter: name a model that judges answers, such as `sightloop train dialogue` makes; nano does not."
        )
    if texts.mode != "captioner-only":
        by_cosine = texts.keep == "top-k-itc" and texts.ranker is None
        check_capability(filter, "embed" if by_cosine else "match")
        check_checkpoint(filter)
    if texts.ranker is not None:
        check_capability(texts.ranker, "embed")
        check_checkpoint(texts.ranker)


def _print_estimate(estimate: Estimate, *, as_json: bool) -> None:
    print_message(
        f"{estimate.measured:,} images measured: {estimate.images_per_second:,.2f} images/s per worker."
    )
    for scaled in (estimate, *(estimate.of(10**power) for power in range(4, 10))):
        cost = "" if scaled.cost is None else f", {scaled.cost:,.2f} at {scaled.price:g} per worker and hour"
        print_message(
            f"{scaled.samples:13,} images: {_time(scaled.hours)}, {scaled.bytes / 1e9:,.2f} GB{cost}"
        )
    print_message(f"With {estimate.workers} worker(s), assuming that they do not slow each other down.")
    if as_json:
        print(jsonlib.dumps(estimate.to_json()))


def _time(hours: float) -> str:
    """0.5 -> "30.0 minutes", 30 -> "30.0 hours", 72 -> "3.0 days"."""
    if hours < 1:
        return f"{60 * hours:,.1f} minutes"
    return f"{hours:,.1f} hours" if hours < 48 else f"{hours / 24:,.1f} days"


def _field_values(options: TextOptions | ExecutionOptions) -> JsonDict:
    return {field.name: getattr(options, field.name) for field in fields(options)}


COMMANDS = {bootstrap: _EPILOGUE}
