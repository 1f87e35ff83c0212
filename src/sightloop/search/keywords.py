"""Keywords: texts to words that are compared, n-grams for scripts without spaces and for codes, and rank fusion."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress

_MAX_WORD = 64  # characters; longer ones are cut, in texts and queries alike
# Scripts that are written without spaces: Thai, Lao, Tibetan, Myanmar, Khmer, kana, Han; Hangul has long words.
_UNSPACED = (
    "\u0e00-\u0eff\u0f00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_INDIC = "\u0900-\u0dff"  # with the vowel signs, which are no letters of their own
_PARTS = re.compile(f"[{_UNSPACED}]+|(?:[^\\W_{_UNSPACED}]|[{_INDIC}])+")
_RUN = re.compile(f"[{_UNSPACED}]+")
# Rank constant of reciprocal rank fusion. 60 (Cormack et al. 2009) is for rankings that are equally good; the hits of
# keywords are few and sure, and with 10 and twice the weight of vectors the fusion is above either ranking.
_RRF = 10
WORDS_WEIGHT = 2.0


def normalize(text: str) -> str:
    """A text as it is compared: composed (NFC), case folded, without accents; every break is one space.

    "Café au LAIT, E16" -> "cafe au lait e16"
    """
    return " ".join(words_of(text))


def extra_key(name: str, value: str | int | float) -> str:
    """A field of `extra` and its value as they are compared: "color=dark red", "rating=4" (also of 4.0 and "4")."""
    text = str(value)
    with suppress(ValueError, OverflowError):
        if not isinstance(value, bool) and float(text) == int(float(text)):
            text = str(int(float(text)))
    return f"{normalize(name)}={normalize(text)}"


def words_of(text: str) -> list[str]:
    """The words of a text, normalized; a run of a script without spaces is one word."""
    folded = text
    for _ in range(2):  # a compatibility form may hold capitals: the bold A of mathematics is "A", then "a"
        folded = unicodedata.normalize("NFKD", folded).casefold()
    folded = unicodedata.normalize("NFKD", folded)
    plain = "".join(
        c for c in folded if not unicodedata.combining(c) or c > "\u06ff"
    )  # Latin to Arabic accents
    return [word[:_MAX_WORD] for word in _PARTS.findall(unicodedata.normalize("NFC", plain))]


def grams_of(words: Iterable[str]) -> list[str]:
    """What finds parts of words: 2-grams of scripts without spaces, 3-grams of codes (words with a digit).

    "東京駅" -> "東京" "京駅";  "ae16x" -> "ae1" "e16" "16x". Words of one or two characters are their own gram.
    """
    grams: list[str] = []
    for word in words:
        size = 2 if _RUN.fullmatch(word) else 3 if any(map(str.isdigit, word)) else 0
        if size:
            grams += [word[i : i + size] for i in range(max(1, len(word) - size + 1))]
            if size == 2 and len(word) > 1:
                grams += list(word)
    return list(dict.fromkeys(grams))


def searchable(texts: Iterable[str]) -> tuple[str, str]:
    """The columns `words` and `grams` of an entry with these texts."""
    words = [word for text in texts for word in words_of(text)]
    return " ".join(words), " ".join(grams_of(words))


def matched_words(query: str, words: str) -> list[str]:
    """The words of a query that an entry has, as whole words or, of scripts without spaces and codes, within one."""
    present = set(words.split())
    return [
        word
        for word in dict.fromkeys(words_of(query))
        if word in present or (grams_of([word]) and any(word in other for other in present))
    ]


def fuse_ranks(rankings: Sequence[Sequence[str]], weights: Sequence[float] | None = None) -> dict[str, float]:
    """Reciprocal rank fusion: score by id, the sum of weight / (10 + rank) over the rankings, best first.

    Args:
        rankings: ids, best first.
        weights: of the rankings; 1 each.
    """
    scores: dict[str, float] = {}
    for ranking, weight in zip(rankings, weights or [1.0] * len(rankings), strict=True):
        for rank, name in enumerate(ranking, 1):
            scores[name] = scores.get(name, 0.0) + weight / (_RRF + rank)
    return dict(sorted(scores.items(), key=lambda item: -item[1]))
