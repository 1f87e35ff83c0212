"""What became of each input of a folder job: done, skipped or failed. Every input gets exactly one of the three."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """The verb was applied to the picture `name`; `value` is what it gave."""

    name: str
    value: T


@dataclass(frozen=True, slots=True)
class Skipped:
    """The input needed no work; `reason` says why, as the end of a sentence ("it has a caption already")."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The input could not be worked on; `reason` says why and, where there is one, gives the remedy."""

    name: str
    reason: str


Event: TypeAlias = "Done[T] | Skipped | Failed"


def plain_reason(error: OSError) -> str:
    """The cause of an `OSError` in the system's words (Arrow has its own), without its number and file name."""
    said = os.strerror(error.errno) if error.errno else error.strerror or str(error)
    return (said or type(error).__name__).lower()
