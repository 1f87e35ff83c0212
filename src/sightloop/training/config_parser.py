"""Parser of frozen dataclasses from plain values (JSON, command line); names and types are checked."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from inspect import signature
from typing import Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sightloop.errors import UsageError
from sightloop.types import JsonDict, JsonMapping

T = TypeVar("T")


def set_option(
    data: JsonDict,
    path: str,
    text: str,
    *,
    defaults: Mapping[str, Callable[[], JsonDict]],
    free: Collection[str] = (),
) -> None:
    """Sets one value of nested settings, in place.

    Args:
        data: settings as nested dicts.
        path: of the value, such as "optimizer.lr".
        text: JSON, or else taken as text.
        defaults: path -> values of a group that is None before one of its settings is set.
        free: paths below which new names may be set.

    Raises:
        UsageError: unknown name (the message gives the nearest one), or a value has settings below it.
    """
    *names, last = path.split(".")
    root = data
    for depth, name in enumerate(names, start=1):
        where = ".".join(names[:depth])
        if data.get(name) is None and where in defaults:
            data[name] = defaults[where]()
        if name not in data:
            raise UsageError(
                f"--set {path}: no such setting{_suggest_path(path, data, where, root, defaults)}"
            )
        if not isinstance(data[name], dict):
            raise UsageError(f"--set {where}: is one value and has no settings below it")
        data = data[name]
    if last not in data and ".".join(names) not in free:
        raise UsageError(f"--set {path}: no such setting{_suggest_path(path, data, path, root, defaults)}")
    try:
        data[last] = json.loads(text)
    except ValueError:
        data[last] = text


def _suggest_path(
    path: str,
    siblings: JsonMapping,
    where: str,
    root: JsonMapping,
    defaults: Mapping[str, Callable[[], JsonDict]],
) -> str:
    """The setting that a wrong path stands for, by its whole name; else the names that there are at this place.

    Args:
        path: the whole path.
        siblings: settings at the place of its first wrong name.
        where: the path up to that name.
        root: all settings.
        defaults: as in `set_option`.
    """
    paths = list(_all_paths(root, defaults))
    last = path.rpartition(".")[2]
    ends = [known for known in paths if known.rpartition(".")[2] == last]
    names = [name.rpartition(".")[2] for name in paths]
    prefix = where[: where.rfind(".") + 1]
    close = (
        difflib.get_close_matches(path, ends, n=1, cutoff=0)
        or [prefix + name for name in difflib.get_close_matches(where.removeprefix(prefix), siblings, n=1)]
        or [paths[names.index(name)] for name in difflib.get_close_matches(last, names, n=1, cutoff=0.76)]
    )
    if close:
        return f"; did you mean {close[0]}?"
    return "; choose from " + ", ".join(f"{prefix}{name}" for name in siblings)


def _all_paths(
    data: JsonMapping, defaults: Mapping[str, Callable[[], JsonDict]], prefix: str = ""
) -> Iterator[str]:
    for name, value in data.items():
        path = f"{prefix}{name}"
        yield path
        inner = defaults[path]() if value is None and path in defaults else value
        if isinstance(inner, dict):
            yield from _all_paths(inner, defaults, f"{path}.")


def _suggest(name: str, names: Iterable[str], path: str) -> str:
    prefix = path.rpartition(" ")[2]  # without the name of a file before it
    close = difflib.get_close_matches(name, list(names), n=1)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    return "; choose from " + ", ".join(f"{prefix}{name}" for name in names)


def from_dict(kind: Callable[..., T], data: JsonMapping, path: str) -> T:
    """A dataclass from plain values.

    Args:
        kind: the dataclass.
        data: field -> value; fields may be missing.
        path: prefix of the names in messages.

    Raises:
        UsageError: a field is unknown or missing, or a value is of the wrong type or not finite.
    """
    hints = get_type_hints(kind)
    if unknown := sorted(set(data) - set(hints)):
        raise UsageError(f"{path}{unknown[0]}: no such setting{_suggest(unknown[0], hints, path)}")
    values = {name: _convert(hints[name], value, f"{path}{name}") for name, value in data.items()}
    for name, parameter in signature(kind).parameters.items():
        if name not in values and parameter.default is parameter.empty:
            raise UsageError(f"{path}{name}: this setting is missing")
    return kind(**values)


def _convert(hint: object, value: object, path: str) -> object:
    """The value as a type hint asks for it: lists become tuples, whole numbers floats."""
    origin, args = get_origin(hint), get_args(hint)
    wrong = UsageError(f"{path}={json.dumps(value)}: must be {_describe(hint)}")
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(arg for arg in args if arg is not type(None)), value, path)
    if origin is Literal:
        if value not in args:
            raise wrong
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise wrong
        return from_dict(hint, value, f"{path}.")
    if origin is tuple:
        return _convert_tuple(args, value, path, wrong)
    if origin is frozenset:
        if not isinstance(value, (list, tuple)):
            raise wrong
        return frozenset(_convert(args[0], item, path) for item in value)
    if origin is not None:  # Mapping[str, X]
        if not isinstance(value, Mapping):
            raise wrong
        return {name: _convert(args[1], item, f"{path}.{name}") for name, item in value.items()}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        number = _finite(value)
        if number is None:
            raise wrong
        return number
    # bool is a subclass of int
    if not (isinstance(hint, type) and isinstance(value, hint)) or (
        isinstance(value, bool) and hint is not bool
    ):
        raise wrong
    return value


def _finite(value: float) -> float | None:
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of more than 308 digits
        return None


def _convert_tuple(
    args: tuple[object, ...], value: object, path: str, wrong: UsageError
) -> tuple[object, ...]:
    if isinstance(value, str) and args == (str, ...):  # "a,b"
        value = [part for part in value.split(",") if part]
    if not isinstance(value, (list, tuple)):
        raise wrong
    if args[-1] is ...:
        return tuple(_convert(args[0], item, path) for item in value)
    if len(value) != len(args):
        raise wrong
    return tuple(_convert(arg, item, path) for arg, item in zip(args, value, strict=True))


def _describe(hint: object) -> str:
    names: dict[object, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        args = get_args(hint)
        item = names.get(args[0], "values")
        return f"a list of {item.removeprefix('a ')}s" if args[-1] is ... else f"a list of {len(args)} values"
    return names.get(hint, "settings by name")


def check_option(name: str, value: object, holds: bool, allowed: str) -> None:
    """Raises UsageError, with what is allowed, unless the condition holds."""
    if not holds:
        raise UsageError(f"{name}={value!r}: must be {allowed}")
