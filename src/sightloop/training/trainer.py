"""The one training loop. A recipe says what; this says how: batches, losses, gradients, steps, followers, checkpoints.

    for event in train(recipe, data, out): ...

Resuming, other numbers of processes and smaller chunks change nothing but rounding: all that is random is a function of
the seed and the step.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sightloop.data.datasets.dataset import open_dataset
from sightloop.data.datasets.leakage import find_leaks
from sightloop.errors import SightloopError
from sightloop.inference.malloc import keep_freed_memory
from sightloop.inference.model import Model
from sightloop.inference.save import save
from sightloop.nn.lora import merge_lora
from sightloop.protocols import Network, require
from sightloop.training import checkpoint
from sightloop.training.calibration import MIN_IMAGES, calibrate
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
from sightloop.training.log import RunLog
from sightloop.training.recipes import find_recipe
from sightloop.training.report import write_report, write_samples
from sightloop.training.run import TrainRun, calibrates, open_run
from sightloop.training.step import take_step
from sightloop.training.validation import at_chance, validate, validation_score

if TYPE_CHECKING:
    pass

_BEST = "best"


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
    """Train, yielding what happens (`run_events`); the result lies in OUT/model, which `load` reads.

    recipe: a name, a JSON file or a `Recipe`; settings: `change`s to it. data: what `open_dataset` reads. If OUT holds
    the same run, it goes on after its last checkpoint, as if it had never stopped. stop_after: steps of this call.
    Under `torchrun` every process calls this; the first one writes and yields.

    Raises UsageError before anything starts where settings, data and model do not fit, or OUT holds another run or
    one that is going on; SightloopError where the loss is no number any more.
    """
    recipe = apply_settings(find_recipe(recipe) if isinstance(recipe, str) else recipe, settings)
    ranks = init_world(device)
    if ranks.device.type == "cpu":
        keep_freed_memory()
    with ExitStack() as held:
        run = open_run(recipe, data, Path(out), ranks, held)
        held.enter_context(_precision(recipe.precision))
        log = None
        if ranks.first:
            log = held.enter_context(RunLog(run.folder, run.state.step, tensorboard=tensorboard))
        for event in _events(run, stop_after):
            if log is not None:
                log.write(event)
                if isinstance(event, (Evaluated, RunEnded)):
                    write_report(run.folder)
                yield event


def _events(run: TrainRun, stop_after: int | None) -> Iterator[RunEvent]:
    state, recipe, ranks = run.state, run.recipe, run.world
    parameters = [p for _, p in state.named_parameters()]
    yield RunStarted(
        recipe=recipe.name,
        steps=run.steps,
        batch=recipe.data.batch,
        samples=len(run.dataset),
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        first_step=state.step,
    )
    for text in run.damaged:
        yield WarningRaised(state.step, "checkpoint", text)
    yield from _warn_of_leaks(run)
    started = time.monotonic()
    labels = {label: i for i, label in enumerate(run.model.labels)}
    feed = BatchLoader(
        run.dataset,
        recipe.data,
        run.model.tokenizer,
        run.model.image_spec,
        recipe.seed,
        labels,
        ranks.rank,
        ranks.world_size,
        run.model.prompts if recipe.terms.get("prompted") else None,
    )
    last = run.steps if stop_after is None else min(run.steps, state.step + stop_after)
    for batch in feed.batches(state.step, last):
        yield from _train_step(run, batch)
    if state.step < run.steps:
        return
    model_folder = run.folder / "model"
    model = _model(run)
    if ranks.first:
        yield from _calibrate(run, model)
        _save_model(run, model, model_folder)
    barrier(ranks)
    yield RunEnded(state.step, time.monotonic() - started, model_folder)


def _train_step(run: TrainRun, batch: Batch) -> Iterator[RunEvent]:
    """One step, and what is due after it."""
    began = time.monotonic()
    state, recipe = run.state, run.recipe
    for key, reason in batch.skipped:
        if key not in run.skipped:
            run.skipped.add(key)
            yield SampleSkipped(key, reason)
    values, chances, speed = take_step(run, batch)
    state.step += 1
    event = StepDone(
        step=state.step,
        epoch=state.step * recipe.data.batch / len(run.dataset),
        loss=sum(recipe.terms[name] * values[name] for name in chances),
        values=values,
        chances=chances,
        lr=speed,
        seconds=time.monotonic() - began,
        samples=recipe.data.batch,
    )
    yield event
    yield from run.monitor.update(event)
    if run.monitor.fatal:
        raise SightloopError(
            f"step {state.step}: the loss or its gradient is no number any more; the last checkpoint is from before"
        )
    done = state.step == run.steps
    every = recipe.evaluation.every
    best = False
    if recipe.evaluation.data and (done or (every and state.step % every == 0)):
        yield from _evaluate(run)
        best = any_of([state.notes.get(_BEST, [None])[0] == state.step], run.world)[0]
    if done or best or state.step % (recipe.save_every or run.steps_per_epoch) == 0:
        state.notes["watch"] = run.monitor.state()
        folder = checkpoint.save_checkpoint(state, run.folder, first=run.world.first)
        if run.world.first:
            checkpoint.prune(run.folder, state.step, recipe.keep_last, state.notes.get(_BEST, [None])[0])
            yield CheckpointSaved(state.step, folder)
        barrier(run.world)


def _evaluate(run: TrainRun) -> Iterator[RunEvent]:
    """Only the first process; the others wait."""
    model = _model(run)
    if run.world.first:
        settings = run.recipe.evaluation
        data = open_dataset(settings.data)
        values, texts = validate(model, data, settings, boxes=run.recipe.data.regions > 0)
        if texts:
            shown = {key for key, _ in texts}
            head = data.select(np.arange(min(settings.samples, len(data))))
            write_samples(run.folder, (sample for sample in head.stream() if sample.key in shown))
        trained = [name for name, weight in run.recipe.terms.items() if weight > 0]
        reached = validation_score(values, trained)
        best = run.state.notes.get(_BEST)
        if reached is not None and (best is None or reached > best[1]):
            run.state.notes[_BEST] = [run.state.step, reached]
        yield Evaluated(run.state.step, values, texts)
        said = at_chance(values, min(settings.samples, len(data)), trained)
        if said and run.state.step >= run.steps // 2:
            yield WarningRaised(run.state.step, "evaluation", said)
    barrier(run.world)


def _model(run: TrainRun) -> Model:
    """The network as it is now (its average where there is one), with the verbs of a loaded one.

    All processes ask together; where the network is sharded, only the first gets one that is not empty.
    """
    trainee = run.model
    network = run.state.average if run.state.average is not None else run.state.network
    if run.fsdp is not None:
        network = run.fsdp.full_copy(network)
    return Model(
        name=trainee.name,
        network=require(network, Network),
        family=trainee.family,
        tokenizer=trainee.tokenizer,
        image_spec=trainee.image_spec,
        device=run.world.device,
        dtype=torch.float32,
        batch_size=32,
    )


def _calibrate(run: TrainRun, model: Model) -> Iterator[RunEvent]:
    """Set the threshold of the judge, where the recipe asks for it."""
    if not calibrates(run.recipe):
        return
    settings = run.recipe.evaluation
    data = run.held_out if run.held_out is not None else open_dataset(settings.data)
    most = len(data) if run.held_out is not None else settings.samples
    about = run.state.step, "" if run.held_out is not None else settings.data
    yield calibrate(model, data, most, about, run.recipe.model.init_from) or WarningRaised(
        run.state.step,
        "calibration",
        "ITM's threshold stays as it was learned, and unseen pairs will often fall below 0.5: setting it takes "
        f"{MIN_IMAGES} captioned images of the evaluation data, or 80 to learn from, of which a quarter is kept out",
    )


def _save_model(run: TrainRun, model: Model, folder: Path) -> None:
    """Write the result; one from an earlier life of this run is replaced."""
    if run.recipe.model.lora:
        merge_lora(model.module)
    shutil.rmtree(folder, ignore_errors=True)
    save(model, folder)


def _warn_of_leaks(run: TrainRun) -> Iterator[RunEvent]:
    """Say at the start whether what is evaluated on is also trained on."""
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
def _precision(name: str) -> Generator[None]:
    before = torch.get_float32_matmul_precision()
    if name == "medium":
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
