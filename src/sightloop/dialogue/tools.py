"""Tools of a conversation over an index: a small typed set, none of which writes, runs code or leaves the machine.

A tool takes plain values and returns plain values. What it reads of images (captions, text, names) is data: nothing of
it is ever parsed as a request.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sightloop.types import ImageSource, JsonDict

_MATCH = 0.5  # ITM probability from which a judge believes a hit
_NAMED = 200  # best hits by keywords whose captions are read
# Words that name nothing in an image.
_EMPTY = frozenset(
    "a an the and or of in on at by to from with without for as into over under near is are was were be being been it "
    "its his her their this that these those there some any who which what".split()
)


class Writer(Protocol):
    """What of a model looks at one image."""

    @property
    def name(self) -> str: ...
    @property
    def capabilities(self) -> frozenset[str]: ...
    def caption(self, images: ImageSource) -> list[str]: ...
    def answer(self, images: ImageSource, questions: str) -> list[str]: ...


class SearchHit(Protocol):
    """What of a hit is cited."""

    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def itm(self) -> float | None: ...
    @property
    def captions(self) -> list[str]: ...
    def image(self) -> str | bytes: ...


class SearchHits(Protocol):
    """Hits of a search, with a note."""

    @property
    def hits(self) -> Sequence[SearchHit]: ...
    @property
    def note(self) -> str: ...
    @property
    def total(self) -> int: ...


class Collection(Protocol):
    """What of an index is searched; `search.index.Index` is one."""

    def search(
        self,
        text: str | None = None,
        k: int = 20,
        *,
        like: str | None = ...,
        words: str | None = ...,
        rerank: int = ...,
        cut: float | None = ...,
    ) -> SearchHits: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One use of a tool.

    Attributes:
        tool: its name.
        argument: what it was given.
        result: what it returned, for people.
    """

    tool: str
    argument: str
    result: str

    def as_json(self) -> JsonDict:
        """The call as JSON values."""
        return {"tool": self.tool, "argument": self.argument, "result": self.result}


class Tools:
    """The tools, with a record of their use.

    Args:
        collection: the index.
        model: looks at images.
        cut: promised rate of false finds of a search.
        rerank: best hits that ITM scores again, where there is a judge.
    """

    def __init__(self, collection: Collection, model: Writer, *, cut: float, rerank: int) -> None:
        self.collection, self.model, self.cut, self.rerank = collection, model, cut, rerank
        self.calls: list[ToolCall] = []
        self.note = ""  # of the last search: how sure its cut is

    def search(self, text: str, k: int) -> list[SearchHit]:
        """Images that show a text, best first, without those that the judge does not believe.

        Where none is left, or the calibrated cut finds that none shows it: the images whose captions name all of it;
        [] if there are none.
        """
        results = self.collection.search(text, max(k, self.rerank), rerank=self.rerank, cut=self.cut)
        hits = [hit for hit in results.hits if hit.itm is None or hit.itm >= _MATCH]
        self.note = results.note
        outcome = f"{len(hits)} of {results.total:,} images; {results.note}"
        if not hits and (hits := self._named(text)):
            self.note = "found by captions alone"
            outcome += f"; captions of {len(hits):,} images name it"
        self._note("search", text, outcome.rstrip("; "))
        return hits[:k]

    def _named(self, text: str) -> list[SearchHit]:
        """Images whose captions have every word of a text that names something, in the singular or the plural."""
        wanted = [_forms(word) for word in re.findall(r"\w+", text.lower()) if word not in _EMPTY]
        if not wanted:
            return []
        query = " ".join(sorted(set[str]().union(*wanted)))
        named: list[SearchHit] = []
        for hit in self.collection.search(None, _NAMED, words=query).hits:
            own = {word for caption in hit.captions for word in re.findall(r"\w+", caption.lower())}
            if all(own & forms for forms in wanted):
                named.append(hit)
        return named

    def similar(self, identity: str, k: int) -> list[SearchHit]:
        """Images like one of the index, best first."""
        results = self.collection.search(None, k, like=identity)
        self._note("similar", identity, f"{len(results.hits)} images")
        return list(results.hits)

    def look(self, hit: SearchHit, question: str) -> str:
        """The model's answer to a question about an image."""
        answer = self.model.answer(hit.image(), question)[0]
        self._note("look", f"{hit.name}: {question}", answer)
        return answer

    def describe(self, hit: SearchHit) -> str:
        """The model's caption of an image."""
        caption = self.model.caption(hit.image())[0]
        self._note("describe", hit.name, caption)
        return caption

    def compare(self, first: int, second: int) -> int:
        """The difference of two counts."""
        self._note("subtract", f"{first} - {second}", str(first - second))
        return first - second

    def _note(self, tool: str, argument: str, result: str) -> None:
        self.calls.append(ToolCall(tool, argument, result))


def _forms(word: str) -> set[str]:
    """A word and what may be its singular or plural: "boxes" -> "boxes" "boxe" "box" "boxess" "boxeses"."""
    shorter = {word[: -len(end)] for end in ("s", "es") if word.endswith(end) and len(word) > len(end) + 1}
    return {word, f"{word}s", f"{word}es", *shorter}
