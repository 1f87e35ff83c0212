"""How CLIP's original code, and open_clip after it, clean a text and cut it into words.

Both mend a text with ftfy, unescape HTML twice, and make it lower case. They differ in how they spell the special
tokens in a text, "<|startoftext|>" and "<start_of_text>", and in what is white space (Radford et al. 2021, released
code; https://github.com/mlfoundations/open_clip).
"""

from __future__ import annotations

import html
import re
import unicodedata
from dataclasses import dataclass

# CLIP's words: special tokens, English clitics, runs of letters, single numbers, runs of anything else.
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# The original pattern ignores case. Its texts are lower case by then, so that only adds the long s (U+017F), and
# drops U+0345: a mark whose upper case is a letter, so it is neither "a letter" nor "not a letter".
_WORDS = (
    CLIP_WORDS.replace("startoftext", "[s\u017f]tartoftext")
    .replace("'s", "'[s\u017f]")
    .replace(r"[^\s", "[^\\s\u0345")
)
_SPACE = re.compile(r"[^\S\x1c-\x1f]+")  # Unicode White_Space; `re` alone counts 1C to 1F as space too


@dataclass(frozen=True, slots=True)
class ClipRules:
    """One of the two sets of rules.

    Attributes:
        ends: the first and the last token, as they are spelled in a text.
        words: pattern of a word.
        special: finds what may be a special token.
        mark: length of the part of a special token, before its first letter, that is a word together with other marks
            before it: 2 of "<|startoftext|>".
        is_space_wide: whether the separators 1C to 1F are white space.
    """

    ends: tuple[str, str]
    words: str
    special: re.Pattern[str]
    mark: int
    is_space_wide: bool

    def clean(self, text: str) -> str:
        """What comes before the words: mend, unescape twice, single spaces, lower case."""
        plain = text.strip(" \t\r\n")
        if plain.isascii() and plain.isprintable() and "&" not in plain:
            return " ".join(plain.split()).lower()  # nothing to mend: the same result, much sooner
        import ftfy  # takes as long to import as all of this package, and few texts need it

        mended = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        single = " ".join(mended.split()) if self.is_space_wide else _SPACE.sub(" ", mended)
        return single.strip().lower()

    def parts(self, text: str) -> list[str]:
        """A cleaned text cut so that each special token that counts is one part, and no other part holds one.

        Words are looked for from left to right, so "!<|endoftext|>" begins with the word "!<|" and holds no special
        token. There the cut falls after "<|", where a word ends anyway.
        """
        parts: list[str] = []
        done, word_end = 0, 0
        for match in self.special.finditer(text):
            start = match.start()
            if start == word_end or _ends_word(text[start - 1]):
                parts += [text[done:start], match.group()]
                done = word_end = match.end()
            else:
                parts.append(text[done : start + self.mark])
                done = start + self.mark
        return [part for part in (*parts, text[done:]) if part]


def _ends_word(letter: str) -> bool:
    """Whether a "<" after this letter begins a new word: after white space, letters, numbers and U+0345."""
    return bool(_SPACE.match(letter)) or letter == "\u0345" or unicodedata.category(letter)[0] in "LN"


CLIP_RULES: dict[str, ClipRules] = {
    "openai": ClipRules(
        ("<|startoftext|>", "<|endoftext|>"),
        _WORDS,
        re.compile("<\\|(?:[s\u017f]tartoftext|endoftext)\\|>"),
        mark=2,
        is_space_wide=False,
    ),
    "open_clip": ClipRules(
        ("<start_of_text>", "<end_of_text>"),
        _WORDS.replace(r"<\|", "<").replace(r"\|>", ">").replace("oftext", "_of_text"),
        re.compile("<(?:[s\u017f]tart_of_text|end_of_text)>"),
        mark=1,
        is_space_wide=True,
    ),
}
"""By the name that a saved tokenizer has for them."""
