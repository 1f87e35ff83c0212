"""Check of a configuration's types: what another program wrote into config.json is input."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from sightloop.errors import CheckpointError

# Sizes that are divided by, or that a tensor has: at least 1. Other whole numbers are at least -1, "none".
_SIZES = frozenset(("dim", "dims", "heads", "patch", "vocab", "mlp_dim", "window", "strides", "groups"))


def check_config(config: Any, source: str) -> None:
    """Checks the fields of a configuration, and of those inside of it, against their declared types.

    Args:
        config: A dataclass.
        source: Name of the checkpoint, for the message.

    Raises:
        CheckpointError: A value of a wrong type, a number that is not finite, or a size below 1.
    """
    wrong = next(_wrong_fields(config, ""), None)
    if wrong is not None:
        name, value, words = wrong
        raise CheckpointError(
            f"{source}: its config says {name}={str(value)[:40]!r}, which must be {words}; put the checkpoint's own "
            "files beside its weights"
        )


def _wrong_fields(config: Any, prefix: str) -> Iterator[tuple[str, object, str]]:
    """(name, value, what it must be) of each wrong field."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if dataclasses.is_dataclass(value):
            yield from _wrong_fields(value, f"{prefix}{field.name}.")
        elif words := _mismatch(value, hint, 1 if field.name in _SIZES else -1):
            yield f"{prefix}{field.name}", value, words


def _mismatch(value: object, hint: Any, least: int) -> str:
    """What a value must be by its type; "" if it is, or the type is of another kind than numbers, texts and lists."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        mismatches = [_mismatch(value, part, least) for part in parts]
        return "" if "" in mismatches else mismatches[0]
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            return "a list"
        kinds = [parts[0]] * len(value) if parts[1:] == (...,) else parts
        if len(kinds) != len(value):
            return f"a list of {len(kinds)}"
        mismatches = [_mismatch(each, kind, least) for each, kind in zip(value, kinds, strict=True)]
        return next((f"a list, each {words}" for words in mismatches if words), "")
    if typing.get_origin(hint) is typing.Literal:
        return "" if value in parts else f"one of {', '.join(map(str, parts))}"
    return _plain_mismatch(value, hint, least)


def _plain_mismatch(value: object, hint: Any, least: int) -> str:
    if hint is type(None):
        return "" if value is None else "null"
    if hint is bool:
        return "" if isinstance(value, bool) else "true or false"
    if hint is int:
        is_right = isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 40
        return "" if is_right else f"a whole number from {max(least, 0)}"
    if hint is float:
        is_right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return "" if is_right else "a number"
    if hint is str:
        return "" if isinstance(value, str) else "text"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return "a table of settings"
    if typing.get_origin(hint) in (dict, Mapping):
        return "" if isinstance(value, Mapping) else "a table"
    return ""
