"""Values of annotation files with their types checked. Errors are ValueError with the end of a sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence


def finite_numbers(value: object, what: str) -> tuple[float, ...]:
    """A list of numbers as finite floats. what: for messages ("a region's box")."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{what} is missing or no list of numbers")
    try:
        numbers = tuple(float(number) for number in value if not isinstance(number, bool | str))
    except (TypeError, OverflowError):
        numbers = ()
    if len(numbers) < len(value) or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{what} holds something else than finite numbers")
    return numbers


def check_corners(box: Sequence[float], what: str) -> None:
    """Raises ValueError if a box [left, top, right, bottom] ends before it begins. what: for messages."""
    left, top, right, bottom = box
    if right < left or bottom < top:
        raise ValueError(f"{what} ends before it begins: {left:g}, {top:g} to {right:g}, {bottom:g}")


def check_text(value: object, what: str) -> str:
    """A value that must be a string of valid Unicode. what: for messages."""
    if not isinstance(value, str):
        raise ValueError(f"a {what} is not a string: {value!r}")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise ValueError(f"a {what} is not valid Unicode (is the file UTF-8?)")
    return value
