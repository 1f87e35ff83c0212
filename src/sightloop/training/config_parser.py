"""Frozen dataclasses from plain values, as JSON and a command line have them: every name and type is checked."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from sightloop.errors import UsageError
from sightloop.types import JsonDict, JsonMapping


def set_option(
    data: JsonDict,
    path: str,
    text: str,
    *,
    made: Mapping[str, Callable[[], Any]],
    free: Collection[str] = (),
) -> None:
    """Set the value at `a.b.c` in nested values: JSON, or else a plain word.

    made: what takes the place of None on the way, by its path. free: paths below which any name may be set. Raises
    UsageError for another name that is not there, with the nearest one.
    """
    *names, last = path.split(".")
    for depth, name in enumerate(names, start=1):
        where = ".".join(names[:depth])
        if data.get(name) is None and where in made:
            data[name] = made[where]()
        data = _step_into(data, name, where)
    if last not in data and ".".join(names) not in free:
        raise UsageError(f"--set {path}: no such setting{_nearest(last, data)}")
    try:
        data[last] = json.loads(text)
    except ValueError:
        data[last] = text


def _step_into(data: JsonDict, name: str, path: str) -> JsonDict:
    if name not in data:
        raise UsageError(f"--set {path}: no such setting{_nearest(name, data)}")
    if not isinstance(data[name], dict):
        raise UsageError(f"--set {path}: is one value and has no settings below it")
    return data[name]


def _nearest(name: str, known: JsonMapping) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"


def from_dict(kind: type[Any], data: JsonMapping, path: str) -> Any:
    """A dataclass from plain values, with every type checked."""
    hints = get_type_hints(kind)
    if unknown := sorted(set(data) - set(hints)):
        raise UsageError(f"{path}{unknown[0]}: no such setting{_nearest(unknown[0], hints)}")
    return kind(**{name: _value(hints[name], value, f"{path}{name}") for name, value in data.items()})


def _value(hint: Any, value: Any, path: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    wrong = UsageError(f"{path}={json.dumps(value)}: must be {_describe(hint)}")
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _value(next(arg for arg in args if arg is not type(None)), value, path)
    if origin is Literal:
        if value not in args:
            raise wrong
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise wrong
        return from_dict(cast("type[Any]", hint), cast("JsonMapping", value), f"{path}.")
    if origin is tuple:
        return _row(args, value, path, wrong)
    if origin is frozenset:
        if not isinstance(value, (list, tuple)):
            raise wrong
        return frozenset(_value(args[0], item, path) for item in cast("list[Any]", value))
    if origin is not None:  # Mapping[str, X]
        if not isinstance(value, Mapping):
            raise wrong
        items = cast("JsonMapping", value)
        return {name: _value(args[1], item, f"{path}.{name}") for name, item in items.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise wrong
    return value


def _row(args: tuple[Any, ...], value: Any, path: str, wrong: UsageError) -> tuple[Any, ...]:
    if isinstance(value, str) and args == (str, ...):
        value = [part for part in value.split(",") if part]
    if not isinstance(value, (list, tuple)):
        raise wrong
    items = cast("list[Any]", value)
    if args[-1] is ...:
        return tuple(_value(args[0], item, path) for item in items)
    if len(items) != len(args):
        raise wrong
    return tuple(_value(arg, item, path) for arg, item in zip(args, items, strict=True))


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        args = get_args(hint)
        what = names.get(args[0], "values")
        return f"a list of {what.removeprefix('a ')}s" if args[-1] is ... else f"a list of {len(args)} values"
    return names.get(hint, "settings by name")


def check_option(name: str, value: object, holds: bool, allowed: str) -> None:
    """Raises UsageError, naming what is allowed, unless the condition holds."""
    if not holds:
        raise UsageError(f"{name}={value!r}: must be {allowed}")
