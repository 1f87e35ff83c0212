"""The command `sightloop bootstrap`."""

from __future__ import annotations

import json as jsonlib
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from sightloop.apps.cli.options import Dtype, whole
from sightloop.apps.cli.output import OutputTable, Screen, say
from sightloop.checkpoints.catalog import BUNDLED
from sightloop.types import JsonDict

if TYPE_CHECKING:
    from sightloop.capfilt.estimate import Estimate

_EPILOGUE = (
    "Examples:\n"
    "  sightloop bootstrap web.tar --captioner run-c/model --filter run-f/model --out better\n"
    "  sightloop bootstrap photos --mode filter-only --threshold 0.7 --out better\n"
    "  sightloop bootstrap web.tar --captions 10 --keep top-k-itc --ranker openai/clip-vit-large-patch14 --out better"
)
_AGAIN = "The same command goes on from here."


@Parameter(name="*", group=Group("Which texts are written and kept", sort_key=10))
@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """What the job is. It stays as it is in OUT: another job needs another folder."""

    mode: Literal["both", "captioner-only", "filter-only"] = "both"
    """both; captioner-only adds texts and judges none; filter-only judges and writes none."""

    keep: Literal["matching", "best", "top-k-itc"] = "matching"
    """matching: all that the filter takes; best: the best of each image; top-k-itc: the --top best by ITC."""

    threshold: float = 0.5
    """The ITM probability from which a text matches."""

    top: Annotated[int, Parameter(converter=whole)] = 2
    """top-k-itc: how many texts of an image stay."""

    ranker: str | None = None
    """top-k-itc: an embedding model. Without it: the filter."""

    captions: Annotated[int, Parameter(converter=whole)] = 1
    """Synthetic texts an image."""

    top_p: float = 0.9
    """They are drawn from the likeliest tokens that together have this probability."""

    num_beams: Annotated[int, Parameter(converter=whole)] = 1
    """Above 1: beam search instead of drawing."""

    min_tokens: Annotated[int, Parameter(converter=whole)] = 5
    """Least length of one."""

    max_tokens: Annotated[int, Parameter(converter=whole)] = 20
    """Greatest length of one."""

    prompt: str | None = None
    """The words that each starts with."""

    seed: Annotated[int, Parameter(converter=whole)] = 0
    """Another number draws other texts."""


@Parameter(name="*", group=Group("How the work is done", sort_key=20))
@dataclass(frozen=True, slots=True, kw_only=True)
class WorkOptions:
    """What of this changes the result is said."""

    to: Literal["tar", "parquet"] = "tar"
    """The kind of the new shards."""

    by_reference: Annotated[bool, Parameter(negative=(), show_default=False)] = False
    """parquet: the paths of images that are files of their own, not the images."""

    block: Annotated[int, Parameter(converter=whole)] = 1000
    """Samples in a shard, at most: what one kill can cost."""

    engine: Literal["local", "ray"] = "local"
    """local: processes of this machine; ray: of all machines of a Ray cluster that share DATA's and OUT's disk."""

    workers: Annotated[int, Parameter(converter=whole)] = 1
    """Processes, each with its own models."""

    batch_size: Annotated[int | None, Parameter(converter=whole)] = None
    """Images held ready for the models: it changes speed and memory only."""

    group: Annotated[int | None, Parameter(converter=whole)] = None
    """Images in one pass of a model. It may change last digits of scores, so a job keeps it. 8 on a CPU, else 32."""

    threads: Annotated[int | None, Parameter(converter=whole)] = None
    """CPU threads of each process; a job keeps it, as --group. Without it: all cores."""

    readers: Annotated[int, Parameter(converter=whole)] = 2
    """Processes that decode images beside each model."""

    device: str = "auto"
    """auto takes a GPU where there is one, and more workers the next ones; or name it: cpu, cuda, cuda:1, mps."""

    dtype: Dtype = "float32"
    """Number format of the models."""

    max_pixels: Annotated[int, Parameter(converter=whole)] = 128 * 1024 * 1024
    """Images with more pixels than this are refused."""

    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False
    """Print the summary, or the estimate, as one JSON object."""

    price: float | None = None
    """--estimate: what a worker costs an hour, in any currency."""


