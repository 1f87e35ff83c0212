"""Typed filters: `width>1000`, `label=cat`, `time>=2024-05`, `caption~dog`, parsed into conditions.

A condition is a field of `FIELDS`, an operator and a value of the field's type. Stores build their own conditions from
it with typed literals; no text of a caller ever becomes part of a store's query language.
"""

from __future__ import annotations

import calendar
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from difflib import get_close_matches
from typing import Final, Literal, TypeAlias

from sightloop.errors import UsageError
from sightloop.search.keywords import extra_key, normalize

FieldKind: TypeAlias = Literal["integer", "number", "time", "name", "list", "words"]
Comparison: TypeAlias = Literal["=", "!=", "<", "<=", ">", ">=", "~", "!~", "in"]

_MAX_FILTER = 10_000  # characters of one filter
_NEGATED: Final[dict[Comparison, Comparison]] = {
    "=": "!=", "!=": "=", "<": ">=", ">=": "<", ">": "<=", "<=": ">", "~": "!~", "!~": "~",
}  # fmt: skip
_OPERATOR = re.compile(r"\s*(!=|!~|<=|>=|==|=|<|>|~)\s*")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_TIME = re.compile(r"(\d{4})(?:-(\d{1,2})(?:-(\d{1,2})(?:[T ](\d{1,2}):(\d{2})(?::(\d{2}))?)?)?)?")
_EXTRA = "extra."  # before the name of a further field of a dataset
_EPOCH = datetime(1970, 1, 1)
_LARGEST = 2**62


@dataclass(frozen=True, slots=True)
class Field:
    """A field that filters may name.

    Args:
        column: of the store.
        kind: type of its values.
        help: what it is, for people.
    """

    column: str
    kind: FieldKind
    help: str


FIELDS: Final[dict[str, Field]] = {
    "id": Field("id", "name", "id of the entry"),
    "path": Field("path", "name", "path from the root, or key in a dataset"),
    "root": Field("root", "name", "folder or dataset that was indexed"),
    "sha256": Field("sha256", "name", "SHA-256 of the file"),
    "size": Field("size", "integer", "bytes of the file, also as 500k or 2M"),
    "modified": Field("mtime", "time", "when the file was changed last"),
    "width": Field("width", "integer", "pixels"),
    "height": Field("height", "integer", "pixels"),
    "time": Field("time", "time", "when the photograph was taken (EXIF)"),
    "latitude": Field("latitude", "number", "degrees north (EXIF)"),
    "longitude": Field("longitude", "number", "degrees east (EXIF)"),
    "start": Field("start", "number", "second of the video at which the scene starts; images have none"),
    "end": Field("end", "number", "second of the video at which the scene ends"),
    "label": Field("label_keys", "list", "class or label of a region, any of them"),
    "caption": Field("caption_keys", "list", "any of the captions; ~ finds words in them"),
    "text": Field("words", "words", "captions, texts in the image and labels; ~ finds words in them"),
}


@dataclass(frozen=True, slots=True)
class Condition:
    """A comparison of a column with a value.

    Args:
        column: of the store.
        operator: "=" and "!=" of strings compare the whole string, "~" and "!~" look for a part of it; "in" is for
            several whole strings.
        value: of the column's type.
    """

    column: str
    operator: Comparison
    value: str | int | float | tuple[str, ...]


# Every clause must hold: at least one of its alternatives, all of whose conditions hold.
Clause: TypeAlias = "tuple[tuple[Condition, ...], ...]"


@dataclass(frozen=True, slots=True)
class Filter:
    """A parsed filter.

    Args:
        clauses: all must hold; each holds if all conditions of one of its alternatives hold.
    """

    clauses: tuple[Clause, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.clauses)

    def __and__(self, other: Filter) -> Filter:
        return Filter(self.clauses + other.clauses)


def ids_filter(ids: Iterable[str]) -> Filter:
    """The filter of the entries with these ids."""
    return Filter((((Condition("id", "in", tuple(ids)),),),))


