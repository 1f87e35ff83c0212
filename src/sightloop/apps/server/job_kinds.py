"""Kinds of jobs: caption, rank, index, train, compare, bootstrap, use. Each has a title, a command and its work."""

from __future__ import annotations

import asyncio
import json
import shlex
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sightloop.apps.server import work
from sightloop.apps.server.caption_review import REVIEW_FOLDER, Proposal
from sightloop.apps.server.errors import ApiError
from sightloop.apps.server.folder_index import index_of_library
from sightloop.apps.server.image_library import Library, LibraryImage, Listing, image_id
from sightloop.apps.server.job_commands import run_command
from sightloop.apps.server.job_list import ServerJob
from sightloop.apps.server.model_pool import LoadedModel
from sightloop.apps.server.service import Service
from sightloop.apps.server.training_runs import (
    TrainingRun,
    find_run,
    model_of,
    run_folder,
    save_comparison,
    save_run,
)
from sightloop.data.atomic import atomic_write
from sightloop.types import JsonDict, JsonMapping, Pixels

_CLIENT = "jobs"  # takes turns with the clients
_BATCH = 8
_STEP_CURVES = ("loss",)
_DIRECTIONS = {"length": 0, "repetition": -1}  # of metrics of which more is not better
_DIFFERENCE = (
    ", A - B"  # end of a metric's name in the lines of `sightloop evaluate --json` that compare two models
)


class Plan(NamedTuple):
    """What a job will do."""

    title: str
    command: str
    run: Callable[[ServerJob], Awaitable[None]]


def plan(service: Service, library: Library, kind: str, options: JsonMapping) -> Plan:
    """The plan of a kind of job. Raises ApiError (400) for an unknown kind or option."""
    makers = {
        "caption": _caption,
        "rank": _rank,
        "index": _index,
        "train": _train,
        "compare": _compare,
        "bootstrap": _bootstrap,
        "use": _use,
    }
    if kind not in makers:
        raise ApiError(400, f"kind: one of {', '.join(makers)}", param="kind")
    return makers[kind](service, library, options)


async def start_index(service: Service) -> None:
    """Starts the job that builds the folder's index, if it has none and the default model can embed."""
    library, index = service.image_library, service.index
    if library is None or index is None or index.exists() or not library.is_editable:
        return
    if not await asyncio.to_thread(library.entries):
        return
    if "embed" in (service.pool.states()[0].capabilities or ("embed",)):
        planned = _index(service, library, {})
        service.jobs.start("index", planned.title, planned.command, planned.run)


# Work with a served model.


def _caption(service: Service, library: Library, options: JsonMapping) -> Plan:
    """Proposes captions for images without one, or whose caption was rejected, and without a proposal to decide."""
    model_id = service.pool.find(_name(options, "model"))
    prompt = _name(options, "prompt")

    async def run(job: ServerJob) -> None:
        def wanted() -> Sequence[LibraryImage]:
            bare = library.select(Listing(state="uncaptioned"))
            rejected = [entry for entry in library.captioned() if library.is_rejected(entry)]
            return [
                entry
                for entry in (*bare, *rejected)
                if library.state(entry) in ("none", "accepted") and library.is_plain(entry)
            ]

        entries = await asyncio.to_thread(wanted)
        async with service.pool.lease(model_id) as served:
            kind = work.caption_kind(served, prompted=bool(prompt), length=None, region=None, decoding={})

            async def caption(batch: Sequence[tuple[LibraryImage, Pixels]]) -> None:
                texts = await service.run(_CLIENT, kind, [(pixels, prompt) for _, pixels in batch])
                proposals = {
                    entry.path: Proposal(" ".join(own[0].split()), served.id, time.time())
                    for (entry, _), own in zip(batch, texts, strict=True)
                }
                await asyncio.to_thread(library.review.propose, proposals)

            await _each_batch(job, service, served, entries, caption)

    source = service.pool.source(model_id)
    return Plan(
        f"Propose captions for images without one ({model_id})",
        _shell("caption", library.source.name, "-m", source, *(["--prompt", prompt] if prompt else [])),
        run,
    )


def _rank(service: Service, library: Library, options: JsonMapping) -> Plan:
    """Scores every caption on disk against its image (ITM)."""
    model_id = service.pool.find(_name(options, "model"))

    async def run(job: ServerJob) -> None:
        def wanted() -> Sequence[LibraryImage]:
            captioned = [entry for entry in library.captioned() if library.is_plain(entry)]
            return [entry for entry in captioned if library.fit(entry) is None]

        entries = await asyncio.to_thread(wanted)
        async with service.pool.lease(model_id) as served:
            kind = work.match_kind(served)

            async def score(batch: Sequence[tuple[LibraryImage, Pixels]]) -> None:
                captions = [library.caption(entry) for entry, _ in batch]
                rows = [
                    (pixels, tuple(_lines(caption.text)) or ("",))
                    for (_, pixels), caption in zip(batch, captions, strict=True)
                ]
                fits = await service.run(_CLIENT, kind, rows)
                scored = [
                    (entry.path, caption.etag, min(own))  # the worst of several captions
                    for (entry, _), caption, own in zip(batch, captions, fits, strict=True)
                ]
                await asyncio.to_thread(library.review.set_fits, scored)

            await _each_batch(job, service, served, entries, score)

    source = service.pool.source(model_id)
    return Plan(
        f"Score captions against their images ({model_id})",
        _shell("match", library.source.name, "-m", source, "--out", "scores.csv"),
        run,
    )


