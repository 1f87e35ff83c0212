"""Filter rules of CapFilt: which of an image's texts are kept (Li et al. 2022, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from sightloop.capfilt.options import CapFiltOptions
from sightloop.tasks.caption_filter import CaptionFilter, drop_reason

TextSource: TypeAlias = Literal["web", "synthetic"]

TEXT_SOURCES: tuple[TextSource, ...] = ("web", "synthetic")
SCORE_DIGITS = 6  # decimals; texts are kept or dropped by the rounded scores that the evidence shows
# Reasons that `decide` gives by score.
_ATTRIBUTES = ("safe", "sensible", "grounded")  # that an answer must have, where the filter knows them
BELOW_THRESHOLD = ("unmatched", *(f"not {name}" for name in _ATTRIBUTES))
DECIDED_BY_SCORE = ("matched", *BELOW_THRESHOLD, "not the best", "ranked", "not in the top k")


@dataclass(slots=True)
class CandidateText:
    """A text of one image, with its scores and whether it is kept.

    Attributes:
        source: "web" for a text of the input dataset (of dialogues a person's answer), "synthetic" for one of the
            captioner.
        text: The text.
        itm: ITM probability in 0..1; None if not computed.
        itc: ITC cosine similarity in -1..1; None if not computed.
        kept: Whether it goes to the output.
        reason: "" while undecided. If kept: "matched", "ranked" or "unjudged" (no filter). If dropped: "empty",
            "looping", "duplicate", "unmatched", "not safe" and the like, "not the best" or "not in the top k".
        turn: Of answers, the number of the round among all rounds of the image's dialogues.
        attributes: Of answers, the filter's probabilities of attributes.
    """

    source: TextSource
    text: str
    itm: float | None = None
    itc: float | None = None
    kept: bool = False
    reason: str = ""
    turn: int | None = None
    attributes: dict[str, float] = field(default_factory=dict[str, float])


def drop_unusable(texts: Sequence[CandidateText], prompt: str | None = None) -> list[CandidateText]:
    """Drops the texts that need no model to be dropped and returns the others.

    Dropped are empty texts, and synthetic texts that repeat an earlier text, loop, or consist of the prompt alone.

    Args:
        texts: The texts of one image, web texts first.
        prompt: The captioner's prompt.
    """
    normalized_texts, rules, remaining = set[str](), CaptionFilter(prompt=prompt), list[CandidateText]()
    for text in texts:
        normalized = " ".join(text.text.casefold().split())
        if not normalized:
            text.reason = "empty"
        elif text.source == "synthetic":
            text.reason = "duplicate" if normalized in normalized_texts else drop_reason(text.text, rules)[0]
        normalized_texts.add(normalized)
        if not text.reason:
            remaining.append(text)
    return remaining


def decide(texts: Sequence[CandidateText], options: CapFiltOptions) -> None:
    """Sets `kept` and `reason` of one image's remaining texts from their scores; on a tie the first wins."""
    if options.task == "dialogue":
        _decide_turns(texts, options.threshold)
        return
    if options.mode == "captioner-only":
        for text in texts:
            text.kept, text.reason = True, "unjudged"
        return
    if options.keep == "top-k-itc":
        ranked = sorted(texts, key=lambda text: -(text.itc if text.itc is not None else -1.0))
        for rank, text in enumerate(ranked):
            text.kept = rank < options.top
            text.reason = "ranked" if text.kept else "not in the top k"
        return
    for text in texts:
        text.kept = text.itm is not None and text.itm >= options.threshold
        text.reason = "matched" if text.kept else "unmatched"
    matching = [text for text in texts if text.kept]
    if options.keep == "best" and matching:
        best = max(matching, key=lambda text: text.itm or 0.0)
        for text in matching:
            if text is not best:
                text.kept, text.reason = False, "not the best"


def _decide_turns(texts: Sequence[CandidateText], threshold: float) -> None:
    """Keeps one answer of each turn: the person's if it passes, else of those that pass the likeliest to be true."""
    passing: dict[int | None, list[CandidateText]] = {}
    for text in texts:
        lacks = [name for name in _ATTRIBUTES if text.attributes.get(name, 1.0) < threshold]
        matches = text.itm is not None and text.itm >= threshold
        text.kept = matches and not lacks
        text.reason = "matched" if text.kept else f"not {lacks[0]}" if lacks else "unmatched"
        if text.kept:
            passing.setdefault(text.turn, []).append(text)
    for own in passing.values():
        best = max(own, key=lambda text: (text.source == "web", text.itm or 0.0))
        for text in own:
            if text is not best:
                text.kept, text.reason = False, "not the best"