def parse_filters(texts: Iterable[str] | str, option: str = "--where") -> Filter:
    """The filter of texts such as `width>1000`, `not label=cat`, `label=cat or label=dog`.

    Args:
        texts: all must hold; in each `and` binds closer than `or`. A value with spaces around "and" or "or" goes in
            quotes.
        option: for messages.

    Raises:
        UsageError: a text is no filter; the message says why in one line.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    return Filter(tuple(_clause(text, option) for text in texts))


def _clause(text: str, option: str) -> Clause:
    shown = repr(text if len(text) <= 80 else text[:77] + "...")
    if len(text) > _MAX_FILTER:
        raise UsageError(f"{option} {shown}: longer than {_MAX_FILTER:,} characters.")
    try:
        words = _split(text)
        alternatives: list[list[Condition]] = [[]]
        for word in words:
            if word.lower() == "or":
                alternatives.append([])
            elif word.lower() != "and":
                alternatives[-1] += _conditions(word)
        if not all(alternatives):
            raise ValueError("there is nothing beside an `or`, or no condition at all")
        return tuple(tuple(conditions) for conditions in alternatives)
    except ValueError as error:
        hint = " A filter is a field, an operator (= != < <= > >= ~ !~) and a value: 'width>1000' 'not caption~dog'."
        raise UsageError(f"{option} {shown}: {error}.{'' if 'no field' in str(error) else hint}") from None


def _split(text: str) -> list[str]:
    """Conditions with the words `and` and `or` between them; what is in quotes is kept whole."""
    parts: list[str] = []
    start, quote, i = 0, "", 0
    while i < len(text):
        character = text[i]
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and (not i or not text[i - 1].isalnum()):
            quote = character
        elif character.isspace() and (match := re.compile(r"\s+(and|or)\s+", re.IGNORECASE).match(text, i)):
            parts += [text[start:i], match[1]]
            start = i = match.end()
            continue
        i += 1
    if quote:
        raise ValueError(f"the quote {quote} is not closed")
    return [*(part.strip() for part in parts), text[start:].strip()]


def _conditions(text: str) -> list[Condition]:
    """The conditions of one comparison: two for an interval of time."""
    negated = False
    while match := re.match(r"(not\b|!(?![=~]))\s*", text, re.IGNORECASE):
        negated, text = not negated, text[match.end() :]
    operator = _OPERATOR.search(text)
    if operator is None:
        raise ValueError("no operator" if text else "a condition is empty")
    name = text[: operator.start()].strip().lower()
    if name.startswith(_EXTRA):
        return [
            _extra_condition(text[: operator.start()].strip(), operator[1], negated, text[operator.end() :])
        ]
    if name not in FIELDS:
        close = get_close_matches(name, FIELDS, 1)
        fields = f"did you mean {close[0]}" if close else f"there are {', '.join(FIELDS)}, extra.NAME"
        raise ValueError(f"no field {name[:40]!r}; {fields}")
    sign: Comparison = "=" if operator[1] == "==" else operator[1]  # pyright: ignore[reportAssignmentType]
    sign = _NEGATED[sign] if negated else sign
    value = text[operator.end() :].strip()
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]
    elif not value:
        raise ValueError("no value behind the operator ('' is an empty one)")
    return _typed(name, FIELDS[name], sign, value)


def _extra_condition(name: str, operator: str, negated: bool, value: str) -> Condition:
    """`extra.color=red`: whether a further field of the dataset has a value."""
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]
    if operator not in ("=", "==", "!="):
        raise ValueError(f"{name[:40]}: fields of datasets are compared as wholes: use = or !=")
    if any(0xD800 <= ord(character) <= 0xDFFF for character in name + value):
        raise ValueError("the value is not valid Unicode")
    key = extra_key(name[len(_EXTRA) :], value)
    if key.startswith("=") or key.endswith("="):
        raise ValueError("the name or the value has no letter and no digit")
    part: Comparison = "~" if (operator != "!=") != negated else "!~"
    return Condition("extra_keys", part, f"\n{key}\n")


def _typed(name: str, field: Field, sign: Comparison, value: str) -> list[Condition]:
    column = field.column
    if field.kind in ("integer", "number", "time"):
        if sign in ("~", "!~"):
            raise ValueError(f"{name} is no text: use = != < <= > or >=")
        if field.kind == "time":
            return _time_conditions(name, column, sign, value)
        number = _number(name, value)
        if field.kind == "number":
            return [Condition(column, sign, number)]
        return [_integer_condition(column, sign, number)]
    if sign not in ("=", "!=", "~", "!~"):
        raise ValueError(f"{name} is a text: use = != ~ or !~")
    if any(0xD800 <= ord(character) <= 0xDFFF for character in value):
        raise ValueError("the value is not valid Unicode")
    if field.kind == "name":
        if sign in ("~", "!~"):
            return [Condition("path_key" if column == "path" else column, sign, value.lower())]
        return [Condition(column, sign, value)]
    text = normalize(value)
    if not text:
        if field.kind == "list" and sign in ("=", "!=") and not value.strip():
            return [Condition(column, sign, "")]
        raise ValueError(f"{name}: the value has no letter and no digit")
    part: Comparison = "~" if sign in ("=", "~") else "!~"
    if sign in ("~", "!~"):
        return [Condition(column, part, text)]
    if field.kind == "words":
        raise ValueError(f"{name} has no whole value: use ~ or !~")
    # Lists are kept as "\nfirst\nsecond\n", so that a whole entry is a part between line ends.
    return [Condition(column, part, f"\n{text}\n")]


def _number(name: str, value: str) -> float:
    match = re.fullmatch(
        r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,3})?)\s*([kmgt]?)b?", value, re.IGNORECASE | re.ASCII
    )
    number = float(match[1]) * _UNITS[match[2].lower()] if match else math.nan
    if not abs(number) < _LARGEST:
        raise ValueError(f"{name} needs a number, not {value[:40]!r}")
    return number


def _integer_condition(column: str, sign: Comparison, number: float) -> Condition:
    """A comparison of integers with any number as one with an integer: width > 9.5 as width > 9."""
    low = math.floor(number)
    if number == low:
        return Condition(column, sign, low)
    match sign:
        case "=":  # holds for none
            return Condition(column, "<", -_LARGEST)
        case "!=":
            return Condition(column, ">=", -_LARGEST)
        case "<" | "<=":
            return Condition(column, "<=", low)
        case _:
            return Condition(column, ">", low)


def _time_conditions(name: str, column: str, sign: Comparison, value: str) -> list[Condition]:
    """Conditions for the interval that a year, month, day, minute or second is."""
    low, high = (1_000_000_000 * second if column == "mtime" else second for second in _interval(name, value))
    match sign:
        case "=":
            return [Condition(column, ">=", low), Condition(column, "<", high)]
        case "<" | ">=":
            return [Condition(column, sign, low)]
        case ">":
            return [Condition(column, ">=", high)]
        case "<=":
            return [Condition(column, "<", high)]
        case _:
            raise ValueError(f"{name} != is not a range: use < or > (joined by `or`)")


def _interval(name: str, value: str) -> tuple[int, int]:
    """Seconds since 1970 of the first second of a time, and of the first one after it."""
    match = _TIME.fullmatch(value)
    if match is None:
        raise ValueError(f"{name} needs a date such as 2024, 2024-05, 2024-05-17 or 2024-05-17T12:30")
    year, month, day, hour, minute, second = (None if part is None else int(part) for part in match.groups())
    try:
        start = datetime(year or 0, month or 1, day or 1, hour or 0, minute or 0, second or 0)
        if month is None:
            days = 365 + calendar.isleap(start.year)
        else:
            days = calendar.monthrange(start.year, month)[1] if day is None else 1
    except (ValueError, OverflowError):
        raise ValueError(f"{name}: there is no date {value[:40]!r}") from None
    length = timedelta(days=days) if hour is None else timedelta(seconds=60 if second is None else 1)
    seconds = int((start - _EPOCH).total_seconds())
    return seconds, seconds + int(length.total_seconds())
