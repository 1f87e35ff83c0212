"""Which captions are dropped: empty ones, ones that loop, ones that do not match their image."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field

from sightloop.types import JsonDict, JsonMapping


@dataclass(frozen=True, slots=True)
class CaptionFilter:
    """How captions are asked for, which are dropped, and what is put around those that stay.

    `drop_if` is searched for in the caption; `min_match` is the least probability that the judge must give. Empty and
    looping captions are dropped unless `keep_all`. Prefix and suffix are added last and are not judged.
    """

    prompt: str | None = None
    prefix: str = ""
    suffix: str = ""
    drop_if: re.Pattern[str] | None = None
    min_match: float | None = None
    keep_all: bool = False
    decoding: JsonMapping = field(default_factory=JsonDict)


def drop_reason(text: str, rules: CaptionFilter) -> tuple[str, str]:
    """The kind and the cause for which a caption is dropped before any judge sees it; ("", "") where it is kept."""
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


def find_loop(text: str, longest: int = 8) -> str:
    """The words that a caption repeats, "" where it does not.

    A loop is one word that stands 4 times or more in a row, or a phrase of 2 to `longest` words that stands 3 times or
    more in a row. Case does not count, nor does punctuation at the ends of words: "a dog, a dog, a dog." is a loop,
    "ha ha ha" is none. The shortest phrase is given. Linear in the length of the text.
    """
    words = _words(text)
    for length in range(1, longest + 1):
        needed = length * (
            3 if length == 1 else 2
        )  # so many words in a row equal the word `length` places before
        run = 0
        for i in range(length, len(words)):
            run = run + 1 if words[i] == words[i - length] else 0
            if run >= needed:
                return " ".join(words[i - length + 1 : i + 1])
    return ""


def _words(text: str) -> list[str]:
    """The words of a text, case folded, without punctuation at their ends; words of punctuation alone are left out."""
    words = (_stripped(word) for word in text.casefold().split())
    return [word for word in words if word]


def _stripped(word: str) -> str:
    start, end = 0, len(word)
    while start < end and unicodedata.category(word[start])[0] in "PSCZ":
        start += 1
    while end > start and unicodedata.category(word[end - 1])[0] in "PSCZ":
        end -= 1
    return word[start:end]