async def _each_batch(
    job: ServerJob,
    service: Service,
    served: LoadedModel,
    entries: Sequence[LibraryImage],
    act: Callable[[Sequence[tuple[LibraryImage, Pixels]]], Awaitable[None]],
) -> None:
    """Reads images batch by batch and hands them on; those that cannot be read are noted and skipped."""
    job.total = len(entries)
    for start in range(0, len(entries), _BATCH):
        await job.checkpoint()
        batch: list[tuple[LibraryImage, Pixels]] = []
        for entry in entries[start : start + _BATCH]:
            try:
                data = await service.images.path(entry.path, "image")
                batch.append((entry, (await service.decode(served, [data], "image"))[0]))
            except ApiError as error:
                job.fail(entry.path, error.detail)
        if batch:
            await act(batch)
        job.done = min(len(entries), start + _BATCH)


def _use(service: Service, library: Library, options: JsonMapping) -> Plan:
    """Serves the result of a training as a further model."""
    name = find_run(library.home, _name(options, "run") or "").name
    model = model_of(library.home, name)

    async def run(job: ServerJob) -> None:
        service.pool.add(name, str(model))
        async with service.pool.lease(name):
            job.result = {"model": name}
            job.message = f"{name} can be chosen as model now"

    place = f"{library.home.name}/{model.relative_to(library.home)}"
    return Plan(f"Use {name}", _shell("serve", library.source.name, "-m", place), run)


# Commands in a child process.


def _index(service: Service, library: Library, options: JsonMapping) -> Plan:
    store = index_of_library(library)
    if store == library.source:
        raise ApiError(
            409, "the server shows this index: add images to it with sightloop index", code="index_served"
        )
    model = service.pool.source(service.pool.find(_name(options, "model")))
    command = ["index", str(library.source), "--store", str(store), "-m", model, "--prune", "--json"]

    async def run(job: ServerJob) -> None:
        job.total = len(await asyncio.to_thread(library.entries))

        def line(event: JsonDict) -> None:
            job.done += 1

        await run_command(job, command, library, line)

    shown = (
        "index",
        library.source.name,
        "--store",
        f"{library.home.name}/{REVIEW_FOLDER}/index",
        "-m",
        model,
    )
    return Plan("Build the index", _shell(*shown), run)


def _train(service: Service, library: Library, options: JsonMapping) -> Plan:
    """Fine-tunes a captioner on the captions on disk; a share of the images is held out to compare."""
    model = service.pool.source(service.pool.find(_name(options, "model")))
    steps = _integer(options, "steps", 100, 1, 100_000)
    held_out = _fraction(options, "held_out", 0.2)
    name = time.strftime("run-%Y%m%d-%H%M%S")
    folder = run_folder(library.home, name)
    data, rest = folder / "train.jsonl", folder / "held-out.jsonl"
    settings = [
        f"model.init_from={model}",
        f"steps={steps}",
        f"schedule.warmup_steps={min(100, steps // 10)}",
    ]
    command = [
        "train",
        "captioner",
        "--data",
        str(data),
        "--out",
        str(folder / "run"),
        "--json",
        "--set",
        *settings,
    ]

    async def run(job: ServerJob) -> None:
        counts = await asyncio.to_thread(_write_split, library, data, rest, held_out)
        save_run(library.home, TrainingRun(name, model, steps, *counts))
        job.total = steps
        job.result = {"name": name, "images": counts[0], "held_out": counts[1]}

        def line(event: JsonDict) -> None:
            if event.get("kind") == "step":
                job.done = int(event["step"])
                for curve in _STEP_CURVES:
                    job.curves.setdefault(curve, []).append((job.done, float(event[curve])))
                job.message = f"loss {float(event['loss']):.3f}"

        await run_command(job, command, library, line)

    shown = ("train", "captioner", "--data", library.source.name, "--out", name, "--set", *settings)
    return Plan(f"Fine-tune {model}", _shell(*shown), run)


