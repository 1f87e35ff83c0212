"""Models that judge the texts of another one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Protocol

from sightloop.data.text.tokenizer import Tokenizer
from sightloop.errors import UsageError
from sightloop.inference.image_encoding import Preprocessor
from sightloop.inference.matching import TokenizedTexts
from sightloop.protocols import Network
from sightloop.types import Encoded, Floats32, Integers, Pixels

_JUDGING = {"match", "similarity"}


class Judge(Protocol):
    """What of a model reads images and compares statements with them; `Model` is one."""

    @property
    def name(self) -> str: ...
    @property
    def network(self) -> Network: ...
    @property
    def capabilities(self) -> frozenset[str]: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def preprocessor(self) -> Preprocessor: ...
    def encode(self, batch: Sequence[Pixels]) -> Encoded: ...
    def tokenize(self, texts: Sequence[str], *, first_id: int | None = None) -> TokenizedTexts: ...
    def match_scores(
        self, image: Encoded, texts: TokenizedTexts, rows_of: Sequence[Integers]
    ) -> list[Floats32]: ...


@dataclass(eq=False)
class Judges:
    """Models that judge the texts of another, loaded once.

    Args:
        load: loads one by its name, None where names are refused.
    """

    load: Callable[[str], Judge] | None = None
    _loaded: dict[str, Judge] = field(default_factory=dict[str, Judge])

    def choose(self, source: object, own: Judge) -> Judge | None:
        """The model that judges.

        Args:
            source: a loaded model, what `load` takes, or None for the model that writes.
            own: the model that writes.

        Returns:
            None where the model that writes must judge and cannot.

        Raises:
            UsageError: the source is no model, or one that compares no text with an image.
        """
        judge = source
        if isinstance(source, (str, PathLike)) and self.load is not None:
            name = fspath(source)
            judge = self._loaded.get(name) or self._loaded.setdefault(name, self.load(name))
        if judge is None or judge is own:
            return own if own.capabilities & _JUDGING else None
        if not hasattr(judge, "match_scores"):
            raise UsageError(f"judge={source!r}: give a loaded model, a folder or a hub id")
        chosen: Judge = judge  # pyright: ignore[reportAssignmentType]
        if not chosen.capabilities & _JUDGING:
            raise UsageError(
                f"judge: {chosen.name} compares no text with an image; load a model that can match"
            )
        return chosen
