"""JSON in which no object has a name twice. `json.loads` keeps the last of such members and drops the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeAlias

JsonPairs: TypeAlias = "list[tuple[str, object]]"
_MAX_DIGITS = (
    400  # an integer of more is infinite as a float; Python refuses to parse those of more than 4,300
)


class RepeatedNames(dict[str, object]):
    """An object that has a name twice, as `parse_tolerant` keeps it.

    Attributes:
        repeated: the name.
    """

    repeated: str


def parse_strict(
    data: bytes | str, finish: Callable[[dict[str, object]], dict[str, object]] | None = None
) -> object:
    """The value of a JSON text.

    Args:
        data: the text.
        finish: gives each object what stands in its place, as soon as it is read.

    Raises:
        ValueError: not JSON, nested too deeply, an integer of more than 4,300 digits, or an object with a name twice.
    """

    def hook(pairs: JsonPairs) -> dict[str, object]:
        members = _unique_members(pairs)
        return members if finish is None else finish(members)

    try:
        return json.loads(data, object_pairs_hook=_unique_members if finish is None else hook)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError as error:
        if "integer string" in str(error):
            raise ValueError("a number has more digits than can be read") from None
        raise


def parse_tolerant(data: bytes | str) -> tuple[object, bool]:
    """The value of a JSON text of many records, of which some may be wrong.

    Returns:
        The value, and whether an object in it has a name twice (`repeated_name` finds it). An integer that is too large
        for a float is infinite.

    Raises:
        ValueError: not JSON, or nested too deeply.
    """
    try:
        return json.loads(data, object_pairs_hook=_unique_members), False
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:
        marked: list[str] = []

        def mark(pairs: JsonPairs) -> dict[str, object]:
            members = dict(pairs)
            if len(members) == len(pairs):
                return members
            marked.append(_first_repeated(pairs))
            repeated = RepeatedNames(members)
            repeated.repeated = marked[-1]
            return repeated

        value = json.loads(data, object_pairs_hook=mark, parse_int=_parse_integer)
        return value, bool(marked)


def repeated_name(value: object) -> str | None:
    """A name that an object in a value of `parse_tolerant` has twice, or None."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, RepeatedNames):
            return item.repeated
        if isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, list):
            pending += item
    return None


def _unique_members(pairs: JsonPairs) -> dict[str, object]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError(f"the name {_first_repeated(pairs)!r} occurs twice in an object")
    return members


def _first_repeated(pairs: JsonPairs) -> str:
    names = [name for name, _ in pairs]
    return next(name for number, name in enumerate(names) if name in names[:number])


def _parse_integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MAX_DIGITS else float(digits)
