"""The one training loop. A recipe says what; this says how: batches, losses, gradients, steps, followers, checkpoints.

    for event in train(recipe, data, out): ...

Resuming, other numbers of processes and smaller chunks change nothing but rounding: all that is random is a function of
the seed and the step.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sightread.data.atomic import working_in
from sightread.data.samples import Dataset, open_dataset
from sightread.errors import SightreadError, UsageError
from sightread.models.files import write_json
from sightread.nn.lora import add_lora, merge
from sightread.nn.training import checkpoint_blocks
from sightread.objectives.contrastive import enqueue
from sightread.pipelines import checkpoints, optimiser
from sightread.pipelines.calibration import FEWEST, calibrate, held_out
from sightread.pipelines.checkpoints import State
from sightread.pipelines.checkup import at_chance, measure, score
from sightread.pipelines.compiling import check_compiler, compile_blocks
from sightread.pipelines.features import Features
from sightread.pipelines.feed import Batch, Feed, on_device
from sightread.pipelines.leakage import find_leaks
from sightread.pipelines.memory import keep_freed_memory
from sightread.pipelines.model import Model
from sightread.pipelines.ranks import (
    Ranks,
    agree,
    any_of,
    clip_gradients,
    join,
    sum_gradients,
    sum_values,
    wait,
)
from sightread.pipelines.recipes import Recipe, change, find, from_json, to_json
from sightread.pipelines.run_events import Began, Ended, Evaluated, RunEvent, Saved, Skipped, Stepped, Warned
from sightread.pipelines.run_log import RunLog
from sightread.pipelines.run_report import write_report, write_samples
from sightread.pipelines.saving import save
from sightread.pipelines.terms import TERMS, Context
from sightread.pipelines.trainee import Trainee, prepare
from sightread.pipelines.watch import Watch, patience_for

if TYPE_CHECKING:
    from sightread.pipelines.sharding import Shards

_BEST = "best"


@dataclass(eq=False)
class Run:
    """Everything of a run that is going on."""

    recipe: Recipe
    folder: Path
    ranks: Ranks
    dataset: Dataset
    trainee: Trainee
    state: State
    shards: Shards | None
    steps: int
    watch: Watch
    damaged: list[str]
    held: Dataset | None  # kept out of the training, for calibration
    skipped: set[str] = field(default_factory=set[str])

    @property
    def steps_per_epoch(self) -> int:
        """Rounded, at least 1."""
        return max(1, round(len(self.dataset) / self.recipe.data.batch))


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
    one that is going on; SightreadError where the loss is no number any more.
    """
    recipe = change(find(recipe) if isinstance(recipe, str) else recipe, settings)
    ranks = join(device)
    if ranks.device.type == "cpu":
        keep_freed_memory()
    with ExitStack() as held:
        run = _open(recipe, data, Path(out), ranks, held)
        held.enter_context(_precision(recipe.precision))
        log = None
        if ranks.first:
            log = held.enter_context(RunLog(run.folder, run.state.step, tensorboard=tensorboard))
        for event in _events(run, stop_after):
            if log is not None:
                log.write(event)
                if isinstance(event, (Evaluated, Ended)):
                    write_report(run.folder)
                yield event


def _open(recipe: Recipe, data: str | Sequence[str], folder: Path, ranks: Ranks, held: ExitStack) -> Run:
    dataset = open_dataset(data)
    if dataset.is_stream:
        raise UsageError(
            f"{data}: a stream has no order to shuffle; `sightread convert` makes shards or a table of it"
        )
    if len(dataset) < 2:
        raise UsageError(f"{data}: {len(dataset)} samples; a training needs two at least")
    if recipe.compile:
        check_compiler(ranks.device)
    if ranks.first:
        held.enter_context(_claimed(folder, recipe, dataset))
    dataset, kept_out = held_out(dataset) if _holds_out(recipe) else (dataset, None)
    if ranks.first:
        trainee = prepare(recipe, dataset, folder)
    wait(ranks)
    if not ranks.first:
        trainee = prepare(recipe, dataset, folder)
    state, shards = _state(recipe, trainee, ranks)  # pyright: ignore[reportPossiblyUnboundVariable]
    steps = recipe.steps or max(1, math.ceil(recipe.epochs * len(dataset) / recipe.data.batch))
    damaged = checkpoints.resume(state, folder)
    if not agree([state.step], ranks):
        raise SightreadError(
            f"{folder}: processes find different checkpoints there; it must be one shared folder"
        )
    bounds = optimiser.CLAMPS if "siglip" not in recipe.terms else {}
    watch = Watch(patience=patience_for(steps), bounds=bounds, state=state.notes.get("watch"))
    return Run(recipe, folder, ranks, dataset, trainee, state, shards, steps, watch, damaged, kept_out)  # pyright: ignore[reportPossiblyUnboundVariable]


