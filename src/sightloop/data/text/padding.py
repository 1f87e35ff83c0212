"""Rows of token ids -> one rectangle: what is too long is cut and said, what is too short is filled up."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from sightloop.errors import UsageError
from sightloop.types import Tokens


@dataclass(frozen=True, slots=True)
class Padding:
    """How rows are cut and filled.

    whole: every row is filled up to the limit, and what fills it counts as text, as SigLIP was trained to read it.
    side: where it is filled; rows that are filled on the left need `whole`, as lengths count from the start.
    end: a row that is cut keeps its last token, the end of the text.
    """

    pad_id: int
    to_max_length: bool = False
    side: Literal["left", "right"] = "right"
    keep_eos: bool = True


def check_texts(texts: Sequence[str]) -> None:
    """Raises UsageError unless `texts` is a list of strings of valid Unicode."""
    items = cast("Sequence[object]", texts)
    if isinstance(items, str) or not all(isinstance(item, str) for item in items):
        raise UsageError("texts must be a list of strings; put a single text in a list.")
    bad = [
        place for place, text in enumerate(texts) if not text.isascii() and re.search("[\ud800-\udfff]", text)
    ]
    if bad:
        raise UsageError(
            f"texts{bad[:1]} is not valid Unicode (half of a surrogate pair); read its file as UTF-8, or "
            "replace such characters: text.encode('utf-8', 'replace').decode()."
        )


def pad(texts: Sequence[str], rows: list[list[int]], limit: int, padding: Padding) -> Tokens:
    """Ids of R texts as int64 `[R, L]`; one UserWarning says how many texts and tokens were cut at `limit`."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    kept = np.minimum(lengths, limit)
    cut = np.flatnonzero(lengths > limit)
    if cut.size:
        for row in cut.tolist():
            rows[row] = [*rows[row][: limit - 1], rows[row][-1]] if padding.keep_eos else rows[row][:limit]
        warnings.warn(_cut_message(texts, lengths, cut, limit), UserWarning, stacklevel=3)
    ids = np.full(
        (len(rows), limit if padding.to_max_length else int(kept.max(initial=0))), padding.pad_id, np.int64
    )
    places = np.arange(ids.shape[1])
    used = (
        places < kept[:, None] if padding.side == "right" else places >= ids.shape[1] - kept[:, None]
    )  # [R, L]
    ids[used] = np.fromiter(chain.from_iterable(rows), np.int64, int(kept.sum()))
    return Tokens(ids=ids, lengths=np.full_like(kept, limit) if padding.to_max_length else kept)


def _cut_message(texts: Sequence[str], lengths: NDArray[np.int64], cut: NDArray[np.int64], limit: int) -> str:
    lost = int((lengths[cut] - limit).sum())
    worst = int(cut[lengths[cut].argmax()])
    return (
        f"{cut.size} of {len(texts)} texts have more than {limit} tokens and were cut; {lost} tokens are lost. "
        f"The longest is text {worst} ({int(lengths[worst])} tokens): {texts[worst][:60]!r}..."
    )
