"""Aligns predictions with references by key, or by position, and names the sample in every error."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeAlias

from sightloop.errors import UsageError

KeyedPredictions: TypeAlias = "Mapping[Hashable, str] | Sequence[str]"
KeyedReferences: TypeAlias = "Mapping[Hashable, Sequence[str]] | Sequence[Sequence[str]]"


def align(
    predictions: KeyedPredictions, references: KeyedReferences
) -> tuple[Sequence[Hashable], list[str], list[list[str]]]:
    """Brings predictions and references into one order.

    Args:
        predictions: one text per sample, as a mapping key -> text or as a sequence.
        references: one or more texts per sample, as a mapping with the same keys or a sequence of the same length.

    Returns:
        (keys, predictions, references), each with N items; the keys of sequences are 0 ... N - 1.

    Raises:
        UsageError: no sample, keys that differ, a prediction that is no string, or references that are no list of
            one or more strings.
    """
    if isinstance(predictions, Mapping) and isinstance(references, Mapping):
        unmatched = predictions.keys() ^ references.keys()
        if unmatched:
            key = min(unmatched, key=str)
            lacking = "references" if key in predictions else "prediction"
            raise UsageError(
                f"{len(unmatched)} keys are on one side only; the first, {key!r}, has no {lacking}"
            )
        keys: Sequence[Hashable] = list(predictions)
        texts, reference_lists = list(predictions.values()), [references[key] for key in keys]
    elif (
        isinstance(predictions, Mapping)
        or isinstance(references, Mapping)
        or not (_is_list(predictions) and _is_list(references))
    ):
        raise UsageError("predictions and references: give two mappings or two lists")
    else:
        texts, reference_lists = list(predictions), list(references)
        if len(texts) != len(reference_lists):
            raise UsageError(f"{len(texts)} predictions but {len(reference_lists)} lists of references")
        keys = range(len(texts))
    if not keys:
        raise UsageError("predictions: there is none; give at least one sample")
    for key, text, own_references in zip(keys, texts, reference_lists, strict=True):
        if not _is_text(text):
            raise UsageError(f"prediction {key!r}: {type(text).__name__}, expected one string")
        if not _is_list(own_references) or not own_references or not all(map(_is_text, own_references)):
            raise UsageError(f"references of {key!r}: expected a list of one or more strings")
    return keys, texts, [list(own_references) for own_references in reference_lists]


def align_types(
    keys: Sequence[Hashable], question_types: Mapping[Hashable, str] | Sequence[str]
) -> list[str]:
    """The question type of every sample, in the order of `keys`.

    Raises:
        UsageError: a mapping without one of the keys, or a sequence of another length.
    """
    if isinstance(question_types, Mapping):
        missing = [key for key in keys if key not in question_types]
        if missing:
            raise UsageError(f"{len(missing)} samples have no question type; the first is {missing[0]!r}")
        return [question_types[key] for key in keys]
    if len(question_types) != len(keys):
        raise UsageError(f"{len(keys)} samples but {len(question_types)} question types")
    return list(question_types)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
