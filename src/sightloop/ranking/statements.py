"""Statement of a question and its answer: the sentence that an image-text model can compare with an image.

ITM and ITC learned from captions, so "what color is the cat?" with "black" is judged as "the cat is black". The rules
are of English; a question that none of them fits is joined with its answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeAlias

_BE = r"(?P<be>is|are|was|were)"
_PREPOSITION = (
    r"(?:on|in|at|near|behind|under|above|below|beside|between|around|inside|over|next to|in front of|to the|close to|"
    r"left of|right of|hanging|standing|sitting|lying|placed|attached|found|seen|shown|kept)"
)
_DETERMINED = re.compile(
    r"(?:a|an|the|this|that|these|those|my|his|her|their|its|some|no|many|several|one|two|three|four|five|six|seven|"
    r"eight|nine|ten|\d+)\b"
)
_WORDS_OF_A_SENTENCE = 4


def statement(question: str, answer: str) -> str:
    """A question and its answer as one sentence, in lower case.

    Args:
        question: in English; "" for none.
        answer: what was answered.

    Returns:
        "how many dogs are there?", "2" -> "there are 2 dogs"; the answer where it is a sentence already; for other
        questions both: "why? because".
    """
    asked = re.sub(r"\s+", " ", question.strip().lower().rstrip("?. "))
    answered = answer.strip().rstrip(". ").lower()
    if not asked or len(answered.split()) >= _WORDS_OF_A_SENTENCE:
        return answered
    for pattern, form in _RULES:
        if match := pattern.fullmatch(asked):
            return re.sub(r"\s+", " ", form(match, answered)).strip()
    return f"{asked}? {answered}".strip()


def _with_article(noun: str) -> str:
    """A noun as a phrase: "dog" -> "a dog"; plurals, lists and phrases with a determiner are left as they are."""
    plural = noun.endswith("s") and not noun.endswith(("ss", "us", "is"))
    if not noun or plural or "," in noun or " and " in noun or _DETERMINED.match(noun):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _there(match: re.Match[str], answered: str) -> str:
    """ "is there a dog" with yes or no."""
    be, thing = match["be"], match["rest"]
    if answered.startswith("yes"):
        return f"there {be} {thing}"
    if answered.startswith("no"):
        return f"there {be} no {re.sub(r'^(?:a|an|any|some) ', '', thing)}"
    return f"there {be} {answered}"


def _is_it_so(match: re.Match[str], answered: str) -> str:
    """ "is the cat black" with yes or no."""
    if not answered.startswith(("yes", "no")):
        return f"{match['subject']} {match['be']} {answered}"
    return f"{match['subject']} {match['be']}{' not' if answered.startswith('no') else ''} {match['rest']}"


def _where(match: re.Match[str], answered: str) -> str:
    place = (
        answered
        if re.match(_PREPOSITION + r"\b", answered) or _DETERMINED.match(answered)
        else f"at the {answered}"
    )
    return f"{match['rest']} {match['be']} {place}"


def _subject_is(match: re.Match[str], answered: str) -> str:
    """ "what color is the cat", "what is the man doing"."""
    return f"{match['subject']} {match['be']} {answered}"


def _answer_is(match: re.Match[str], answered: str) -> str:
    """ "what is on the table", "which animal is near the door"."""
    return f"{_with_article(answered)} {match['be']} {match['rest']}"


def _it_is(match: re.Match[str], answered: str) -> str:
    """ "what animal is this"."""
    return f"{match['subject']} {match['be']} {_with_article(answered)}"


def _there_are(match: re.Match[str], answered: str) -> str:
    """ "how many dogs are there in the room"."""
    return f"there {match['be']} {answered} {match['things']}{match['rest']}"


def _so_many_are(match: re.Match[str], answered: str) -> str:
    """ "how many dogs are on the grass"."""
    return f"{answered} {match['things']} {match['be']} {match['rest']}"


_Form: TypeAlias = "Callable[[re.Match[str], str], str]"
_RULES: tuple[tuple[re.Pattern[str], _Form], ...] = tuple(
    (re.compile(pattern), form)
    for pattern, form in (
        (rf"{_BE} there (?P<rest>.+)", _there),
        (rf"{_BE} (?P<subject>(?:the|this|that|these|those) \w+|it|he|she|they) (?P<rest>.+)", _is_it_so),
        (
            rf"how many (?P<things>.+?) {_BE} (?:there|visible|present)(?P<rest>.*)",
            _there_are,
        ),
        (
            rf"how many (?P<things>.+?) {_BE} (?P<rest>.+)",
            _so_many_are,
        ),
        (rf"what (?:colou?r|shape|size|material|kind|type|brand) {_BE} (?P<subject>.+)", _subject_is),
        (rf"what {_BE} the (?:colou?r|shape|size|material) of (?P<subject>.+)", _subject_is),
        (rf"what {_BE} (?P<subject>.+) (?:doing|made of|called)", _subject_is),
        (
            rf"(?:what|which)(?: [\w ]+?)? {_BE} (?P<subject>this|that|it|these|those)(?: .+)?",
            _it_is,
        ),
        (
            rf"(?:what|which|who)(?: [\w ]+?)? {_BE} (?P<rest>(?:the )?(?:\w+ )?{_PREPOSITION}\b.*)",
            _answer_is,
        ),
        (rf"where {_BE} (?P<rest>.+)", _where),
    )
)
