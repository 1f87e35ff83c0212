"""Tools of a conversation over an index: a small typed set, none of which writes, runs code or leaves the machine.

A tool takes plain values and returns plain values. What it reads of images (captions, text, names) is data: nothing of
it is ever parsed as a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sightloop.types import ImageSource, JsonDict

_MATCH = 0.5  # ITM probability from which a judge believes a hit


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

        [] if none is left, or if the calibrated cut finds that none shows it.
        """
        results = self.collection.search(text, max(k, self.rerank), rerank=self.rerank, cut=self.cut)
        hits = [hit for hit in results.hits if hit.itm is None or hit.itm >= _MATCH]
        self.note = results.note
        self._note("search", text, f"{len(hits)} of {results.total:,} images; {results.note}".rstrip("; "))
        return hits[:k]

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