_TEXTS, _WORKING = TextOptions(), WorkOptions()


def bootstrap(
    *data: Annotated[str, Parameter(name="DATA", required=True)],
    out: Annotated[Path, Parameter(alias="-o", metavar="FOLDER")],
    captioner: str = BUNDLED,
    filter: str = BUNDLED,
    images: Annotated[Path | None, Parameter(metavar="FOLDER")] = None,
    estimate: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    texts: TextOptions = _TEXTS,
    working: WorkOptions = _WORKING,
) -> int:
    """Make a better dataset of a noisy one (CapFilt): write captions, judge them and the web's, keep what matches.

    OUT becomes a dataset that every command reads, with the evidence for
    every text in OUT/evidence. A run that was cut off goes on with the same
    command; the result is the same as if it had never stopped.

    Parameters
    ----------
    data
        A folder, CSV, JSONL, Parquet or COCO file, or tar shards; several are joined.
    out
        The folder of the job.
    captioner
        The model that writes. Without it: the bundled one, small and often wrong. Or a server that speaks OpenAI's
        chat completions, http://host:8000/v1#model, its key in SIGHTLOOP_API_KEY.
    filter
        The model that judges; better one that was not made from the captioner.
    images
        The folder that the paths in a table or in COCO's json start from.
    estimate
        Measure 64 images, predict time, cost and disk for all of them and for 10^4 to 10^9, and write nothing.
    """
    options = _given(texts) | _given(working)
    json, price = options.pop("json"), options.pop("price")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from sightloop.capfilt.bootstrap import bootstrap as run
    from sightloop.capfilt.bootstrap import estimate as predict
    from sightloop.capfilt.report import shares
    from sightloop.data.datasets.dataset import open_dataset

    dataset = open_dataset(list(data), images=images)
    if estimate:
        _tell(predict(dataset, captioner=captioner, filter=filter, price=price, **options), json)
        return 0
    with Screen("bootstrapping", OutputTable([]), _AGAIN) as screen:
        if not dataset.is_stream:
            screen.count_ahead(lambda: len(dataset))
        done = run(dataset, out=out, captioner=captioner, filter=filter, on_event=screen.event, **options)
    kept = [f"{t['kept']:,} of {t['total']:,} {s} texts" for s, t in shares(done.texts).items() if t["total"]]
    say(f"{out}: {done.written:,} of {done.samples:,} images; kept {' and '.join(kept) or 'no texts'}.")
    for note in done.notes:
        say(f"note: {note}.")
    say(f"{out / 'report.html'}: what was kept and dropped, with images.")
    if json:
        print(jsonlib.dumps(asdict(done)))
    return 1 if done.failed else 0


def _tell(made: Estimate, json: bool) -> None:
    say(f"{made.measured:,} images measured: {made.pictures_per_second:,.2f} images/s and worker.")
    for each in (made, *(made.of(10**power) for power in range(4, 10))):
        cost = "" if each.cost is None else f", {each.cost:,.2f} at {each.price:g} a worker and hour"
        say(f"{each.samples:13,} images: {_time(each.hours)}, {each.bytes / 1e9:,.2f} GB{cost}")
    say(f"With {made.workers} worker(s), as if they did not hinder each other.")
    if json:
        print(jsonlib.dumps(made.told()))


def _time(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:,.1f} minutes"
    return f"{hours:,.1f} hours" if hours < 48 else f"{hours / 24:,.1f} days"


def _given(group: Any) -> JsonDict:
    return {field.name: getattr(group, field.name) for field in fields(group)}


COMMANDS = {bootstrap: _EPILOGUE}
