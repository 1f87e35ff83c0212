"""Policy of what may be said: a file that a person can read and change.

Nothing is in it until somebody writes it, and nothing is replaced without a word: what a policy refuses comes with the
word that it refuses.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sightloop.errors import UsageError

_BYTES = 1 << 20  # of a policy file


@dataclass(frozen=True)
class Concept:
    """What a drawn image must not show.

    Args:
        text: that describes it, as a judge reads texts.
        threshold: cosine of image and text above which an image is refused.
    """

    text: str
    threshold: float


@dataclass(frozen=True)
class Policy:
    """Words that texts must not have, and concepts that drawn images must not show.

    Args:
        words: words or phrases, whole words in any letter case.
        concepts: judged by `judge`; texts are not checked for them.
        judge: model that compares images with the concepts' texts, as `load` takes it; "" without concepts.
        safe: probability of being safe below which an answer is dropped, where the judge says it (a model that was
            trained for dialogues with this attribute); 0 for never.
    """

    words: tuple[str, ...] = ()
    concepts: tuple[Concept, ...] = ()
    judge: str = ""
    safe: float = 0.5

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


def read_policy(path: str | Path, *, images: bool = False) -> Policy:
    """A policy from a TOML file: `words = [...]`, for texts `safe = 0.5`, for images `judge = "MODEL"` and tables
    `[[concepts]]`.

    Args:
        path: of the file.
        images: whether images are drawn, whose concepts are checked; of texts there are no concepts.

    Raises:
        UsageError: no such file, or something in it is wrong; it names what.
    """
    try:
        if Path(path).stat().st_size > _BYTES:
            raise UsageError(f"{path}: a policy of over {_BYTES:,} bytes")
        data = tomllib.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: no policy ({error})") from error
    if unknown := data.keys() - ({"words", "judge", "concepts"} if images else {"words", "safe"}):
        names = "words, judge and concepts" if images else "words and safe"
        raise UsageError(f"{path}: {min(unknown)} is not known; a policy has {names}")
    words = data.get("words", [])
    if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
        raise UsageError(f"{path}: words must be a list of texts")
    concepts, judge = tuple(_concepts(path, data.get("concepts", []))), data.get("judge", "")
    if not isinstance(judge, str) or bool(concepts) is not bool(judge):
        raise UsageError(f"{path}: judge (a model that embeds images and texts) and concepts go together")
    safe = data.get("safe", Policy.safe)
    if not isinstance(safe, int | float) or isinstance(safe, bool) or not 0 <= safe <= 1:
        raise UsageError(f"{path}: safe={safe!r} must be a probability, from 0 to 1")
    return Policy(tuple(words), concepts, judge, float(safe))


def _concepts(path: str | Path, tables: object) -> Iterator[Concept]:
    if not isinstance(tables, list):
        raise UsageError(f"{path}: concepts must be tables, each under [[concepts]]")
    for table in tables:
        text = table.get("text") if isinstance(table, dict) else None
        threshold = table.get("threshold") if isinstance(table, dict) else None
        if not isinstance(table, dict) or set(table) != {"text", "threshold"}:
            raise UsageError(f"{path}: each of [[concepts]] has a text and a threshold, nothing else")
        if not isinstance(text, str) or not text.strip():
            raise UsageError(f"{path}: concepts: text={text!r} must be a text")
        if not isinstance(threshold, int | float) or isinstance(threshold, bool) or not -1 <= threshold <= 1:
            raise UsageError(f"{path}: concepts: threshold={threshold!r} must be a cosine, from -1 to 1")
        yield Concept(text, float(threshold))
