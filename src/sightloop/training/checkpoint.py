"""Checkpoints of a training run: written by atomic rename; the last few and the best are kept.

One format for any number of processes, sharded or not: a safetensors file of full tensors and a JSON file. The first
process writes; sharded tensors are gathered one at a time. `torch.distributed.checkpoint` is not used, as its folders
begin with a pickle (`.metadata`), which its reader executes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b, file_digest
from pathlib import Path

import torch
from torch import Tensor, nn

from sightloop.checkpoints.tensors import read_tensors
from sightloop.data.atomic import TEMP_PREFIX, TEMP_SUFFIX, atomic_path, sync_folder, write_json
from sightloop.errors import CheckpointError
from sightloop.training.distributed import full_tensor, local_shard, shard_like
from sightloop.training.monitor import TrainingMonitor
from sightloop.types import JsonDict, JsonMapping

_NAME = re.compile(r"step-(\d+)")
# Names of dtypes in safetensors.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


@dataclass(eq=False)
class TrainState:
    """State of a training run: what a checkpoint holds.

    Args:
        network: in training.
        heads: modules that only training needs.
        teacher: momentum teacher, or None.
        average: EMA of the network, or None.
        queue: past features by name, `[Q, ...]`.
        optimizer: with its moments.
        step: steps done.
        notes: JSON values: "watch" (state of the monitor), "best" (step and score), "pointer" (next row of the queue).
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
        """Names and parameters of network and heads, each parameter once."""
        known: set[int] = set()
        for prefix, module in (("network.", self.network), ("heads.", self.heads)):
            for name, parameter in module.named_parameters():
                if id(parameter) not in known:
                    known.add(id(parameter))
                    yield prefix + name, parameter


def save_checkpoint(state: TrainState, run: Path, *, first: bool = True) -> Path:
    """Writes RUN/checkpoints/step-000123 under a temporary name, synced, then renames it atomically.

    Args:
        state: of the run; all processes call together.
        run: folder of the run.
        first: whether this process writes.

    Returns:
        The folder of the checkpoint.
    """
    folder = run / "checkpoints"
    target = folder / f"step-{state.step:06d}"
    # Wider dtypes first, so that all are aligned. All processes use the same order, as gathering is collective.
    tensors = dict(sorted(_tensors(state).items(), key=lambda item: -item[1].element_size()))
    if not first:
        for tensor in tensors.values():
            full_tensor(tensor)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    sync_folder(run)
    temporary, former = (
        folder / f"{TEMP_PREFIX}{target.name}-{os.getpid()}{end}{TEMP_SUFFIX}" for end in ("", "-former")
    )
    for left in (temporary, former):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()
    try:
        checksum = _write_tensors(tensors, temporary / "state.safetensors")
        record = {"step": state.step, "notes": state.notes, "blake2b": checksum}
        write_json(record | {"check": _check_of(record)}, temporary / "state.json")
        if target.exists():  # damaged, or left by an interrupted run
            os.replace(target, former)
        os.replace(temporary, target)
        sync_folder(folder)
    finally:
        for left in (temporary, former):
            shutil.rmtree(left, ignore_errors=True)
    return target


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> str:
    """Writes a safetensors file: 8 bytes length of the header (little-endian), the header as JSON, then the tensors.

    In the order of `tensors`, with one full tensor in memory at a time.

    Returns:
        Hexadecimal BLAKE2b digest of the file.
    """
    digest = blake2b(digest_size=16)
    header: JsonDict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligned to 8 bytes
    with atomic_path(path) as temporary, temporary.open("r+b") as file:
        head = len(text).to_bytes(8, "little") + text
        file.write(head)
        digest.update(head)
        for tensor in tensors.values():
            values = full_tensor(tensor).cpu().contiguous().flatten().view(torch.uint8).numpy().data
            file.write(values)
            digest.update(values)
    return digest.hexdigest()


def resume(state: TrainState, run: Path) -> list[str]:
    """Loads the newest checkpoint that can be read into `state`, if there is one.

    Args:
        state: of a new run, changed in place.
        run: folder of the run.

    Returns:
        A message for each newer checkpoint that is damaged.

    Raises:
        CheckpointError: none of the checkpoints can be read, or it belongs to another run.
    """
    folders = _checkpoints(run)
    damaged: list[str] = []
    for step in sorted(folders, reverse=True):
        try:
            stored = _read(folders[step])
        except (OSError, ValueError, CheckpointError) as error:
            damaged.append(f"{folders[step]} is damaged ({str(error).partition(';')[0]})")
        else:
            _load(state, folders[step].name, *stored)
            return damaged
    if damaged:
        raise CheckpointError(
            f"no checkpoint can be read: {'; '.join(damaged)}; remove {run / 'checkpoints'} to start anew"
        )
    return []


