"""The training loop of every recipe: batches, steps, evaluation, checkpoints, the result.

    for event in train(recipe, data, out): ...

Resuming, the number of processes and the micro-batch size change results by rounding only: all random draws are
functions of the seed and the step.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch

from sightloop.checkpoints.lora import save_lora
from sightloop.data.copies.learned_images import write_digests
from sightloop.data.datasets.dataset import open_dataset
from sightloop.data.datasets.leakage import find_leaks
from sightloop.errors import SightloopError, is_out_of_memory, os_error_reason
from sightloop.inference.malloc import keep_freed_memory
from sightloop.inference.model import Model
from sightloop.inference.save import save
from sightloop.nn.lora import merge_lora
from sightloop.protocols import Network, require
from sightloop.training import checkpoint
from sightloop.training.calibration import MIN_IMAGES, calibrate, learned_digests
from sightloop.training.config import Recipe, apply_settings
from sightloop.training.dataloader import Batch, BatchLoader
from sightloop.training.distributed import (
    any_of,
    barrier,
    init_world,
)
from sightloop.training.events import (
    CheckpointSaved,
    Evaluated,
    RunEnded,
    RunEvent,
    RunStarted,
    SampleSkipped,
    StepDone,
    WarningRaised,
)
from sightloop.training.log import METRICS, RunLog
from sightloop.training.recipes import find_recipe
from sightloop.training.report import write_drawings, write_report, write_samples
from sightloop.training.requirements import calibrates
from sightloop.training.run import TrainRun, open_run
from sightloop.training.step import take_step
from sightloop.training.truncation import truncation_warnings
from sightloop.training.validation import at_chance, validate, validation_score

_BEST = "best"
_MAX_DIGESTS = 200_000  # images; the digests of more would take another pass over a large training set


def train(
    recipe: Recipe | str,
    data: str | Sequence[str],
    out: str | Path,
    *,
    settings: Sequence[str] = (),
    device: str = "auto",
    tensorboard: bool = False,
    stop_after: int | None = None,
) -> Iterator[RunEvent]:
    """Trains a model; the result is OUT/model, which `sightloop.load` reads.

    A run found in OUT is resumed from its last checkpoint. Under `torchrun` every process calls this; the first one
    writes files.

    Args:
        recipe: a name, a JSON file or a `Recipe`.
        data: dataset or datasets as `open_dataset` reads them.
        out: folder of the run: recipe.json, metrics.jsonl, report.html, checkpoints/, model/.
        settings: changes of the recipe, such as "optimizer.lr=1e-4" (`apply_settings`).
        device: "auto" (a GPU if there is one), "cpu", "cuda", ...
        tensorboard: also write OUT/tensorboard.
        stop_after: steps of this call; None for all.

    Yields:
        Events of `training.events`, from `RunStarted` to `RunEnded`.

    Raises:
        UsageError: before training, if settings, data and model do not fit each other, or OUT holds another run or is
            in use.
        SightloopError: the loss is NaN or infinite, or a checkpoint cannot be read.
    """
    recipe = apply_settings(find_recipe(recipe) if isinstance(recipe, str) else recipe, settings)
    ranks = init_world(device)
    if ranks.device.type == "cpu":
        keep_freed_memory()
        # Texts of every length make more shapes than the 1,024 kernels that oneDNN keeps: an eighth of the time of
        # `world_dialogue` went into making them again.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")
    with ExitStack() as stack:
        run = open_run(recipe, data, Path(out), ranks, stack)
        stack.enter_context(_precision(recipe.precision))
        log = None
        if ranks.first:
            log = stack.enter_context(RunLog(run.folder, run.state.step, tensorboard=tensorboard))
        repairs = log.repairs if log is not None else []
        for event in _events(run, stop_after, repairs):
            if log is not None:
                with _writing(run):
                    log.write(event)
                    if isinstance(event, (Evaluated, RunEnded)):
                        write_report(run.folder)
                yield event


def _events(run: TrainRun, stop_after: int | None, repairs: Sequence[str]) -> Iterator[RunEvent]:
    state, recipe, ranks = run.state, run.recipe, run.world
    parameters = [parameter for _, parameter in state.named_parameters()]
    yield RunStarted(
        recipe=recipe.name,
        steps=run.steps,
        batch=recipe.data.batch,
        samples=len(run.dataset),
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        first_step=state.step,
    )
    for text in (*run.damaged, *repairs):
        yield WarningRaised(state.step, "checkpoint", text)
    for text in run.data_warnings if state.step == 0 else ():
        yield WarningRaised(0, "data", text)
    if state.step == 0 and ranks.first:
        for text in truncation_warnings(recipe, run.dataset, run.model.tokenizer):
            yield WarningRaised(0, "data.max_tokens", text)
    yield from _data_notes(run)
    yield from _warn_of_leaks(run)
    started = time.monotonic()
    labels = {label: i for i, label in enumerate(run.model.labels)}
    loader = BatchLoader(
        run.dataset,
        recipe.data,
        run.model.tokenizer,
        run.model.image_spec,
        recipe.seed,
        labels,
        ranks.rank,
        ranks.world_size,
        run.model.prompts if recipe.terms.get("prompted") else None,
        run.model.attributes,
    )
    if recipe.evaluation.data and state.step == 0:
        yield from _evaluate(run)
    last = run.steps if stop_after is None else min(run.steps, state.step + stop_after)
    for batch in loader.batches(state.step, last):
        yield from _train_step(run, batch)
    if state.step < run.steps:
        return
    model_folder = run.folder / "model"
    model = _current_model(run)
    if ranks.first:
        yield from _calibrate(run, model)
        with _writing(run):
            _save_model(run, model, model_folder)
    barrier(ranks)
    yield RunEnded(state.step, time.monotonic() - started, model_folder)


def _train_step(run: TrainRun, batch: Batch) -> Iterator[RunEvent]:
    """A step, then the evaluation and checkpoint that are due."""
    start = time.monotonic()
    state, recipe = run.state, run.recipe
    with _fitting_memory(run):
        values, chances, lr, skipped = take_step(run, batch)
    for key, reason in skipped:
        if key not in run.skipped:
            run.skipped.add(key)
            yield SampleSkipped(key, reason)
    state.step += 1
    event = StepDone(
        step=state.step,
        epoch=state.step * recipe.data.batch / len(run.dataset),
        loss=sum(recipe.terms[name] * values[name] for name in chances),
        values=values,
        chances=chances,
        lr=lr,
        seconds=time.monotonic() - start,
        samples=recipe.data.batch,
    )
    yield event
    yield from run.monitor.update(event)
    if run.monitor.fatal:
        raise SightloopError(
            f"step {state.step}: the loss or its gradient is not finite; the last checkpoint is from before this step"
        )
    _check_progress(run, bool(chances))
    done = state.step == run.steps
    every = recipe.evaluation.every
    best = False
    if recipe.evaluation.data and (done or (every and state.step % every == 0)):
        yield from _evaluate(run)
        best = any_of([state.notes.get(_BEST, [None])[0] == state.step], run.world)[0]
    if done or best or state.step % (recipe.save_every or run.steps_per_epoch) == 0:
        state.notes["watch"] = run.monitor.state()
        with _writing(run):
            folder = checkpoint.save_checkpoint(state, run.folder, first=run.world.first)
        if run.world.first:
            checkpoint.prune(run.folder, state.step, recipe.keep_last, state.notes.get(_BEST, [None])[0])
            yield CheckpointSaved(state.step, folder)
        barrier(run.world)


def _check_progress(run: TrainRun, learned: bool) -> None:
    """Raises SightloopError if no sample can be used, or no batch of the whole run had one to learn from."""
    run.idle = run.idle and not learned
    if run.idle and (len(run.skipped) >= len(run.dataset) or run.state.step == run.steps):
        raise SightloopError(
            f"no step had samples to learn from: {len(run.skipped):,} of {len(run.dataset):,} samples cannot be used "
            f"({run.folder / METRICS} has the reasons), and no batch of {run.recipe.data.batch} has the annotations "
            "that the objectives need; check the data, or set a larger data.batch"
        )


def _evaluate(run: TrainRun) -> Iterator[RunEvent]:
    """Evaluates on the first process; the others wait."""
    model = _current_model(run)
    if run.world.first:
        settings = run.recipe.evaluation
        data = open_dataset(settings.data)
        values, texts, drawings = validate(model, data, settings, boxes=run.recipe.data.regions > 0)
        write_drawings(run.folder, run.state.step, drawings)
        if keys := {key for key, _ in (*texts, *drawings)}:
            head = data.select(np.arange(min(settings.samples, len(data))))
            write_samples(run.folder, (sample for sample in head.stream() if sample.key in keys))
        trained = [name for name, weight in run.recipe.terms.items() if weight > 0]
        score = validation_score(values, trained)
        best = run.state.notes.get(_BEST)
        is_first = run.state.step == 0  # of the start; there is no checkpoint of it
        if score is not None and not is_first and (best is None or score > best[1]):
            run.state.notes[_BEST] = [run.state.step, score]
        yield Evaluated(run.state.step, values, texts, tuple(key for key, _ in drawings))
        message = at_chance(values, min(settings.samples, len(data)), trained)
        if message and not is_first and run.state.step >= run.steps // 2:
            yield WarningRaised(run.state.step, "evaluation", message)
    barrier(run.world)


def _current_model(run: TrainRun) -> Model:
    """A `Model` of the current weights, or of their EMA if there is one.

    All processes call together. A sharded network is complete on the first process and empty on the others.
    """
    source = run.model
    network = run.state.average if run.state.average is not None else run.state.network
    if run.fsdp is not None:
        network = run.fsdp.full_copy(network)
    return Model(
        name=source.name,
        network=require(network, Network),
        family=source.family,
        tokenizer=source.tokenizer,
        image_spec=source.image_spec,
        device=run.world.device,
        dtype=torch.float32,
        batch_size=32,
    )


def _calibrate(run: TrainRun, model: Model) -> Iterator[RunEvent]:
    """Calibrates the ITM threshold if the recipe asks for it."""
    if not calibrates(run.recipe):
        return
    settings = run.recipe.evaluation
    data = run.held_out if run.held_out is not None else open_dataset(settings.data)
    limit = len(data) if run.held_out is not None else settings.samples
    origin = run.state.step, "" if run.held_out is not None else settings.data
    yield calibrate(model, data, limit, origin, run.recipe.model.init_from) or WarningRaised(
        run.state.step,
        "calibration",
        "ITM's threshold is not calibrated, and unseen pairs will often score below 0.5: calibration needs "
        f"{MIN_IMAGES} captioned images of evaluation data, or 80 training images, a quarter of which is held out",
    )


def _save_model(run: TrainRun, model: Model, folder: Path) -> None:
    """Writes the result, in place of one that an interrupted run left; with LoRA, also the adapter alone."""
    if run.recipe.model.lora:
        adapter = run.folder / "adapter"
        shutil.rmtree(adapter, ignore_errors=True)
        save_lora(model.module, adapter)
        merge_lora(model.module)
    shutil.rmtree(folder, ignore_errors=True)
    save(model, folder)
    if len(run.dataset) <= _MAX_DIGESTS:
        learned = {*run.dataset.image_digests(), *learned_digests(run.recipe.model.init_from)}
        write_digests(folder, learned)


def _data_notes(run: TrainRun) -> Iterator[WarningRaised]:
    """What the sources leave out or how they are taken, at the start of a run."""
    if run.state.step > 0:
        return
    for note in run.dataset.notes:
        yield WarningRaised(0, "data", note)
    if run.recipe.evaluation.data:
        for note in open_dataset(run.recipe.evaluation.data).notes:
            yield WarningRaised(0, "evaluation.data", note)


def _warn_of_leaks(run: TrainRun) -> Iterator[RunEvent]:
    """Warns at the start of images and captions that are in both the training and the evaluation data."""
    settings = run.recipe.evaluation
    if not settings.data or not settings.leaks or run.state.step or not run.world.first:
        return
    other = open_dataset(settings.data)
    leaks = find_leaks(
        run.dataset.stream(), other.select(np.arange(min(settings.samples, len(other)))).stream()
    )
    if leaks:
        yield WarningRaised(0, "leakage", leaks.summary())


@contextmanager
def _writing(run: TrainRun) -> Generator[None]:
    """Turns errors of writing into a `SightloopError` with the remedy."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        reason = os_error_reason(error) if isinstance(error, OSError) else str(error)
        raise SightloopError(
            f"{run.folder}: cannot be written in step {run.state.step:,} ({reason}); free some space and repeat the "
            "same command: it resumes from the last checkpoint"
        ) from error


@contextmanager
def _fitting_memory(run: TrainRun) -> Generator[None]:
    """Turns a lack of memory into a `SightloopError` with the remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        data = run.recipe.data
        size = data.micro_batch or data.batch
        remedy = (
            f"repeat the same command with --set data.micro_batch={size // 2}, a smaller batch in memory with the "
            f"gradient of data.batch={data.batch}"
            if size > 1
            else "set a smaller data.max_tokens or model.image_size"
        )
        reason = str(error).partition("\n")[0]
        raise SightloopError(f"out of memory in step {run.state.step + 1:,}: {remedy} ({reason})") from error


@contextmanager
def _precision(name: str) -> Generator[None]:
    """Sets the precision of float32 matrix products, and restores it."""
    before = torch.get_float32_matmul_precision()
    if name == "medium":
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
