"""Plans of a conversation over images: what a question asks for, by rules of English.

Only a person's message is ever parsed. Captions, text in images and file names are shown and never read as requests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias

_IMAGES = r"(?:images?|photos?|pictures?|photographs?|pics?)"
_OF = (
    r"(?:(?:that|which) )?"
    r"(?:shows?|showing|has|have|having|with|of|contains?|containing|depicts?|(?:is|are) of)"
)
_THIS = r"(?:this|that|it|he|she|they|him|her|them|these|those)"
_MINE = r"(?:of (?:the|my|these) )?"
_I_HAVE = r"(?:do (?:i|we|you) have|have (?:i|we|you) got)"
_I_SEE = r"(?:can (?:i|you|one) see|do (?:i|you|we) see)"
_HERE = r"(?:here|(?:my|the|these|this) (?:images?|photos?|pictures?|photographs?|index|collection|folder))"
_BE = r"(?:is|are|was|were|does|do|did|has|have|can)"
_WH = r"(?:what|which|who|whose|where|why|when|how)"
_POLITE = re.compile(r"^(?:(?:please|can you|could you|would you|tell me|let me know|and|so|ok|now)[, ]+)+")
_NUMBERED = re.compile(
    rf"(?:\b(?:in|on|of|about|to|like) )?(?:{_IMAGES} |number |no\. ?|#)(\d{{1,3}})\b|\[(\d{{1,3}})\]"
)
# Each form of a request as its pieces.
_SIMILAR = re.compile(
    r"(?:(?:find|show|give|get|search for|are there|is there)(?: me)? )?(?:any )?"
    rf"(?:more|others?|anything|something)? ?(?:{_IMAGES})? ?(?:similar(?: {_IMAGES})?|like)(?: to)?"
    rf"(?: {_THIS})?(?: one| {_IMAGES})?"
)
_SHOWN = rf"(?:{_THIS}|the (?:first )?{_IMAGES}|there)"
_DESCRIBED = re.compile(
    rf"(?:describe|caption)(?: {_SHOWN})?"
    rf"|what(?: is|'s|s)?(?: (?:in|on|shown in))?(?: {_SHOWN})?"
    rf"|what (?:do you see|is shown|can be seen)(?: in)?(?: {_SHOWN})?"
    rf"|what does {_SHOWN} show"
)
_COMPARED = re.compile(
    rf"(?:are there |{_I_HAVE} |do more {_IMAGES} show )?more (?:{_IMAGES} (?:of|with|showing) )?"
    r"(?P<first>.+?) (?:or|than)(?: of| with)? (?P<second>.+)"
)
_ALL = re.compile(rf"how many {_IMAGES}(?: (?:are there|{_I_HAVE}|are in {_HERE}))?(?: in (?:total|all))?")
_COUNTED = [
    re.compile(
        rf"how many {_MINE}{_IMAGES} (?:are there |{_I_HAVE} )?"
        rf"(?:(?:in which|where) there (?:is|are) )?(?:{_OF} )?(?P<what>.+)"
    ),
    re.compile(rf"(?:in|on) how many {_IMAGES} (?:is there|are there|{_I_SEE}|appears?) (?P<what>.+)"),
    re.compile(rf"count (?:the |all )?{_IMAGES} {_OF} (?P<what>.+)"),
]
_SOUGHT = [
    re.compile(
        r"(?:find|show|search(?: for)?|look for|give|get|list)(?: me)?(?: all| some| any)?(?: (?:the|my))?"
        rf"(?: {_IMAGES} {_OF})? (?P<what>.+)"
    ),
    re.compile(rf"(?:which|what) {_MINE}{_IMAGES} (?:{_OF}|there is|there are) (?P<what>.+)"),
    re.compile(rf"(?:in|on) (?:which|what) {_IMAGES} (?:is|are|{_I_SEE})(?: there)? (?P<what>.+)"),
    re.compile(rf"(?:is there|are there|{_I_HAVE})(?: any| a| an| some)? {_IMAGES} {_OF} (?P<what>.+)"),
    re.compile(
        rf"(?:does|do) (?:any|one|some)(?: {_MINE})?(?: ?{_IMAGES})? (?:show|have|contain) (?P<what>.+)"
    ),
]
_THERE_IS = re.compile(rf"(?:is there|are there|{_I_HAVE}|any) (?P<what>.+?)(?: in {_HERE})?")


@dataclass(frozen=True, slots=True)
class CountImages:
    """How many images show something; text is "" for all images."""

    text: str


@dataclass(frozen=True, slots=True)
class CompareCounts:
    """Which of two things more images show."""

    first: str
    second: str


@dataclass(frozen=True, slots=True)
class FindImages:
    """Images that show something."""

    text: str


@dataclass(frozen=True, slots=True)
class FindSimilar:
    """Images like the last one, or like number `number` of the last answer."""

    number: int | None


@dataclass(frozen=True, slots=True)
class DescribeImage:
    """A caption of the last image, or of number `number` of the last answer."""

    number: int | None


@dataclass(frozen=True, slots=True)
class AskImage:
    """A question about one image.

    Attributes:
        question: as a model answers it.
        text: what the image shows, to search for it; "" for the last image.
        number: of the last answer, None for none.
    """

    question: str
    text: str = ""
    number: int | None = None


Plan: TypeAlias = "CountImages | CompareCounts | FindImages | FindSimilar | DescribeImage | AskImage"


def plan_of(message: str, *, has_image: bool) -> Plan | None:
    """What a message asks for; None if it asks for nothing that images can answer.

    Args:
        message: of the person.
        has_image: whether an earlier answer showed an image, which "it" may mean.
    """
    text = re.sub(r"\s+", " ", message.strip().lower()).rstrip("?.! ")
    number, text = _numbered(_POLITE.sub("", text))
    if not re.search(r"\w", text):
        return None if number is None else DescribeImage(number)
    refers = has_image or number is not None
    if _SIMILAR.fullmatch(text):
        return FindSimilar(number) if refers else None
    if _DESCRIBED.fullmatch(text):
        return DescribeImage(number) if refers else None
    if number is not None:
        return AskImage(_question(text), "", number)
    return _searched(text, has_image=has_image) or _asked(text, has_image=has_image)


def _numbered(text: str) -> tuple[int | None, str]:
    """The number of an image and the text without it: "how many dogs are in image 2" -> 2, "how many dogs are"."""
    match = _NUMBERED.search(text)
    if match is None:
        return None, text
    return int(match[1] or match[2]), f"{text[: match.start()]} {text[match.end() :]}".strip()


def _searched(text: str, *, has_image: bool) -> Plan | None:
    """A request for images or for their number."""
    if match := _COMPARED.fullmatch(text):
        return CompareCounts(_thing(match["first"]), _thing(match["second"]))
    if _ALL.fullmatch(text):
        return CountImages("")
    for form in _COUNTED:
        if match := form.fullmatch(text):
            return CountImages(_thing(match["what"]))
    for form in _SOUGHT:
        if match := form.fullmatch(text):
            return FindImages(_thing(match["what"]))
    # "is there a dog in it" asks about the image, "is there a dog" about the collection.
    refers = has_image and re.search(rf"\b(?:in|on) {_SHOWN}$", text)
    if not refers and (match := _THERE_IS.fullmatch(text)):
        return FindImages(_thing(match["what"]))
    if not re.match(rf"{_WH}\b|{_BE}\b", text):
        return FindImages(_thing(text))
    return None


def _asked(text: str, *, has_image: bool) -> Plan | None:
    """A question about the last image where it refers to it, else about the image that shows what it names."""
    refers = re.search(rf"\b(?:{_THIS}|there)\b|\bthe (?:first )?{_IMAGES}\b", text) is not None
    if has_image and refers:
        return AskImage(f"{re.sub(rf' (?:in|on|of) {_SHOWN}$', '', text)}?")
    named = _named(text)
    return (
        AskImage(f"{text}?", named) if named and not re.fullmatch(rf"(?:in |on )?{_SHOWN}", named) else None
    )


def _question(text: str) -> str:
    """A question whole again: "how many people are" -> "how many people are there?"."""
    return re.sub(r" (is|are|was|were)$", r" \1 there", text) + "?"


def _named(text: str) -> str:
    """What a question is about: "what color is the hat on the left" -> "hat on the left"; "" for nothing."""
    asks = rf"{_WH}(?: (?:colou?r|kind of|type of|sort of|shape|size|many|much|old|big))?"
    rest = re.sub(rf"^{asks} {_BE} ", "", text)
    rest = re.sub(
        rf"^{asks} ([\w-]+) {_BE} ", r"\1 ", rest
    )  # "what animal is on the grass" -> "animal on the grass"
    rest = re.sub(rf"^{_BE} (?:there )?", "", rest)
    rest = re.sub(r" (?:doing|wearing|holding|made of|called|look like|look)$", "", rest)
    return _thing(rest) if rest != text or not re.match(rf"{_WH}\b", text) else ""


def _thing(text: str) -> str:
    """A noun phrase without what does not describe it: "any dogs in my photos" -> "dogs"."""
    text = re.sub(rf"^(?:any|some|all|the|my|there (?:is|are)|{_IMAGES} {_OF}) ", "", text.strip())
    return re.sub(rf" (?:in|on|among) {_HERE}$", "", text)
