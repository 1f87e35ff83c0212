"""Exceptions of sightloop. Each message states the fact, then the remedy.

All of them derive from `SightloopError`, so `except sightloop.SightloopError` catches every error raised on purpose.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from inspect import signature
from numbers import Integral, Real
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
    """A checkpoint that is absent, incomplete, damaged, of an unknown kind, or whose numbers are not finite."""


class TokenizerError(SightloopError):
    """Tokenizer files that are absent, damaged or of an unknown kind."""


class UnsupportedError(SightloopError):
    """A request that this checkpoint does not support; the message names one that does."""


class UsageError(SightloopError, ValueError):
    """A wrong argument; the message gives its name, its value and what is allowed."""


def from_options(factory: Callable[..., _T], options: Mapping[str, object], noun: str = "option") -> _T:
    """Call `factory(**options)` after checking the option names, and the types of numbers, lists and mappings.

    Args:
        factory: Dataclass or function.
        options: Keyword arguments by name.
        noun: What the error message calls an option.

    Raises:
        UsageError: An option that `factory` does not take, in a message that lists those that it takes; text where a
            number, a list or a mapping is needed, or another wrong type.
    """
    check_options(factory, options, noun)
    return factory(**options)


def check_options(
    factory: Callable[..., object], options: Mapping[str, object], noun: str = "option"
) -> None:
    """The checks of `from_options` alone; arguments and errors as there."""
    known = signature(factory).parameters
    for name in options:
        if name not in known:
            raise UsageError(f"{name}: no such {noun}; there are {', '.join(known)}")
        _check_type(name, options[name], str(known[name].annotation))


def _check_type(name: str, value: object, annotation: str) -> None:
    """Raises `UsageError` unless a value can be what an annotation says.

    Args:
        name: Name of the option.
        value: Its value.
        annotation: As written: "int | None", "Sequence[str] | None".
    """
    kinds = [kind.strip() for kind in annotation.split("|")]
    if (value is None and "None" in kinds) or len(kinds) - ("None" in kinds) > 1:
        return
    numbers = {"int": (Integral, "a whole number"), "float": (Real, "a number")}
    for kind, (base, words) in numbers.items():
        if kinds[0] == kind and (isinstance(value, bool) or not isinstance(value, base)):
            raise UsageError(f"{name}={value!r}: must be {words}")
    if kinds[0] == "bool" and not isinstance(value, bool):
        raise UsageError(f"{name}={value!r}: must be True or False")
    if kinds[0] in ("JsonMapping", "JsonDict") and not isinstance(value, Mapping):
        raise UsageError(f"{name}={value!r}: must be a mapping, such as {{'num_beams': 3}}")
    if kinds[0].startswith("Sequence[") and not isinstance(value, Iterable):
        raise UsageError(f"{name}={value!r}: must be a list, such as {name}=[{value!r}]")
    if kinds[0] == "Sequence[int]" and isinstance(value, str):
        raise UsageError(f"{name}={value!r}: must be a list of whole numbers, such as {name}=[1, 16]")
    if kinds[0].startswith("Sequence["):
        refuse_string(name, value)


def refuse_string(name: str, texts: object) -> None:
    """Raises `UsageError`, with the list that is probably meant, if `texts` is a string where a list is needed.

    Args:
        name: Name of the argument, for the message: "labels".
        texts: Its value.
    """
    if isinstance(texts, str):
        entries = [entry.strip() for line in texts.splitlines() for entry in line.split(",") if entry.strip()]
        example = ", ".join(f'"{entry}"' for entry in entries[:3]) or '"a", "b"'
        raise UsageError(f"{name}={texts!r}: give a list of strings, such as {name}=[{example}]")


def install_command(extra: str) -> str:
    """The command that installs an extra; the package is installed from its source folder, not from an index.

    Args:
        extra: "heif", "evaluate", "ray" or "train".
    """
    return f"pip install '.[{extra}]' in the folder of sightloop's source"


def similar_path(path: str) -> str:
    """`; did you mean photos?` if a path that does not exist is close to a name in its folder, else nothing."""
    folder, name = os.path.split(path.rstrip(os.sep))
    try:
        close = get_close_matches(name, os.listdir(folder or "."), n=1, cutoff=0.75)
    except (OSError, ValueError):
        return ""
    return f"; did you mean {os.path.join(folder, close[0])}?" if close else ""


def os_error_reason(error: OSError) -> str:
    """Cause of an `OSError` in lower case, without error number and file name ("no space left on device")."""
    # Arrow raises OSError without errno and with its own text.
    message = os.strerror(error.errno) if error.errno else error.strerror or str(error)
    return (message or type(error).__name__).lower()


# errno -> remedy.
_REMEDIES = {
    errno.ENOSPC: "make room there, and run the same command again",
    errno.EDQUOT: "make room in your quota, and run the same command again",
    errno.EFBIG: "raise the limit of file size (ulimit -f), or write to another file system",
    errno.EROFS: "name a place that can be written to",
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.ENOENT: "check its name",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "check its name",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or use fewer --workers",
    errno.EIO: "check the disk, and run the same command again",
    errno.ENOMEM: "free memory, or use a smaller --batch-size",
    errno.ENAMETOOLONG: "use a shorter name",
}


def describe_os_error(error: OSError) -> str:
    """An `OSError` in one line: its file, the cause in words, and the remedy where there is a usual one."""
    name = error.filename2 or error.filename
    file = f"{os.fsdecode(name)}: " if isinstance(name, (str, bytes)) else ""
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{file}{os_error_reason(error)}{f': {remedy}' if remedy else ''}."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is exhausted, of Python, of a GPU, or of torch on a CPU."""
    # torch.OutOfMemoryError is a RuntimeError; on a CPU torch raises a plain one. torch is not imported here.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    causes = ("not enough memory", "out of memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, RuntimeError) and any(cause in text for cause in causes)
