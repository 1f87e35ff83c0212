"""The state of a training run on disk: whole or absent, the last few and the best; reading one runs nothing.

There is one format for every number of processes, sharded or not: a safetensors file of whole tensors, which the first
process writes while the others hand it their parts, tensor by tensor. `torch.distributed.checkpoint` is not used: its
folders begin with a pickle (`.metadata`), which its reader runs.
"""

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

from sightloop.checkpoints.tensors import read_tensors
from sightloop.data.atomic import PREFIX, SUFFIX, atomic_path, sync_folder, write_json
from sightloop.errors import CheckpointError
from sightloop.training.distributed import full_tensor, local_shard, shard_like
from sightloop.types import JsonDict, JsonMapping

_NAME = re.compile(r"step-(\d+)")
# What safetensors calls them.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


@dataclass(eq=False)
class TrainState:
    """All that changes while a run goes on.

    teacher, average: followers of the network, None without. queue: past features by name. step: steps taken.
    notes: plain values of others that must go on too (the watch, the best score so far, where the queue writes).
    """

    network: nn.Module
    heads: nn.ModuleDict
    teacher: nn.Module | None
    average: nn.Module | None
    queue: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    step: int
    notes: JsonDict

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The network's and the heads' parameters, each once."""
        seen: set[int] = set()
        for prefix, module in (("network.", self.network), ("heads.", self.heads)):
            for name, parameter in module.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield prefix + name, parameter


def save_checkpoint(state: TrainState, run: Path, *, first: bool = True) -> Path:
    """RUN/checkpoints/step-000123: written under a temporary name, synced, then given its name in one step.

    All processes of a sharded run call this together; the `first` one writes.
    """
    folder = run / "checkpoints"
    target = folder / f"step-{state.step:06d}"
    # Wider types first, so that all are aligned; and all processes in one order.
    tensors = dict(sorted(_tensors(state).items(), key=lambda item: -item[1].element_size()))
    if not first:
        for tensor in tensors.values():
            full_tensor(tensor)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    sync_folder(run)
    temporary, former = (
        folder / f"{PREFIX}{target.name}-{os.getpid()}{end}{SUFFIX}" for end in ("", "-former")
    )
    for left in (temporary, former):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()
    try:
        _write_tensors(tensors, temporary / "state.safetensors")
        write_json({"step": state.step, "notes": state.notes}, temporary / "state.json")
        if target.exists():  # a damaged one, or of an earlier life of this run
            os.replace(target, former)
        os.replace(temporary, target)
        sync_folder(folder)
    finally:
        for left in (temporary, former):
            shutil.rmtree(left, ignore_errors=True)
    return target


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file of these in their order, with one at a time in memory."""
    header: JsonDict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        kind = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name] = kind
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, temporary.open("r+b") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            values = full_tensor(tensor).cpu().contiguous().flatten()
            file.write(cast(Any, values.view(torch.uint8).numpy()))


def resume(state: TrainState, run: Path) -> list[str]:
    """Put back the newest checkpoint that can be read, if there is one; what is said of newer, damaged ones.

    Raises CheckpointError where none can be read, or it is not of this run.
    """
    folders = _all(run)
    damaged: list[str] = []
    for step in sorted(folders, reverse=True):
        try:
            stored = _open(folders[step])
        except (OSError, ValueError, CheckpointError) as error:
            damaged.append(f"{folders[step]} is damaged ({str(error).partition(';')[0]})")
        else:
            _put(state, folders[step].name, *stored)
            return damaged
    if damaged:
        raise CheckpointError(
            f"no checkpoint can be read: {'; '.join(damaged)}; remove {run / 'checkpoints'} to start anew"
        )
    return []


def _open(folder: Path) -> tuple[Mapping[str, Tensor], int, JsonDict]:
    data = json.loads((folder / "state.json").read_text("utf-8"))
    if (
        not isinstance(data, dict)
        or not isinstance(data.get("step"), int)
        or not isinstance(data.get("notes"), dict)
    ):
        raise CheckpointError(f"{folder / 'state.json'}: holds no step and notes")
    return read_tensors([folder / "state.safetensors"]), data["step"], data["notes"]


@torch.no_grad()
def _put(state: TrainState, name: str, stored: Mapping[str, Tensor], step: int, notes: JsonDict) -> None:
    ours = _tensors(state)
    if different := sorted(set(ours) ^ set(stored)):
        raise CheckpointError(f"{name}: not of this run: {different[0]} is in one of them only")
    for key, tensor in ours.items():
        if tensor.shape != stored[key].shape:
            raise CheckpointError(f"{name}: not of this run: {key} is {tuple(stored[key].shape)}")
    for key, tensor in ours.items():
        local_shard(tensor).copy_(shard_like(stored[key], tensor))
    state.step = step
    state.notes.clear()
    state.notes.update(notes)


def prune(run: Path, step: int, keep: int, best: int | None) -> None:
    """Remove all but the last `keep` up to `step`, just written, and the best: what is later could not be read.

    What killed writers left goes too.
    """
    folders = _all(run)
    kept = {*sorted(each for each in folders if each <= step)[-keep:], best}
    for each in folders.keys() - kept:
        shutil.rmtree(folders[each], ignore_errors=True)
    for left in (run / "checkpoints").glob(f"{PREFIX}*{SUFFIX}"):
        shutil.rmtree(left, ignore_errors=True)


def _all(run: Path) -> dict[int, Path]:
    folder = run / "checkpoints"
    if not folder.is_dir():
        return {}
    named = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in named if match}


def _tensors(state: TrainState) -> dict[str, Tensor]:
    """Every tensor of the state, each once, by a name that says what it is."""
    out: dict[str, Tensor] = {name: parameter.detach() for name, parameter in state.named_parameters()}
    followers = {"teacher": state.teacher, "average": state.average}
    for prefix, module in followers.items():
        if module is not None:
            out |= {f"{prefix}.{name}": parameter.detach() for name, parameter in module.named_parameters()}
    for prefix, module in (followers | {"network": state.network}).items():
        for name, layer in () if module is None else module.named_modules():
            if isinstance(layer, nn.BatchNorm2d):  # its running statistics
                out |= {f"{prefix}.{name}.{key}": buffer for key, buffer in layer.named_buffers()}
    out |= {f"queue.{name}": tensor for name, tensor in state.queue.items()}
    for name, parameter in state.named_parameters():
        moments = cast("JsonMapping", state.optimizer.state.get(parameter, {}))
        out |= {
            f"optimizer.{name}.{key}": value for key, value in moments.items() if isinstance(value, Tensor)
        }
    return out


def init_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """What AdamW makes when a parameter first has a gradient, for all of them, so that every checkpoint is alike."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }
