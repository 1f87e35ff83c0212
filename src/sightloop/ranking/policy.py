"""Policy of what may be said and shown: a file that a person can read and change.

A policy has words, which texts must not have, and concepts, which images must not show: texts with a threshold for the
margin of their cosine over that of neutral texts. Nothing is in it until somebody writes it, and nothing is replaced
without a word: what a policy refuses comes with the rule's name.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from sightloop.errors import UsageError
from sightloop.types import Floats32, JsonDict

_BYTES = 1 << 20  # of a policy file


class TextEmbedder(Protocol):
    """What of a model makes vectors of texts."""

    def embed_texts(self, texts: Sequence[str]) -> Floats32: ...


@dataclass(frozen=True, slots=True)
class Concept:
    """What an image must not show.

    Attributes:
        name: for messages.
        texts: that describe it.
        neutral: texts for what looks like it and is allowed.
        threshold: least margin, cosine of the nearest of `texts` less that of the nearest of `neutral`; -2 to 2.
    """

    name: str
    texts: tuple[str, ...]
    neutral: tuple[str, ...]
    threshold: float


@dataclass(frozen=True)
class Policy:
    """Words and concepts.

    Args:
        words: words or phrases, whole words in any letter case.
        concepts: what images must not show.
    """

    words: tuple[str, ...] = ()
    concepts: tuple[Concept, ...] = ()

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.words, key=len, reverse=True)
        return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)

    def refuse_text(self, text: str) -> str:
        """Why a text is refused, "" if it is not."""
        if not self.words:
            return ""
        match = self._pattern.search(text)
        return f'the policy has the word "{match[0]}"' if match else ""

    def refuse_images(self, vectors: Floats32, model: TextEmbedder) -> list[str]:
        """Why each image is refused, "" if it is not.

        Args:
            vectors: unit vectors of the images, float32 `[n, d]`.
            model: whose vectors they are.
        """
        reasons = [""] * len(vectors)
        for concept in self.concepts:
            own = vectors @ model.embed_texts(concept.texts).T  # [n, texts]
            margin = own.max(axis=1)
            if concept.neutral:
                margin = margin - (vectors @ model.embed_texts(concept.neutral).T).max(axis=1)
            for i in (margin > concept.threshold).nonzero()[0]:
                reasons[i] = reasons[i] or f'the policy has the concept "{concept.name}" ({margin[i]:.3f})'
        return reasons


def read_policy(path: str | Path) -> Policy:
    """A policy from a TOML file: `words = [...]`, and `[concepts.NAME]` with `texts`, `neutral`, `threshold`.

    Raises:
        UsageError: no such file, or something in it is wrong; it names what.
    """
    try:
        if Path(path).stat().st_size > _BYTES:
            raise UsageError(f"{path}: a policy of over {_BYTES:,} bytes")
        data = tomllib.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: no policy ({error})") from error
    if unknown := data.keys() - {"words", "concepts"}:
        raise UsageError(f"{path}: {min(unknown)} is not known; a policy has words and concepts")
    concepts = data.get("concepts", {})
    if not isinstance(concepts, dict):
        raise UsageError(f"{path}: concepts must be tables, [concepts.NAME]")
    return Policy(
        _texts(path, "words", data.get("words", [])),
        tuple(_concept(path, name, table) for name, table in concepts.items()),
    )


def _concept(path: str | Path, name: str, table: object) -> Concept:
    where = f"concepts.{name}"
    if not isinstance(table, dict):
        raise UsageError(f"{path}: {where} must be a table")
    values: JsonDict = table
    if unknown := values.keys() - {"texts", "neutral", "threshold"}:
        raise UsageError(f"{path}: {where}.{min(unknown)} is not known; there are texts, neutral, threshold")
    threshold = values.get("threshold", 0.0)
    if not isinstance(threshold, (int, float)) or isinstance(threshold, bool) or not -2 <= threshold <= 2:
        raise UsageError(f"{path}: {where}.threshold must be a number from -2 to 2")
    texts = _texts(path, f"{where}.texts", values.get("texts", []))
    if not texts:
        raise UsageError(f"{path}: {where}.texts: give at least one")
    return Concept(name, texts, _texts(path, f"{where}.neutral", values.get("neutral", [])), float(threshold))


def _texts(path: str | Path, name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise UsageError(f"{path}: {name} must be a list of texts")
    return tuple(value)
