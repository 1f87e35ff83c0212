"""What a bootstrap is asked for, and which texts it keeps (Li et al. 2022, section 3.3: CapFilt)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from sightloop.capfilt.options import CapFiltOptions
from sightloop.tasks.caption_filter import CaptionFilter, drop_reason

TextSource: TypeAlias = Literal["web", "synthetic"]

TEXT_SOURCES: tuple[TextSource, ...] = ("web", "synthetic")
DIGITS = 6  # decimals of a score: verdicts are made from what the evidence shows


@dataclass(slots=True)
class CandidateText:
    """A text of one image and what was found about it. itm: probability of a match; itc: cosine; None: not asked.

    reason: "" while undecided; matched, ranked or unjudged where kept; else empty, looping, duplicate, unmatched,
    "not the best" or "not in the top k".
    """

    source: TextSource
    text: str
    itm: float | None = None
    itc: float | None = None
    kept: bool = False
    reason: str = ""


def drop_unusable(texts: Sequence[CandidateText], prompt: str | None = None) -> list[CandidateText]:
    """Drop what no model needs to see, the web's texts standing first; returns what is left.

    Of synthetic texts: empty ones (but for the prompt), loops and repetitions of an earlier text; of the web's: empty
    ones.
    """
    seen, rules, left = set[str](), CaptionFilter(prompt=prompt), list[CandidateText]()
    for text in texts:
        plain = " ".join(text.text.casefold().split())
        if not plain:
            text.reason = "empty"
        elif text.source == "synthetic":
            text.reason = "duplicate" if plain in seen else drop_reason(text.text, rules)[0]
        seen.add(plain)
        if not text.reason:
            left.append(text)
    return left


def decide(texts: Sequence[CandidateText], options: CapFiltOptions) -> None:
    """The verdicts of one image's screened texts, from their scores; of equal texts the first wins."""
    if options.mode == "captioner-only":
        for text in texts:
            text.kept, text.reason = True, "unjudged"
        return
    if options.keep == "top-k-itc":
        order = sorted(texts, key=lambda text: -(text.itc if text.itc is not None else -1.0))
        for place, text in enumerate(order):
            text.kept = place < options.top
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
