"""Policy of what may be said: a file that a person can read and change.

Nothing is in it until somebody writes it, and nothing is replaced without a word: what a policy refuses comes with the
word that it refuses.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sightloop.errors import UsageError

_BYTES = 1 << 20  # of a policy file


@dataclass(frozen=True)
class Policy:
    """Words that texts must not have.

    Args:
        words: words or phrases, whole words in any letter case.
    """

    words: tuple[str, ...] = ()

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


def read_policy(path: str | Path) -> Policy:
    """A policy from a TOML file: `words = [...]`.

    Raises:
        UsageError: no such file, or something in it is wrong; it names what.
    """
    try:
        if Path(path).stat().st_size > _BYTES:
            raise UsageError(f"{path}: a policy of over {_BYTES:,} bytes")
        data = tomllib.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: no policy ({error})") from error
    if unknown := data.keys() - {"words"}:
        raise UsageError(f"{path}: {min(unknown)} is not known; a policy has words")
    words = data.get("words", [])
    if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
        raise UsageError(f"{path}: words must be a list of texts")
    return Policy(tuple(words))