@contextmanager
def _claimed(folder: Path, recipe: Recipe, dataset: Dataset) -> Generator[None]:
    """Make the folder this run's, or make sure that it is. How often it evaluates and saves may change."""
    path = folder / "recipe.json"
    ours = {"recipe": to_json(recipe), "data": dataset.fingerprint}
    if path.exists():
        theirs = json.loads(path.read_text("utf-8"))
        if _essence(theirs) != _essence(ours):
            raise UsageError(f"{folder} holds a run with another recipe or other data; choose another --out")
    elif folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is there already and holds no run; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with working_in(folder):
        write_json(ours, path)
        yield


def _essence(stored: Mapping[str, Any]) -> dict[str, Any]:
    free = {"evaluation", "save_every", "keep", "shard"}
    recipe = from_json(stored["recipe"])  # settings that are newer than the run have their defaults
    kept = {name: value for name, value in to_json(recipe).items() if name not in free}
    return {"data": stored["data"], "recipe": kept, "holds out": _holds_out(recipe)}


def _calibrates(recipe: Recipe) -> bool:
    return recipe.calibrate and recipe.terms.get("itm", 0) > 0


def _holds_out(recipe: Recipe) -> bool:
    return _calibrates(recipe) and not recipe.evaluation.data


def _state(recipe: Recipe, trainee: Trainee, ranks: Ranks) -> tuple[State, Shards | None]:
    network = trainee.network
    if recipe.model.lora:
        add_lora(
            network,
            recipe.model.lora,
            rank=recipe.model.lora_rank,
            alpha=recipe.model.lora_alpha,
            seed=recipe.seed,
        )
    optimiser.freeze(network, recipe.model.frozen)
    if trainee.labels:  # new, and never frozen
        network.classes.requires_grad_(True)
    network.to(ranks.device).train()
    trainee.heads.to(ranks.device).train()
    checkpoint_blocks(network, recipe.recompute)
    if recipe.compile:
        compile_blocks(network)
    teaches = recipe.teacher.momentum > 0 and recipe.terms.get("itc", 0) > 0
    teacher = optimiser.copied(network) if teaches else None
    average = optimiser.copied(network) if recipe.ema else None
    shards = _shards(recipe, [one for one in (network, teacher, average) if one is not None], ranks)
    both = torch.nn.ModuleDict({"network": network, "heads": trainee.heads})
    state = State(
        network=network,
        heads=trainee.heads,
        teacher=teacher,
        average=average,
        queue=_queue(recipe, network, ranks) if teaches and recipe.teacher.queue else {},
        optimiser=optimiser.make(both, recipe.optimiser),
        step=0,
        notes={"pointer": 0},
    )
    checkpoints.make_moments(state.optimiser)
    return state, shards


def _shards(recipe: Recipe, networks: Sequence[torch.nn.Module], ranks: Ranks) -> Shards | None:
    if not recipe.shard or ranks.world == 1:
        return None
    from sightread.pipelines.sharding import Shards  # loads torch's distributed tensors, which takes a second

    return Shards(networks, ranks, bfloat16=recipe.precision == "bfloat16")


def _queue(recipe: Recipe, network: Any, ranks: Ranks) -> dict[str, Tensor]:
    """Random unit vectors at first, as in BLIP's released code; they belong to no sample."""
    random = torch.Generator().manual_seed(recipe.seed)
    shape = (recipe.teacher.queue, network.config.embed_dim)
    queue = {
        name: torch.nn.functional.normalize(torch.randn(shape, generator=random), dim=1).to(ranks.device)
        for name in ("image", "text")
    }
    return queue | {"ids": torch.full(shape[:1], -1, dtype=torch.int64, device=ranks.device)}


def _events(run: Run, stop_after: int | None) -> Iterator[RunEvent]:
    state, recipe, ranks = run.state, run.recipe, run.ranks
    parameters = [p for _, p in state.trained()]
    yield Began(
        recipe=recipe.name,
        steps=run.steps,
        batch=recipe.data.batch,
        samples=len(run.dataset),
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        first_step=state.step,
    )
    for text in run.damaged:
        yield Warned(state.step, "checkpoint", text)
    yield from _leaks(run)
    started = time.monotonic()
    labels = {label: i for i, label in enumerate(run.trainee.labels)}
    feed = Feed(
        run.dataset,
        recipe.data,
        run.trainee.tokenizer,
        run.trainee.image_spec,
        recipe.seed,
        labels,
        ranks.rank,
        ranks.world,
        run.trainee.forms if recipe.terms.get("prompted") else None,
    )
    last = run.steps if stop_after is None else min(run.steps, state.step + stop_after)
    for batch in feed.batches(state.step, last):
        yield from _one(run, batch)
    if state.step < run.steps:
        return
    model_folder = run.folder / "model"
    model = _model(run)
    if ranks.first:
        yield from _calibrate(run, model)
        _keep(run, model, model_folder)
    wait(ranks)
    yield Ended(state.step, time.monotonic() - started, model_folder)


def _one(run: Run, batch: Batch) -> Iterator[RunEvent]:
    """One step, and what is due after it."""
    began = time.monotonic()
    state, recipe = run.state, run.recipe
    for key, reason in batch.skipped:
        if key not in run.skipped:
            run.skipped.add(key)
            yield Skipped(key, reason)
    values, chances, speed = take_step(run, batch)
    state.step += 1
    event = Stepped(
        step=state.step,
        epoch=state.step * recipe.data.batch / len(run.dataset),
        loss=sum(recipe.terms[name] * values[name] for name in chances),
        values=values,
        chances=chances,
        rate=speed,
        seconds=time.monotonic() - began,
        samples=recipe.data.batch,
    )
    yield event
    yield from run.watch.see(event)
    if run.watch.fatal:
        raise SightreadError(
            f"step {state.step}: the loss or its gradient is no number any more; the last checkpoint is from before"
        )
    done = state.step == run.steps
    every = recipe.evaluation.every
    best = False
    if recipe.evaluation.data and (done or (every and state.step % every == 0)):
        yield from _evaluate(run)
        best = any_of([state.notes.get(_BEST, [None])[0] == state.step], run.ranks)[0]
    if done or best or state.step % (recipe.save_every or run.steps_per_epoch) == 0:
        state.notes["watch"] = run.watch.state()
        folder = checkpoints.write(state, run.folder, first=run.ranks.first)
        if run.ranks.first:
            checkpoints.prune(run.folder, state.step, recipe.keep, state.notes.get(_BEST, [None])[0])
            yield Saved(state.step, folder)
        wait(run.ranks)


def take_step(run: Run, batch: Batch) -> tuple[dict[str, float], dict[str, float], float]:
    """Losses, gradients and the optimiser's step for one batch: (values, chances, learning rate)."""
    state, recipe, ranks = run.state, run.recipe, run.ranks
    # Dropout and the like draw from torch's generator: it starts anew at every step, so that no state need be kept.
    torch.manual_seed(hash((recipe.seed, state.step, ranks.rank)) & 0x7FFFFFFF)
    network: Any = state.network
    if state.teacher is not None:
        optimiser.follow(state.teacher, network, recipe.teacher.momentum)
    speed = optimiser.rate(recipe.schedule, state.step, run.steps, run.steps_per_epoch, recipe.optimiser.lr)
    optimiser.set_rate(state.optimiser, speed)
    batch, pixels = on_device(batch, run.trainee.image_spec, ranks.device)
    done = state.step / max(1.0, recipe.teacher.alpha_epochs * run.steps_per_epoch)
    context = Context(
        network=network,
        teacher=state.teacher,
        heads=state.heads,
        recipe=recipe,
        batch=batch,
        pixels=pixels,
        queue=state.queue,
        alpha=recipe.teacher.alpha * min(1.0, done) if state.teacher is not None else 0.0,
        features=Features(recipe.data.chunk),
    )
    with _cast(recipe.precision, ranks.device), _gathered(run, batch):
        for name, weight in recipe.terms.items():
            if weight > 0:
                TERMS[name](context)
        context.features.finish()
    parameters = [p for _, p in state.trained() if p.requires_grad]
    sum_gradients(parameters, ranks)
    norm = clip_gradients(parameters, recipe.optimiser.clip_norm or math.inf)
    if math.isfinite(norm):
        state.optimiser.step()
    state.optimiser.zero_grad(set_to_none=True)
    optimiser.clamp_parameters(network, optimiser.CLAMPS if "siglip" not in recipe.terms else {})
    if state.average is not None:
        optimiser.follow(state.average, network, optimiser.ema(state.step, recipe.ema))
    if state.queue and context.fresh:
        _remember(state, context.fresh)
    values = sum_values({name: float(value) for name, value in context.values.items()}, ranks)
    return values | _facts(context) | {"gradient_norm": norm}, context.chances, speed


def _remember(state: State, fresh: Mapping[str, Tensor]) -> None:
    """The teacher's features of this batch take the place of the queue's oldest."""
    pointer = int(state.notes["pointer"])
    for name, queue in state.queue.items():
        state.notes["pointer"] = enqueue(queue, pointer, fresh[name])


def _facts(context: Context) -> dict[str, float]:
    """What the watch looks at beside the losses."""
    facts: dict[str, float] = {}
    for name in ("temperature", "logit_scale"):
        if isinstance(value := getattr(context.network, name, None), Tensor):
            facts[name] = float(value.detach())
    if {"itc", "clip", "siglip"} & set(context.values) and len(rows := context.pictures.detach().float()) > 1:
        mean = rows.mean(0)
        count = len(rows)
        facts["spread"] = 1 - float((mean.square().sum() * count - 1) / (count - 1))
    return facts


def _evaluate(run: Run) -> Iterator[RunEvent]:
    """Only the first process; the others wait."""
    model = _model(run)
    if run.ranks.first:
        settings = run.recipe.evaluation
        data = open_dataset(settings.data)
        values, texts = measure(model, data, settings, boxes=run.recipe.data.regions > 0)
        if texts:
            shown = {key for key, _ in texts}
            head = data.select(np.arange(min(settings.samples, len(data))))
            write_samples(run.folder, (sample for sample in head.stream() if sample.key in shown))
        trained = [name for name, weight in run.recipe.terms.items() if weight > 0]
        reached = score(values, trained)
        best = run.state.notes.get(_BEST)
        if reached is not None and (best is None or reached > best[1]):
            run.state.notes[_BEST] = [run.state.step, reached]
        yield Evaluated(run.state.step, values, texts)
        said = at_chance(values, min(settings.samples, len(data)), trained)
        if said and run.state.step >= run.steps // 2:
            yield Warned(run.state.step, "evaluation", said)
    wait(run.ranks)


def _model(run: Run) -> Model:
    """The network as it is now (its average where there is one), with the verbs of a loaded one.

    All processes ask together; where the network is sharded, only the first gets one that is not empty.
    """
    trainee = run.trainee
    network = run.state.average if run.state.average is not None else run.state.network
    if run.shards is not None:
        network = run.shards.whole(network)
    return Model(
        name=trainee.name,
        network=network,
        family=trainee.family,
        tokenizer=trainee.tokenizer,
        image_spec=trainee.image_spec,
        device=run.ranks.device,
        dtype=torch.float32,
        batch_size=32,
    )


def _calibrate(run: Run, model: Model) -> Iterator[RunEvent]:
    """Set the threshold of the judge, where the recipe asks for it."""
    if not _calibrates(run.recipe):
        return
    settings = run.recipe.evaluation
    data = run.held if run.held is not None else open_dataset(settings.data)
    most = len(data) if run.held is not None else settings.samples
    about = run.state.step, "" if run.held is not None else settings.data
    yield calibrate(model, data, most, about, run.recipe.model.start) or Warned(
        run.state.step,
        "calibration",
        "ITM's threshold stays as it was learned, and unseen pairs will often fall below 0.5: setting it takes "
        f"{FEWEST} captioned pictures of the evaluation data, or 80 to learn from, of which a quarter is kept out",
    )


def _keep(run: Run, model: Model, folder: Path) -> None:
    """Write the result; one from an earlier life of this run is replaced."""
    if run.recipe.model.lora:
        merge(model.network)
    shutil.rmtree(folder, ignore_errors=True)
    save(model, folder)


def _leaks(run: Run) -> Iterator[RunEvent]:
    """Say at the start whether what is evaluated on is also trained on."""
    settings = run.recipe.evaluation
    if not settings.data or not settings.leaks or run.state.step or not run.ranks.first:
        return
    other = open_dataset(settings.data)
    leaks = find_leaks(
        run.dataset.stream(), other.select(np.arange(min(settings.samples, len(other)))).stream()
    )
    if leaks:
        yield Warned(0, "leakage", leaks.summary())


@contextmanager
def _precision(name: str) -> Generator[None]:
    before = torch.get_float32_matmul_precision()
    if name == "medium":
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _gathered(run: Run, batch: Batch) -> AbstractContextManager[Any]:
    shards = run.shards
    return (
        nullcontext() if shards is None else shards.step(alike=shards.are_alike(batch, run.recipe.data.chunk))
    )


def _cast(name: str, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if name == "bfloat16" else nullcontext()
