"""Times of this machine's kernels, kept between processes: the choice of `nn.kernels` is then made once.

They lie in `kernels-ID.json` of the cache folder, ID standing for the processor, torch and the number of threads. The
folder is SIGHTLOOP_CACHE_FOLDER, else `sightloop` in XDG_CACHE_HOME or ~/.cache. A file that cannot be read counts as
none, and a folder that cannot be written keeps nothing; deleting the file has everything timed anew. With
SIGHTLOOP_KERNELS=plain or packed nothing is timed, and all layers have that kernel.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Container, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import nn

from sightloop.data.atomic import write_json
from sightloop.errors import UsageError
from sightloop.nn.prepack import ROW_COUNTS, Shape, Times, add_times, measure, pin, pinned, timed_shapes

KERNELS_VARIABLE = "SIGHTLOOP_KERNELS"
FOLDER_VARIABLE = "SIGHTLOOP_CACHE_FOLDER"
_FORMAT = 1
_CPU_FIELDS = (
    "vendor_id",
    "cpu family",
    "model",
    "model name",
    "stepping",
    "cache size",
    "flags",
    "Features",
)


def time_kernels(net: nn.Module, dtype: torch.dtype, leave_out: Container[str] = ()) -> None:
    """Times the kernels of a network's linear layers, where neither this process nor an earlier one has.

    Args:
        net: the network, with or without its weights.
        dtype: of the weights.
        leave_out: names of parameters that are quantized.
    """
    time_shapes(timed_shapes(net, dtype, leave_out))


def time_shapes(shapes: Mapping[Shape, Iterable[int]]) -> None:
    """Times the kernels of shapes at their row counts, where neither this process nor an earlier one has.

    Raises:
        UsageError: SIGHTLOOP_KERNELS has another value than auto, plain or packed.
    """
    name = os.environ.get(KERNELS_VARIABLE) or "auto"
    if name not in ("auto", "plain", "packed"):
        raise UsageError(f"{KERNELS_VARIABLE}={name}: must be auto, plain or packed")
    pin(name)
    if pinned() is not None:
        return
    path = cache_folder() / f"kernels-{_machine_id()}.json"
    known = read_times(path)
    add_times(known)
    if new := measure(shapes):
        write_times(path, known | new)


def cache_folder() -> Path:
    """The folder of what can be made anew."""
    if own := os.environ.get(FOLDER_VARIABLE):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sightloop"


def read_times(path: Path) -> dict[str, Times]:
    """The times of a file; {} if there is none, or it is not one that this version wrote."""
    try:
        content = json.loads(path.read_text("utf-8"))
        times = content["times"] if content["format"] == _FORMAT else {}
        return times if all(_is_times(own) for own in times.values()) else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def write_times(path: Path, times: dict[str, Times]) -> None:
    """Writes a file whole, beside what others wrote into it since; nothing where the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        merged = read_times(path) | times
        write_json({"format": _FORMAT, "machine": _machine(), "times": merged}, path)
    except OSError:
        return


def _is_times(value: Mapping[str, Sequence[float]]) -> bool:
    """Whether a value of a file is seconds at each row count, for torch's kernel at least."""
    return "plain" in value and all(
        len(own) == len(ROW_COUNTS) and all(math.isfinite(t) and t >= 0 for t in own)
        for own in value.values()
    )


def _machine_id() -> str:
    described = json.dumps([_machine(), torch.get_num_threads()], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:12]


@cache
def _machine() -> dict[str, str]:
    """What the times depend on beside the threads."""
    described = {"torch": torch.__version__, "machine": platform.machine(), "processor": platform.processor()}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as opened:
            for line in opened:
                field, _, value = line.partition(":")
                if not line.strip():
                    break  # the first of the processors
                if field.strip() in _CPU_FIELDS:
                    described[field.strip()] = value.strip()
    except OSError:
        pass
    return described
