"""Batch size: fixed, or grown while the memory that batches are seen to take fits; halved where memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, Protocol, TypeAlias, TypeVar

from sightloop.errors import UsageError

S = TypeVar("S")
T = TypeVar("T")
BatchSize: TypeAlias = "int | Literal['auto']"

_SHARE: Final = 0.5  # of the memory that is free, for a batch; its reader and other programs have the rest


class Memory(Protocol):
    """Memory that batches take: of this process, or of a device.

    Attributes:
        default_size: Images at once where nobody says.
        largest_size: Images at once, at most, of "auto".
    """

    default_size: int
    largest_size: int

    def free(self) -> int | None:
        """Bytes that can still be taken; None if not known."""
        ...

    def used(self) -> int | None:
        """Bytes in use; None if not known."""
        ...

    def peak(self) -> int | None:
        """The most that `used` was since `forget_peak`."""
        ...

    def forget_peak(self) -> None:
        """Begin to measure `peak` anew."""
        ...

    def release(self) -> None:
        """Give back what is kept for later, after a batch that did not fit."""
        ...


class ProcessMemory:
    """Memory of this process, on Linux; elsewhere nothing is known of it."""

    default_size = 8
    largest_size = 64  # a larger batch is no faster on a CPU

    def free(self) -> int | None:
        """Bytes that this machine and the control group of a container still have."""
        machine = _line_bytes(Path("/proc/meminfo"), "MemAvailable")
        known = [machine, _control_group_free(Path("/sys/fs/cgroup"))]
        return min((value for value in known if value is not None), default=None)

    def used(self) -> int | None:
        """Bytes of this process in memory."""
        return _line_bytes(Path("/proc/self/status"), "VmRSS")

    def peak(self) -> int | None:
        """The most that `used` was since `forget_peak`; where the system forbids that, since the process began."""
        return _line_bytes(Path("/proc/self/status"), "VmHWM")

    def forget_peak(self) -> None:
        """Begin to measure `peak` anew."""
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def release(self) -> None:
        """Collect what nobody refers to."""
        gc.collect()


@dataclass(eq=False)
class BatchSizer:
    """Size of the batches of one run, and their calls.

    "auto" begins with one image and doubles the size as long as the memory that the last batch took, per image, says
    that twice as many fit into half of what is free: up to 64 on a CPU, 512 on a GPU. Where memory cannot be measured
    (neither CUDA nor Linux) "auto" is the device's default.

    Args:
        setting: A size, or "auto".
        memory: What the batches take.

    Attributes:
        size: Images of the next batch.

    Raises:
        UsageError: A size below 1.
    """

    setting: BatchSize
    memory: Memory = field(default_factory=ProcessMemory)
    size: int = field(init=False)
    _most: int = field(init=False)
    _base: int | None = field(init=False, default=None)
    _running: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if self.setting != "auto":
            if self.setting < 1:
                raise UsageError(f"batch_size={self.setting}: must be at least 1, or 'auto'")
            self.size = self._most = self.setting
        elif self.memory.free() is None or self.memory.used() is None:
            self.size = self._most = self.memory.default_size
        else:
            self.size, self._most = 1, self.memory.largest_size

    @property
    def most_ahead(self) -> int:
        """Images that a reader makes ready ahead of a batch: those of the largest batch that may come, 64 at most."""
        return min(self._most, 64)

    @property
    def default(self) -> int:
        """The size where nothing is measured: the setting, or the device's default."""
        return self.memory.default_size if self.setting == "auto" else self.setting

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
        self.memory.release()
        done: list[T] = []
        while len(done) < len(items):
            done += self.run(call, items[len(done) : len(done) + self.size])
        return done

    def _begin(self) -> None:
        self.memory.forget_peak()
        if self._base is None:  # memory that is kept from one batch to the next counts for both
            self._base = self.memory.used()

    def _grow(self, count: int) -> None:
        peak, free = self.memory.peak(), self.memory.free()
        if peak is None or free is None or self._base is None:
            self._most = self.size
            return
        taken = max(0, peak - self._base)
        more = taken * 2 * self.size / count - max(0, (self.memory.used() or 0) - self._base)
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


def _line_bytes(path: Path, name: str) -> int | None:
    """The value of a line such as "VmRSS:   123 kB", in bytes."""
    with suppress(OSError, ValueError, StopIteration):
        return next(
            int(line.split()[1]) * 1024 for line in path.read_text().splitlines() if line.startswith(name)
        )
    return None