def _read(folder: Path) -> tuple[Mapping[str, Tensor], int, JsonDict]:
    path = folder / "state.json"
    try:
        record = json.loads(path.read_text("utf-8"))
    except RecursionError as error:
        raise CheckpointError(f"{path}: not the JSON of a checkpoint") from error
    if not isinstance(record, dict) or not _is_state(record):
        raise CheckpointError(f"{path}: lacks step or notes, or their values are of wrong types")
    if "check" in record and record.pop("check") != _check_of(record):
        raise CheckpointError(f"{path}: its checksum does not match")
    tensors = folder / "state.safetensors"
    if "blake2b" in record:
        with tensors.open("rb") as file:
            if file_digest(file, lambda: blake2b(digest_size=16)).hexdigest() != record["blake2b"]:
                raise CheckpointError(f"{tensors}: its checksum does not match")
    return read_tensors([tensors]), record["step"], record["notes"]


def _check_of(record: JsonMapping) -> str:
    """Hexadecimal digest of JSON values."""
    return blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()


def _is_state(record: JsonMapping) -> bool:
    """Whether step and notes have the types that a checkpoint writes."""
    step, notes = record.get("step"), record.get("notes")
    if type(step) is not int or step < 0 or not isinstance(notes, dict):
        return False
    best, watch, pointer = notes.get("best", [0, 0.0]), notes.get("watch"), notes.get("pointer", 0)
    if not isinstance(best, list) or [type(x) for x in best] not in ([int, float], [int, int]):
        return False
    try:
        TrainingMonitor(state=watch)
    except (TypeError, ValueError, AttributeError, OverflowError):
        return False
    return type(pointer) is int and pointer >= 0


@torch.no_grad()
def _load(state: TrainState, name: str, stored: Mapping[str, Tensor], step: int, notes: JsonDict) -> None:
    tensors = _tensors(state)
    if different := sorted(set(tensors) ^ set(stored)):
        raise CheckpointError(f"{name}: belongs to another run: {different[0]} is in one of the two only")
    for key, tensor in tensors.items():
        if tensor.shape != stored[key].shape:
            raise CheckpointError(f"{name}: belongs to another run: {key} is {tuple(stored[key].shape)}")
    for key, tensor in tensors.items():
        local_shard(tensor).copy_(shard_like(stored[key], tensor))
    state.step = step
    state.notes.clear()
    state.notes.update(notes)


def prune(run: Path, step: int, keep: int, best: int | None) -> None:
    """Removes old checkpoints, and temporary folders of killed processes.

    Args:
        run: folder of the run.
        step: of the newest checkpoint; later ones are damaged and are removed.
        keep: number of checkpoints to keep, at least 1.
        best: step of the best checkpoint, kept too; None if there is none.
    """
    folders = _checkpoints(run)
    kept = {*sorted(number for number in folders if number <= step)[-keep:], best}
    for number in folders.keys() - kept:
        shutil.rmtree(folders[number], ignore_errors=True)
    for left in (run / "checkpoints").glob(f"{TEMP_PREFIX}*{TEMP_SUFFIX}"):
        shutil.rmtree(left, ignore_errors=True)


def _checkpoints(run: Path) -> dict[int, Path]:
    """Step -> folder, damaged ones included."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return {}
    named = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in named if match}


def _tensors(state: TrainState) -> dict[str, Tensor]:
    """All tensors of the state by name: "network.*", "heads.*", "teacher.*", "average.*", "queue.*", "optimizer.*"."""
    tensors: dict[str, Tensor] = {name: parameter.detach() for name, parameter in state.named_parameters()}
    averages = {"teacher": state.teacher, "average": state.average}
    for prefix, module in averages.items():
        if module is not None:
            tensors |= {
                f"{prefix}.{name}": parameter.detach() for name, parameter in module.named_parameters()
            }
    for prefix, module in (averages | {"network": state.network}).items():
        for name, layer in () if module is None else module.named_modules():
            if isinstance(layer, nn.BatchNorm2d):  # its running statistics
                tensors |= {f"{prefix}.{name}.{key}": buffer for key, buffer in layer.named_buffers()}
    tensors |= {f"queue.{name}": tensor for name, tensor in state.queue.items()}
    for name, parameter in state.named_parameters():
        moments: JsonMapping = state.optimizer.state.get(parameter, {})
        tensors |= {
            f"optimizer.{name}.{key}": value for key, value in moments.items() if isinstance(value, Tensor)
        }
    return tensors


def init_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Creates AdamW's moments for all parameters, so that checkpoints have the same tensors at every step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }
