"""RUN/metrics.jsonl: one event of a training run per line, readable after a kill; and TensorBoard events."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from sightloop.checkpoints.tensors import check_whole
from sightloop.data.atomic import atomic_write
from sightloop.data.journal import Journal, read_journal, write_journal
from sightloop.errors import CheckpointError, SightloopError, UsageError, install_command
from sightloop.training.events import (
    CheckpointSaved,
    Evaluated,
    RunEnded,
    RunEvent,
    RunStarted,
    SampleSkipped,
    StepDone,
    from_json,
    to_json,
)
from sightloop.types import JsonDict, JsonMapping

METRICS = "metrics.jsonl"
_SYNCED = (RunStarted, Evaluated, CheckpointSaved, RunEnded)


def checkpoint_folder(run: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:06d}"


def read_log(run: Path) -> Iterator[RunEvent]:
    """The events of RUN/metrics.jsonl in order; of an unfinished or killed run, up to the last whole line.

    Raises SightloopError where there is no log or a line in it is damaged.
    """
    for _, event in _lines(run / METRICS):
        yield event


def finished_run(run: Path) -> tuple[RunStarted, RunEnded] | None:
    """How a run began and ended, if it is finished and its model is whole; None otherwise. Imports no torch."""
    try:
        events = [event for event in read_log(run) if isinstance(event, RunStarted | RunEnded)]
    except (SightloopError, OSError):
        return None  # the trainer names what is damaged
    if len(events) < 2 or not _is_whole(run / "model"):
        return None
    started, ended = events[0], events[-1]
    if not (isinstance(started, RunStarted) and isinstance(ended, RunEnded)):
        return None
    return replace(started, first_step=ended.step), replace(ended, seconds=0.0, folder=run / "model")


def _is_whole(model: Path) -> bool:
    """Whether a model's folder has a configuration, and weights of the length that their header says."""
    try:
        check_whole(model / "model.safetensors")
    except CheckpointError:
        return False
    return (model / "config.json").is_file()


class RunLog:
    """Appends events to RUN/metrics.jsonl; each line is handed to the system at once, and synced at evaluations and
    checkpoints. Folders inside RUN are written relative to it.

    A run that resumes after step k has `resume_step` k: lines of later steps are cut, and what the run repeats of its
    start is not written twice. So the log of an interrupted run is that of an unbroken one, but for times.
    """

    def __init__(self, folder: Path, resume_step: int | None = None, *, tensorboard: bool = False) -> None:
        """Opens the log. tensorboard: also write RUN/tensorboard.

        Damaged lines of the log to go on with are left out, and named in `repairs`. Raises UsageError where a run
        begins (`resume_step` None) in a folder that has a log, or TensorBoard is not installed.
        """
        self.repairs: list[str] = []
        self._folder = folder
        self._known: set[str] = set()
        path = folder / METRICS
        writer = _writer() if tensorboard else None
        if resume_step is None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                atomic_write(path, b"", exclusive=True)
            except FileExistsError:
                raise UsageError(
                    f"{folder} holds a run already: resume it, or name another folder."
                ) from None
        else:
            write_journal(path, self._kept(path, resume_step))
        self._board = None if writer is None else _Board(writer, folder)
        self._journal = Journal(path, lambda line: None)

    def write(self, event: RunEvent) -> None:
        """Appends one event. Raises OSError where the disk is full or gone."""
        entry = self._entry(event)
        if _without_times(entry) in self._known:
            return
        self._journal.add(entry)
        if isinstance(event, _SYNCED):
            self._journal.sync()
        if self._board is not None:
            self._board.write(event)

    def close(self) -> None:
        self._journal.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _entry(self, event: RunEvent) -> JsonDict:
        if isinstance(event, CheckpointSaved | RunEnded) and event.folder is not None:
            folder = event.folder
            if folder.is_relative_to(self._folder):
                event = replace(event, folder=folder.relative_to(self._folder))
        return to_json(event)

    def _note_damage(self, problem: str) -> None:
        self.repairs.append(f"{problem}; the line is removed")

    def _kept(self, path: Path, last: int) -> Iterator[JsonDict]:
        """What an unbroken run would have written before its step `last` + 1."""
        saved = last == 0
        waiting: list[JsonDict] = []  # samples skipped on the way to a step belong to it
        for entry, event in _lines(path, self._note_damage) if path.exists() else ():
            if isinstance(event, SampleSkipped):
                waiting.append(entry)
                continue
            step = 0 if isinstance(event, RunStarted) else event.step
            if step > last:
                break
            if isinstance(event, RunEnded):  # this run resumes it
                continue
            yield from (*waiting, entry)
            self._known.update(map(_without_times, waiting))  # each sample is named once
            waiting.clear()
            saved = saved or (isinstance(event, CheckpointSaved) and step == last)
            if step in (0, last) and not isinstance(event, StepDone):
                self._known.add(_without_times(entry))
        # Killed when the checkpoint was whole and its line was not yet written.
        folder = checkpoint_folder(self._folder, last)
        if not saved and folder.is_dir():
            yield self._entry(CheckpointSaved(last, folder))


def _without_times(entry: JsonMapping) -> str:
    """An entry without what a resumed run says differently."""
    return json.dumps({name: entry[name] for name in entry if name not in ("seconds", "first_step")})


def _lines(path: Path, on_damage: Callable[[str], None] | None = None) -> Iterator[tuple[JsonDict, RunEvent]]:
    """The lines with their events. Damaged ones are given to `on_damage` and left out; without it they are an error."""
    if not path.is_file():
        raise SightloopError(f"{path}: no such file; a training run writes it into its folder")
    for line in read_journal(path):
        try:
            if line.entry is None:
                raise ValueError("not a JSON object")
            event = from_json(line.entry)
        except (ValueError, AttributeError, SightloopError) as error:
            problem = f"{path}, line {line.number}: {error}"
            if on_damage is None:
                raise SightloopError(f"{problem}; remove that line, or begin the run anew") from error
            on_damage(problem)
        else:
            yield line.entry, event


def _writer() -> Any:
    try:
        from tensorboard.summary import Writer
    except ImportError:
        raise UsageError(
            f"TensorBoard needs one more package: {install_command('train')}; or go without it: metrics.jsonl and "
            "report.html hold the same."
        ) from None
    return cast("Any", Writer)


class _Board:
    """The same events as TensorBoard's scalars, written anew from the log, so that nothing is in them twice."""

    def __init__(self, writer: Any, run: Path) -> None:
        folder = run / "tensorboard"
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = writer(str(folder))
        for event in read_log(run):
            self.write(event)

    def write(self, event: RunEvent) -> None:
        if isinstance(event, StepDone):
            numbers = {"loss": event.loss, "rate": event.lr, **event.values}
            if event.seconds > 0:
                numbers["samples_per_second"] = event.samples / event.seconds
            self._add({f"train/{name}": number for name, number in numbers.items()}, event.step)
        elif isinstance(event, Evaluated):
            self._add({f"evaluation/{name}": number for name, number in event.values.items()}, event.step)
            self._writer.flush()

    def _add(self, numbers: dict[str, float], step: int) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        self._writer.close()
