"""What the processes of test_trainer.py and test_fsdp.py do; each is a process of `tests.forked`."""

from __future__ import annotations

import json
import os
import signal
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sightloop.training import trainer
from sightloop.training.events import Evaluated, StepDone


def train_until_killed(data: str, out: str, settings: Sequence[str], last: int) -> None:
    """A run that dies after a step, as of `kill -9`."""
    for event in trainer.train("world", data, out, settings=settings, device="cpu"):
        if isinstance(event, StepDone) and event.step == last:
            os.kill(os.getpid(), signal.SIGKILL)


def record_samples(data: str, out: str, settings: Sequence[str]) -> None:
    """A run that writes `rank-0.json` ...: of each step the process's samples and the values that it reports."""
    seen: list[Any] = []
    take = trainer.take_step

    def spy(run: Any, batch: Any) -> Any:
        values = take(run, batch)
        seen.append(([int(i) for i in batch.sample_indices], values[0]))
        return values

    trainer.take_step = spy
    for _ in trainer.train("world", data, out, settings=settings, device="cpu"):
        pass
    rank = dist.get_rank() if dist.is_initialized() else 0
    (Path(out) / f"rank-{rank}.json").write_text(json.dumps(seen))


def record_losses(jobs: Sequence[tuple[str, str, Sequence[str], int | None]], written: str) -> None:
    """Runs one after the other; the first process writes what it saw of each. A warning is an error.

    Args:
        jobs: data, folder, settings, and the step after which it stops or None.
        written: the JSON file, a list with one entry a job.
    """
    import sightloop.training.fsdp as sharding

    warnings.simplefilter("error")
    alike: list[bool] = []
    runs_alike = sharding.FSDP.runs_alike

    def spy(*given: Any) -> bool:
        alike.append(runs_alike(*given))
        return alike[-1]

    sharding.FSDP.runs_alike = spy  # type: ignore[method-assign]
    runs: list[dict[str, list[Any]]] = []
    for data, out, settings, stop in jobs:
        alike.clear()
        found: dict[str, list[Any]] = {"losses": [], "norms": [], "evaluated": []}
        for event in trainer.train("world", data, out, settings=settings, device="cpu", stop_after=stop):
            if isinstance(event, StepDone):
                found["losses"].append(event.loss)
                found["norms"].append(event.values["gradient_norm"])
            if isinstance(event, Evaluated):
                found["evaluated"].append(event.values)
            print(type(event).__name__, getattr(event, "step", ""), flush=True)
        runs.append({**found, "alike": list(alike)})
    if dist.get_rank() == 0:
        Path(written).write_text(json.dumps(runs))
    dist.destroy_process_group()
