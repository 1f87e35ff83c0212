"""Exceptions of sightloop. Each message states the fact, then the remedy.

All of them derive from `SightloopError`, so `except sightloop.SightloopError` catches every error raised on purpose.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from inspect import signature
from typing import TypeVar

_T = TypeVar("_T")


class SightloopError(Exception):
    """Base class of every error that sightloop raises on purpose."""


class ImageError(SightloopError):
    """An image, or a sample of a dataset, that cannot be read.

    Attributes:
        name: File name, `<bytes>`, `<array>`, `<image>`, or the sample's key.
        reason: Cause in one line.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return (ImageError, (self.name, self.reason))


class CheckpointError(SightloopError):
    """A checkpoint that is absent, incomplete, damaged or of an unknown kind."""


class TokenizerError(SightloopError):
    """Tokenizer files that are absent, damaged or of an unknown kind."""


class UnsupportedError(SightloopError):
    """A request that this checkpoint does not support; the message names one that does."""


class UsageError(SightloopError, ValueError):
    """A wrong argument; the message gives its name, its value and what is allowed."""


def from_options(factory: Callable[..., _T], options: Mapping[str, object], noun: str = "option") -> _T:
    """Call `factory(**options)` after checking the option names.

    Args:
        factory: Dataclass or function.
        options: Keyword arguments by name.
        noun: What the error message calls an option.

    Raises:
        UsageError: An option that `factory` does not take; the message lists those that it takes.
    """
    known = signature(factory).parameters
    for name in options:
        if name not in known:
            raise UsageError(f"{name}: no such {noun}; there are {', '.join(known)}")
    return factory(**options)


def os_error_reason(error: OSError) -> str:
    """Cause of an `OSError` in lower case, without error number and file name ("no space left on device")."""
    # Arrow raises OSError without errno and with a text of its own.
    message = os.strerror(error.errno) if error.errno else error.strerror or str(error)
    return (message or type(error).__name__).lower()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is exhausted, of Python, of a GPU, or of torch on a CPU."""
    # torch.OutOfMemoryError is a RuntimeError; on a CPU torch raises a plain one. torch is not imported here.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "out of memory" in text.lower()
    )
