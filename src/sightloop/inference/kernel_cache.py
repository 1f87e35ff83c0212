"""Times of this machine's kernels, kept between processes: the choice of `nn.kernels` is then made once.

They lie in `kernels-ID.json` of the cache folder, ID standing for the processor, torch and the number of threads. The
folder is SIGHTLOOP_CACHE_FOLDER, else `sightloop` in XDG_CACHE_HOME or ~/.cache. A file that cannot be read counts as
none, and a folder that cannot be written keeps nothing; deleting the file has everything timed anew. With
SIGHTLOOP_KERNELS=plain or packed nothing is timed, and all layers have that kernel.

On a machine whose cores are taken by other programs the threads of a product wait for each other, and times of two
threads are off by up to a hundredfold. There the processor time of one thread counts, and it is measured again by the
first process that finds the cores free.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import threading
import time
from collections.abc import Container, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

import torch
from torch import nn

from sightloop.data.atomic import write_json
from sightloop.errors import UsageError
from sightloop.nn.prepack import (
    ROW_COUNTS,
    Shape,
    Times,
    add_times,
    is_known,
    measure,
    pin,
    pinned,
    timed_shapes,
)

KERNELS_VARIABLE = "SIGHTLOOP_KERNELS"
FOLDER_VARIABLE = "SIGHTLOOP_CACHE_FOLDER"
_FORMAT = 3  # of what is timed, too: times of an earlier one are measured anew
_BUDGET = 0.7  # processor seconds of a thread, for a network of so many weights or more
_BUDGET_WEIGHTS = 1 << 26
_PROBE_SECONDS, _PROBE_THREADS = 0.03, 16
_MIN_SHARE = 0.8  # of a core that each thread gets where the cores are free
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
    weights = sum(weight.numel() for weight in net.parameters())
    budget = _BUDGET * min(1.0, weights / _BUDGET_WEIGHTS)  # a small network would not earn more
    time_shapes(timed_shapes(net, dtype, leave_out), budget)


def time_shapes(shapes: Mapping[Shape, Iterable[int]], budget: float = _BUDGET) -> None:
    """Times the kernels of shapes at their row counts, where neither this process nor an earlier one has.

    Args:
        shapes: shape -> row counts.
        budget: processor seconds after which no further round begins.

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
    known, rough = read_times(path), read_rough(path)
    busy = None
    if wanted := rough & {shape.key for shape in shapes}:
        busy = is_busy()
        if not busy:
            known = {key: own for key, own in known.items() if key not in wanted}
    add_times(known)
    if is_known(shapes):
        return
    busy = is_busy() if busy is None else busy
    with _one_thread() if busy else nullcontext():
        new = measure(shapes, budget=budget)
    if new:
        write_times(path, new, rough=new.keys() if busy else ())


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


def read_rough(path: Path) -> set[str]:
    """The shapes of a file that were timed while other programs had the cores."""
    try:
        return set(map(str, json.loads(path.read_text("utf-8"))["rough"]))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return set()


def write_times(path: Path, times: Mapping[str, Times], rough: Iterable[str] = ()) -> None:
    """Writes a file whole, beside what others wrote into it since; nothing where the folder cannot be written.

    Args:
        path: the file.
        times: new times.
        rough: those of them that are to be measured again when the cores are free.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        merged = read_times(path) | dict(times)
        still_rough = sorted((read_rough(path) - times.keys()) | set(rough))
        content = {"format": _FORMAT, "machine": _machine(), "rough": still_rough, "times": merged}
        write_json(content, path)
    except OSError:
        return


def is_busy() -> bool:
    """Whether other programs have the cores: threads that only compute then get less than 80 % of one each."""
    shares: list[float] = []

    def compute() -> None:
        block = bytes(1 << 18)
        start, own = time.perf_counter(), time.thread_time()
        while (passed := time.perf_counter() - start) < _PROBE_SECONDS:
            hashlib.sha256(block)  # without the interpreter's lock
        shares.append((time.thread_time() - own) / passed)

    threads = [threading.Thread(target=compute) for _ in range(min(torch.get_num_threads(), _PROBE_THREADS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return min(shares) < _MIN_SHARE


@contextmanager
def _one_thread() -> Generator[None]:
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


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
