"""Predictions and references brought into one order, with errors that name the sample."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeAlias, cast

from sightloop.errors import UsageError

KeyedPredictions: TypeAlias = "Mapping[Hashable, str] | Sequence[str]"
KeyedReferences: TypeAlias = "Mapping[Hashable, Sequence[str]] | Sequence[Sequence[str]]"


def align(
    predictions: KeyedPredictions, references: KeyedReferences
) -> tuple[Sequence[Hashable], list[str], list[list[str]]]:
    """(keys, predictions, references), every sample's at the same place; the keys of sequences are their places.

    Raises UsageError where there is no sample, keys differ, a prediction is no string, or a sample's references are no
    list of one or more strings.
    """
    if isinstance(predictions, Mapping) and isinstance(references, Mapping):
        strange = predictions.keys() ^ references.keys()
        if strange:
            key = min(strange, key=str)
            side = "references" if key in predictions else "prediction"
            raise UsageError(f"{len(strange)} keys are on one side only; the first, {key!r}, has no {side}")
        keys: Sequence[Hashable] = list(predictions)
        written, gold = list(predictions.values()), [references[key] for key in keys]
    elif not _is_list(predictions) or not _is_list(references):
        raise UsageError("predictions and references: give two mappings or two lists")
    else:
        written = cast("list[str]", list(predictions))
        gold = cast("list[Sequence[str]]", list(references))
        if len(written) != len(gold):
            raise UsageError(f"{len(written)} predictions but {len(gold)} lists of references")
        keys = range(len(written))
    if not keys:
        raise UsageError("predictions: there is none; give at least one sample")
    for key, text, texts in zip(keys, written, gold, strict=True):
        if not _is_text(text):
            raise UsageError(f"prediction {key!r}: {type(text).__name__}, expected one string")
        if not _is_list(texts) or not texts or not all(map(_is_text, texts)):
            raise UsageError(f"references of {key!r}: expected a list of one or more strings")
    return keys, written, [list(texts) for texts in gold]


def kinds_of(keys: Sequence[Hashable], kinds: Mapping[Hashable, str] | Sequence[str]) -> list[str]:
    """The kind of every sample, in the keys' order; kinds are a mapping with these keys or as long a list."""
    if isinstance(kinds, Mapping):
        missing = [key for key in keys if key not in kinds]
        if missing:
            raise UsageError(f"{len(missing)} samples have no kind; the first is {missing[0]!r}")
        return [kinds[key] for key in keys]
    if len(kinds) != len(keys):
        raise UsageError(f"{len(keys)} samples but {len(kinds)} kinds")
    return list(kinds)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
