"""A disk that fails on purpose: the n-th write, fsync, rename or opening of files below a folder."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CALLS = ("write", "fsync", "replace", "open")


class Fault:
    """calls: how many there were. The n-th of them fails, or all from the n-th on."""

    def __init__(self, folder: Path, n: int, lasting: bool) -> None:
        self.folder, self.n, self.lasting, self.calls = str(folder), n, lasting, 0

    def meet(self, path: Any) -> None:
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.folder):
            self.calls += 1
            if self.calls == self.n or (self.lasting and self.calls > self.n):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))

    @property
    def struck(self) -> bool:
        return self.calls >= self.n


@contextmanager
def failing(call: str, folder: Path, n: int, lasting: bool = False) -> Iterator[Fault]:
    """While it lasts, one kind of call goes wrong."""
    fault = Fault(folder, n, lasting)
    real_open, real_os_open, real_fsync, real_replace = io.open, os.open, os.fsync, os.replace

    class Raw(io.FileIO):
        def write(self, data: Any, /) -> int:
            fault.meet(self.name)
            return super().write(data)

    def opened(file: Any, mode: str = "r", buffering: int = -1, *more: Any, **named: Any) -> Any:
        if not set(mode) & set("wax+"):
            return real_open(file, mode, buffering, *more, **named)
        if call == "open":
            fault.meet(file)
        if call != "write":
            return real_open(file, mode, buffering, *more, **named)
        raw = Raw(file, mode.replace("b", ""))
        if buffering == 0:
            return raw
        whole = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return whole if "b" in mode else io.TextIOWrapper(whole, *more, **named)

    def os_open(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY):
            fault.meet(path)
        return real_os_open(path, flags, *more, **named)

    def fsync(file: int) -> None:
        fault.meet(os.readlink(f"/proc/self/fd/{file}"))
        real_fsync(file)

    def replace(source: Any, target: Any) -> None:
        fault.meet(target)
        real_replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        if call in ("open", "write"):
            patch.setattr(io, "open", opened)
            patch.setattr(builtins, "open", opened)
        if call == "open":
            patch.setattr(os, "open", os_open)
        if call == "fsync":
            patch.setattr(os, "fsync", fsync)
        if call == "replace":
            patch.setattr(os, "replace", replace)
        yield fault