def _compare(service: Service, library: Library, options: JsonMapping) -> Plan:
    """Captions the held-out images with the model of before and of after: metrics with intervals of the difference."""
    trained = find_run(library.home, _name(options, "run") or "")
    name, model = trained.name, trained.model
    place = run_folder(library.home, name)
    folder, held_out = model_of(library.home, name), place / "held-out.jsonl"
    command = ["evaluate", "captions", "--data", str(held_out), "-m", str(folder), "-m", model, "--json"]

    async def run(job: ServerJob) -> None:
        values: dict[str, list[float]] = {}
        differences: dict[str, JsonDict] = {}

        def line(event: JsonDict) -> None:
            value, metric = event.get("value"), str(event.get("name", ""))
            if metric.endswith(_DIFFERENCE):
                differences[metric.removesuffix(_DIFFERENCE)] = event
            elif isinstance(value, float | int):
                values.setdefault(metric, []).append(float(value))

        await run_command(job, command, library, line)
        metrics = _compared(values, differences)
        await asyncio.to_thread(save_comparison, library.home, name, metrics)
        job.result = {"name": name, "metrics": metrics}

    run_place = f"{library.home.name}/{place.relative_to(library.home)}"
    shown = (
        "evaluate",
        "captions",
        "--data",
        f"{run_place}/held-out.jsonl",
        "-m",
        model,
        "-m",
        f"{run_place}/run/model",
    )
    return Plan(f"Compare {model} with {name}", _shell(*shown), run)


def _bootstrap(service: Service, library: Library, options: JsonMapping) -> Plan:
    """CapFilt over the folder into a new data set."""
    model = service.pool.source(service.pool.find(_name(options, "model")))
    out = library.home / REVIEW_FOLDER / time.strftime("bootstrap-%Y%m%d-%H%M%S")
    command = ["bootstrap", str(library.source), "--out", str(out), "--captioner", model, "--filter", model]

    async def run(job: ServerJob) -> None:
        await run_command(job, command, library, lambda _event: None)
        job.result = {"folder": f"{REVIEW_FOLDER}/{out.name}"}

    shown = ("bootstrap", library.source.name, "--out", out.name, "--captioner", model, "--filter", model)
    return Plan("Bootstrap the captions (CapFilt)", _shell(*shown), run)


def _write_split(library: Library, data: Path, rest: Path, held_out: float) -> tuple[int, int]:
    """Writes the images whose captions nobody rejected as two lists; an image is on the same side in every run.

    Raises:
        ApiError: there are too few (400).
    """
    parts: tuple[list[str], list[str]] = ([], [])
    for entry in library.captioned():
        if library.is_rejected(entry) or not library.is_plain(entry):
            continue
        share = int(image_id("split " + entry.path), 16) / float(1 << 64)
        row = {"image": str(library.folder / entry.path), "captions": _lines(library.caption(entry).text)}
        parts[share < held_out].append(json.dumps(row, ensure_ascii=False) + "\n")
    if min(map(len, parts)) < 2:
        raise ApiError(400, "too few captions: accept or write at least a dozen first")
    data.parent.mkdir(parents=True, exist_ok=True)
    for path, lines in zip((data, rest), parts, strict=True):
        atomic_write(path, "".join(lines))
    return len(parts[0]), len(parts[1])


def _compared(values: JsonMapping, differences: Mapping[str, JsonMapping]) -> list[JsonDict]:
    """Rows of the table: metric, before, after, difference with its interval."""
    rows: list[JsonDict] = []
    for name, gap in differences.items():
        after, before = values[name]
        interval = {key: gap[key] for key in ("low", "high", "p")}
        verdict = _verdict(gap["low"], gap["high"], _DIRECTIONS.get(name, 1))
        row = {"name": name, "before": before, "after": after, "difference": gap["value"], "verdict": verdict}
        rows.append(row | interval)
    return rows


def _verdict(low: float, high: float, direction: int) -> str:
    """What the interval of a difference says; "" for a metric of which neither more nor less is better."""
    if not direction:
        return ""
    if low <= 0 <= high:
        return "unclear"
    return "better" if (low > 0) == (direction > 0) else "worse"


def _lines(text: str | None) -> list[str]:
    """The captions of a caption file, one a line."""
    return [line for line in (text or "").split("\n") if line.strip()]


def _shell(*arguments: str) -> str:
    return shlex.join(["sightloop", *arguments])


def _name(options: JsonMapping, key: str) -> str | None:
    value = options.get(key)
    if value is not None and (not isinstance(value, str) or len(value) > 1_000):
        raise ApiError(400, f"{key}: give a text", param=key)
    return value or None


def _integer(options: JsonMapping, key: str, default: int, low: int, high: int) -> int:
    value = options.get(key, default)
    if not isinstance(value, int) or not low <= value <= high:
        raise ApiError(400, f"{key}: from {low} to {high}", param=key)
    return value


def _fraction(options: JsonMapping, key: str, default: float) -> float:
    value = options.get(key, default)
    if not isinstance(value, float | int) or not 0.05 <= value <= 0.5:
        raise ApiError(400, f"{key}: from 0.05 to 0.5", param=key)
    return float(value)
