"""Batch size: fixed, or grown while the memory that batches are seen to take fits; halved where memory runs out.

Imports torch only where a device other than the CPU has batches.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, TypeVar

from sightloop.errors import UsageError

if TYPE_CHECKING:
    import torch

S = TypeVar("S")
T = TypeVar("T")
BatchSize: TypeAlias = "int | Literal['auto']"

DEFAULT_SIZES: Final = {"cpu": 8}
_DEFAULT_SIZE: Final = 32  # of other devices
_MOST: Final = {"cpu": 64}  # a larger batch is no faster on a CPU
_MOST_ELSEWHERE: Final = 512
_SHARE: Final = 0.5  # of the memory that is free, for a batch; its reader and other programs have the rest


def default_size(device: torch.device | None) -> int:
    """Images at once where nobody says: 8 on a CPU, 32 elsewhere."""
    return DEFAULT_SIZES.get(_kind(device), _DEFAULT_SIZE)


def _kind(device: torch.device | None) -> str:
    return "cpu" if device is None else device.type


@dataclass(eq=False)
class BatchSizer:
    """Size of the batches of one run, and their calls.

    "auto" begins with one image and doubles the size as long as the memory that the last batch took, per image, says
    that twice as many fit into half of what is free: up to 64 on a CPU, 512 elsewhere. Where memory cannot be measured
    (neither CUDA nor Linux) "auto" is the device's default.

    Args:
        given: A size, or "auto".
        device: That the batches run on; None for the CPU.

    Attributes:
        size: Images of the next batch.

    Raises:
        UsageError: A size below 1.
    """

    given: BatchSize
    device: torch.device | None = None
    size: int = field(init=False)
    _most: int = field(init=False)
    _base: int | None = field(init=False, default=None)
    _running: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if self.given != "auto":
            if self.given < 1:
                raise UsageError(f"batch_size={self.given}: must be at least 1, or 'auto'")
            self.size = self._most = self.given
        elif free_memory(self.device) is None or used_memory(self.device) is None:
            self.size = self._most = default_size(self.device)
        else:
            self.size, self._most = 1, _MOST.get(_kind(self.device), _MOST_ELSEWHERE)

    @property
    def most_ahead(self) -> int:
        """Images that a reader makes ready ahead of a batch: those of the largest batch that may come, 64 at most."""
        return min(self._most, 64)

    @property
    def default(self) -> int:
        """The size where nothing is measured: the given one, or the device's default."""
        return default_size(self.device) if self.given == "auto" else self.given

    def run(self, call: Callable[[Sequence[S]], Sequence[T]], items: Sequence[S]) -> list[T]:
        """The results of `call` for all items: in halves, and from then on in smaller batches, where memory runs out.

        Raises:
            RuntimeError: Memory runs out even with one item. Also what else `call` raises.
        """
        if not items:
            return []
        outermost, self._running = not self._running, True
        growing = outermost and self.size < self._most
        if growing:
            self._begin()
        try:
            results = list(call(items))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or len(items) == 1:
                raise
            self.size = self._most = max(1, min(self.size, len(items) // 2))
        else:
            if growing and len(items) >= self.size:
                self._grow(len(items))
            return results
        finally:
            self._running = not outermost
        # Outside of the handler, whose traceback holds the tensors that did not fit.
        _release(self.device)
        done: list[T] = []
        while len(done) < len(items):
            done += self.run(call, items[len(done) : len(done) + self.size])
        return done

    def _begin(self) -> None:
        forget_peak(self.device)
        if self._base is None:  # memory that is kept from one batch to the next counts for both
            self._base = used_memory(self.device)

    def _grow(self, count: int) -> None:
        peak, free = peak_memory(self.device), free_memory(self.device)
        if peak is None or free is None or self._base is None:
            self._most = self.size
            return
        taken = max(0, peak - self._base)
        more = taken * 2 * self.size / count - max(0, (used_memory(self.device) or 0) - self._base)
        if more > _SHARE * free:
            self._most = self.size
        else:
            self.size = min(2 * self.size, self._most)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the device or on the CPU."""
    if not isinstance(error, MemoryError | RuntimeError):  # torch.OutOfMemoryError is a RuntimeError
        return False
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text


def free_memory(device: torch.device | None) -> int | None:
    """Bytes that can still be taken: of the device, or of this machine and its control group; None if not known."""
    if device is not None and device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if _kind(device) != "cpu":
        return None
    known = [_line_bytes(Path("/proc/meminfo"), "MemAvailable"), _control_group_free(Path("/sys/fs/cgroup"))]
    return min((value for value in known if value is not None), default=None)


def _control_group_free(folder: Path) -> int | None:
    """What the control group of a container leaves; files that it has cached can be dropped."""
    for limit, usage, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):
            most, used = (int((folder / name).read_text()) for name in (limit, usage))
            statistics = (folder / usage).with_name("memory.stat").read_text().split()
            dropped = dict(zip(statistics[::2], statistics[1::2], strict=False)).get(cached, "0")
            return max(0, most - used + int(dropped))
    return None


def used_memory(device: torch.device | None) -> int | None:
    """Bytes in use: of tensors on a CUDA device, of this process on Linux; None elsewhere."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device)
    return _line_bytes(Path("/proc/self/status"), "VmRSS") if _kind(device) == "cpu" else None


def peak_memory(device: torch.device | None) -> int | None:
    """The most that `used_memory` was since `forget_peak`."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return _line_bytes(Path("/proc/self/status"), "VmHWM") if _kind(device) == "cpu" else None


def forget_peak(device: torch.device | None) -> None:
    """Begin to measure `peak_memory` anew. Where the system forbids it, the peak is that of the whole process."""
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    elif _kind(device) == "cpu":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _release(device: torch.device | None) -> None:
    gc.collect()
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.empty_cache()


def _line_bytes(path: Path, name: str) -> int | None:
    """The value of a line such as "VmRSS:   123 kB", in bytes."""
    with suppress(OSError, ValueError, StopIteration):
        return next(
            int(line.split()[1]) * 1024 for line in path.read_text().splitlines() if line.startswith(name)
        )
    return None
