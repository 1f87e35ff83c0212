"""Rule-based caption filter: drops captions that are empty, that loop, or that match an unwanted pattern."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field

from sightloop.types import JsonDict, JsonMapping


@dataclass(frozen=True, slots=True)
class CaptionFilter:
    """Settings of captioning: generation, filter, and text added around kept captions.

    Attributes:
        prompt: Text that every caption starts with.
        prefix: Added before a kept caption; neither filtered nor scored.
        suffix: Added after it, likewise.
        drop_if: Captions in which this pattern occurs are dropped.
        min_match: Least ITM probability of a kept caption, in 0..1; None scores none.
        keep_all: Keep empty and looping captions.
        decoding: Options of `tasks.decoding_options.Decoding`.
    """

    prompt: str | None = None
    prefix: str = ""
    suffix: str = ""
    drop_if: re.Pattern[str] | None = None
    min_match: float | None = None
    keep_all: bool = False
    decoding: JsonMapping = field(default_factory=JsonDict)


def drop_reason(text: str, rules: CaptionFilter) -> tuple[str, str]:
    """Why a caption is dropped by its text alone.

    Returns:
        (kind, reason): kind "unwanted", "empty" or "looping", and the reason in words; ("", "") if it is kept.
    """
    if rules.drop_if is not None and rules.drop_if.search(text):
        return "unwanted", f"its caption matches {rules.drop_if.pattern!r}: {text!r}"
    if rules.keep_all:
        return "", ""
    words = _words(text)
    if not words:
        return "empty", "its caption is empty"
    if words == _words(rules.prompt or ""):
        return "empty", "its caption is empty beyond the prompt"
    if loop := find_loop(text):
        return "looping", f"its caption repeats {loop!r}: {text!r}"
    return "", ""


def find_loop(text: str, max_words: int = 8) -> str:
    """The phrase that a caption repeats in a row, "" if there is none; linear in the length of the text.

    A loop is one word at least 4 times in a row, or a phrase of 2 to `max_words` words at least 3 times in a row,
    ignoring case and punctuation: "a dog, a dog, a dog." loops, "ha ha ha" does not. The shortest phrase is returned.
    """
    words = _words(text)
    for length in range(1, max_words + 1):
        # A phrase of n words occurs k times in a row where n * (k - 1) words in a row equal the word n positions
        # earlier. For "a dog a dog a dog" and n = 2:
        #   words                a  dog  a  dog  a  dog
        #   equal 2 earlier?     -  -    y  y    y  y      -> run of 4 = 2 * (3 - 1)
        needed = length * (3 if length == 1 else 2)
        run = 0
        for i in range(length, len(words)):
            run = run + 1 if words[i] == words[i - length] else 0
            if run >= needed:
                return " ".join(words[i - length + 1 : i + 1])
    return ""


def _words(text: str) -> list[str]:
    """The words of a text, case-folded, without punctuation at their ends; words of punctuation alone are left out."""
    words = (_strip_punctuation(word) for word in text.casefold().split())
    return [word for word in words if word]


def _strip_punctuation(word: str) -> str:
    """Removes characters of the Unicode categories P, S, C and Z from both ends."""
    start, end = 0, len(word)
    while start < end and unicodedata.category(word[start])[0] in "PSCZ":
        start += 1
    while end > start and unicodedata.category(word[end - 1])[0] in "PSCZ":
        end -= 1
    return word[start:end]
