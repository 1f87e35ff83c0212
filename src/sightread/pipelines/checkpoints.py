"""The state of a training run on disk: whole or absent, the last few and the best; reading one runs nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sightread.data.atomic import PREFIX, SUFFIX
from sightread.errors import CheckpointError
from sightread.models.files import read_tensors, write_json, write_safetensors

_NAME = re.compile(r"step-(\d+)")


@dataclass(eq=False)
class State:
    """All that changes while a run goes on.

    teacher, average: followers of the network, None without. queue: past features by name. step: steps taken.
    notes: plain values of others that must go on too (the watch, the best score so far, where the queue writes).
    """

    network: nn.Module
    heads: nn.ModuleDict
    teacher: nn.Module | None
    average: nn.Module | None
    queue: dict[str, Tensor]
    optimiser: torch.optim.Optimizer
    step: int
    notes: dict[str, Any]

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The network's and the heads' parameters, each once."""
        seen: set[int] = set()
        for prefix, module in (("network.", self.network), ("heads.", self.heads)):
            for name, parameter in module.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield prefix + name, parameter


def write(state: State, run: Path) -> Path:
    """RUN/checkpoints/step-000123: written under a temporary name, synced, then given its name in one step."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{state.step:06d}"
    temporary = folder / f"{PREFIX}{target.name}-{os.getpid()}{SUFFIX}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write_safetensors(
            {name: value.detach() for name, value in _tensors(state).items()}, temporary / "state.safetensors"
        )
        write_json({"step": state.step, "notes": state.notes}, temporary / "state.json")
        if target.exists():  # of an earlier life of this run, which went back further
            shutil.rmtree(target)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def read(state: State, folder: Path) -> None:
    """Put the state back as it was, in place. Raises CheckpointError that names what does not fit."""
    data = json.loads((folder / "state.json").read_text("utf-8"))
    stored = read_tensors([folder / "state.safetensors"])
    ours = _tensors(state)
    if different := sorted(set(ours) ^ set(stored)):
        raise CheckpointError(f"{folder.name}: not of this run: {different[0]} is in one of them only")
    for name, tensor in ours.items():
        if tensor.shape != stored[name].shape:
            raise CheckpointError(f"{folder.name}: not of this run: {name} is {tuple(stored[name].shape)}")
        with torch.no_grad():
            tensor.copy_(stored[name])
    state.step = int(data["step"])
    state.notes.clear()
    state.notes.update(data["notes"])


def latest(run: Path) -> Path | None:
    """The whole checkpoint with the most steps."""
    found = _all(run)
    return found[max(found)] if found else None


def prune(run: Path, keep: int, best: int | None) -> None:
    """Remove all but the last `keep` and the best, and what killed writers left."""
    found = _all(run)
    for step in sorted(found)[:-keep]:
        if step != best:
            shutil.rmtree(found[step], ignore_errors=True)
    for left in (run / "checkpoints").glob(f"{PREFIX}*{SUFFIX}"):
        shutil.rmtree(left, ignore_errors=True)


def _all(run: Path) -> dict[int, Path]:
    folder = run / "checkpoints"
    if not folder.is_dir():
        return {}
    named = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in named if match}


def _tensors(state: State) -> dict[str, Tensor]:
    """Every tensor of the state, each once, by a name that says what it is."""
    out: dict[str, Tensor] = {name: parameter.data for name, parameter in state.trained()}
    followers = {"teacher": state.teacher, "average": state.average}
    for prefix, module in followers.items():
        if module is not None:
            out |= {f"{prefix}.{name}": parameter.data for name, parameter in module.named_parameters()}
    out |= {f"queue.{name}": tensor for name, tensor in state.queue.items()}
    for name, parameter in state.trained():
        moments = cast("Mapping[str, Any]", state.optimiser.state.get(parameter, {}))
        out |= {
            f"optimiser.{name}.{key}": value for key, value in moments.items() if isinstance(value, Tensor)
        }
    return out


def make_moments(optimiser: torch.optim.Optimizer) -> None:
    """What AdamW makes when a parameter first has a gradient, for all of them, so that every checkpoint is alike."""
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            if not optimiser.state[parameter]:
                optimiser.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }
