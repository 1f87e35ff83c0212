"""The exceptions that a caller may want to catch. Each message states the fact, then the remedy.

All of them are `SightloopError`, so `except sightloop.SightloopError` is enough for a program that only reports.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from inspect import signature
from typing import TypeVar

_T = TypeVar("_T")


class SightloopError(Exception):
    """Base of every error that sightloop raises on purpose."""


class ImageError(SightloopError):
    """One image, or one sample of a dataset, cannot be read. `reason` says why, `name` says which: a file name,
    `<bytes>`, `<array>`, or the sample's key."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return (ImageError, (self.name, self.reason))


class CheckpointError(SightloopError):
    """A checkpoint is absent, incomplete, damaged or of a kind that is not known."""


class TokenizerError(SightloopError):
    """Tokenizer files are absent, damaged or of a kind that is not known."""


class UnsupportedError(SightloopError):
    """This checkpoint cannot do what was asked; the message names one that can."""


class UsageError(SightloopError, ValueError):
    """An argument is wrong: its name, its value and what is allowed are in the message."""


def from_options(kind: Callable[..., _T], options: Mapping[str, object], what: str = "option") -> _T:
    """An object made from keyword arguments.

    Args:
        kind: its class.
        options: keyword arguments.
        what: word for one of them in the message.

    Raises:
        UsageError: an option that the class does not take; it lists those that it takes.
    """
    known = signature(kind).parameters
    for name in options:
        if name not in known:
            raise UsageError(f"{name}: no such {what}; there are {', '.join(known)}")
    return kind(**options)


def plain_reason(error: OSError) -> str:
    """The cause of an `OSError` in the system's words (Arrow has its own), without its number and file name."""
    reason = os.strerror(error.errno) if error.errno else error.strerror or str(error)
    return (reason or type(error).__name__).lower()
