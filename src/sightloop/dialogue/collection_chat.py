"""Conversation over a collection: every answer comes from searches of an index and looks at its images, and cites them.

As in LaMDA (Thoppilan et al. 2022, section 6.2) a question becomes calls of tools, at most four rounds of them. What
nothing in the collection shows is declined, by the calibrated cut of the search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sightloop.dialogue.plan import (
    AskImage,
    CompareCounts,
    CountImages,
    DescribeImage,
    FindImages,
    FindSimilar,
    plan_of,
)
from sightloop.dialogue.tools import Collection, SearchHit, ToolCall, Tools, Writer
from sightloop.errors import UnsupportedError, UsageError
from sightloop.types import JsonDict

MAX_ROUNDS = 4
_SHOWN = 5  # images of an answer
_COUNTED = 200  # best hits that are looked at to count
_HELP = "Ask for images (find a red car), how many there are, or about what one of them shows."


@dataclass(frozen=True, slots=True)
class Citation:
    """An image that an answer stands on: its number in the answer, its id in the index, its name."""

    number: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class GroundedAnswer:
    """An answer with its evidence.

    Attributes:
        text: for people; "[1]" refers to a citation.
        citations: images of the index, none where nothing was found.
        declined: whether nothing in the collection shows what was asked about.
        calls: the tools that were used, in order.
        note: how sure the last search is that what it finds is there.
    """

    text: str
    citations: tuple[Citation, ...] = ()
    declined: bool = False
    calls: tuple[ToolCall, ...] = ()
    note: str = ""

    def as_json(self) -> JsonDict:
        """All of it as JSON values."""
        return {
            "answer": self.text,
            "declined": self.declined,
            "citations": [{"number": c.number, "id": c.id, "name": c.name} for c in self.citations],
            "note": self.note,
            "calls": [call.as_json() for call in self.calls],
        }


class CollectionChat:
    """A conversation over an index.

    Args:
        collection: `search.index.Index`.
        model: answers questions about images, or at least captions them.
        cut: promised rate of false finds, 0 to 1: smaller declines more.
        rerank: best hits that ITM scores again; 0 without a judge.

    Raises:
        UnsupportedError: the model neither answers nor captions.
    """

    def __init__(self, collection: Collection, model: Writer, *, cut: float = 0.1, rerank: int = 16) -> None:
        if not model.capabilities & {"answer", "caption"}:
            raise UnsupportedError(f"{model.name} can neither answer questions nor caption images")
        if not 0 < cut < 1:
            raise UsageError(f"cut={cut}: must be between 0 and 1")
        self.collection, self.model, self.cut, self.rerank = collection, model, cut, rerank
        self._shown: list[SearchHit] = []  # images of the last answer that had some

    def ask(self, message: str) -> GroundedAnswer:
        """The answer to a message; what it shows is what "it" and "image 2" mean in the next one."""
        tools = Tools(self.collection, self.model, cut=self.cut, rerank=self.rerank)
        plan = plan_of(message, has_image=bool(self._shown))
        if plan is None:
            return GroundedAnswer(_HELP)
        if isinstance(plan, CountImages):
            answer = self._count(tools, plan)
        elif isinstance(plan, CompareCounts):
            answer = self._compare(tools, plan)
        elif isinstance(plan, FindImages):
            answer = self._find(tools, plan)
        elif isinstance(plan, AskImage) and plan.text:
            answer = self._ask_collection(tools, plan)
        else:
            answer = self._ask_shown(tools, plan)
        assert len(tools.calls) <= MAX_ROUNDS
        return answer

    def _find(self, tools: Tools, plan: FindImages) -> GroundedAnswer:
        hits = tools.search(plan.text, _SHOWN)
        if not hits:
            return _declined(plan.text, tools)
        return self._showing(hits, f"{_images(len(hits))} may show {plan.text}: {{}}", tools)

    def _count(self, tools: Tools, plan: CountImages) -> GroundedAnswer:
        if not plan.text:
            return GroundedAnswer(f"There are {len(self.collection):,} images in the collection.")
        hits = self._matching(tools, plan.text)
        if not hits:
            return _declined(plan.text, tools)
        more = ", such as" if len(hits) > _SHOWN else ":"
        at_least = "At least " if len(hits) >= _COUNTED else ""
        verb = "shows" if len(hits) == 1 else "show"
        form = f"{at_least}{_images(len(hits))} {verb} {plan.text}{more} {{}}"
        return self._showing(hits[:_SHOWN], form, tools)

    def _compare(self, tools: Tools, plan: CompareCounts) -> GroundedAnswer:
        sides = [self._matching(tools, text) for text in (plan.first, plan.second)]
        more = tools.compare(len(sides[0]), len(sides[1]))
        if not any(sides):
            return _declined(f"{plan.first} or {plan.second}", tools)
        counts = f"{_images(len(sides[0]))} with {plan.first}, {len(sides[1])} with {plan.second}"
        winner = plan.first if more > 0 else plan.second
        text = f"As many of both: {counts}." if not more else f"More with {winner}: {counts}."
        return self._showing([hit for side in sides for hit in side[:2]], f"{text} {{}}", tools)

    def _matching(self, tools: Tools, text: str) -> list[SearchHit]:
        """All hits that a judge believes; without a judge, the best few."""
        tools.rerank = _COUNTED if self.rerank else 0
        return tools.search(text, _COUNTED if self.rerank else _SHOWN)

    def _ask_collection(self, tools: Tools, plan: AskImage) -> GroundedAnswer:
        hits = tools.search(plan.text, 1)
        if not hits:
            return _declined(plan.text, tools)
        return self._answered(hits[0], self._look(tools, hits[0], plan.question), tools)

    def _ask_shown(self, tools: Tools, plan: FindSimilar | DescribeImage | AskImage) -> GroundedAnswer:
        number = plan.number or 1
        if not 1 <= number <= len(self._shown):
            return GroundedAnswer(f"The last answer has no image {number}. {_HELP}", calls=tuple(tools.calls))
        hit = self._shown[number - 1]
        if isinstance(plan, FindSimilar):
            hits = tools.similar(hit.id, _SHOWN)
            return self._showing(hits, f"{_images(len(hits))} like it: {{}}", tools)
        if isinstance(plan, DescribeImage) and "caption" in self.model.capabilities:
            return self._answered(hit, tools.describe(hit), tools)
        question = "what is in the image?" if isinstance(plan, DescribeImage) else plan.question
        return self._answered(hit, self._look(tools, hit, question), tools)

    def _look(self, tools: Tools, hit: SearchHit, question: str) -> str:
        if "answer" in self.model.capabilities:
            return tools.look(hit, question)
        return tools.describe(hit)

    def _answered(self, hit: SearchHit, answer: str, tools: Tools) -> GroundedAnswer:
        return self._showing([hit], f"{answer.strip().rstrip('.') or 'nothing'} {{}}", tools)

    def _showing(self, hits: Sequence[SearchHit], form: str, tools: Tools) -> GroundedAnswer:
        """An answer that cites images, which the next message may mean; form has "{}" for them."""
        self._shown = list(hits)
        citations = tuple(Citation(i, hit.id, hit.name) for i, hit in enumerate(hits, 1))
        cited = " ".join(f"[{citation.number}]" for citation in citations)
        return GroundedAnswer(form.replace("{}", cited), citations, calls=tuple(tools.calls), note=tools.note)


def _declined(text: str, tools: Tools) -> GroundedAnswer:
    answer = f"Nothing in the collection shows {text}."
    return GroundedAnswer(answer, declined=True, calls=tuple(tools.calls), note=tools.note)


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"
