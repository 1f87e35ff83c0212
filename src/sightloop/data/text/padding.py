"""Padding and truncation of token ids: rows of unequal length -> one array."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np

from sightloop.errors import UsageError
from sightloop.types import Integers, Tokens


@dataclass(frozen=True, slots=True)
class Padding:
    """How rows are padded and truncated.

    Args:
        pad_id: Token id of the padding.
        to_max_length: Pad every row to the limit, and count the padding as text, as SigLIP was trained; otherwise to
            the longest row.
        side: Side of the padding. "left" needs `to_max_length`, because lengths count from the start.
        keep_eos: A truncated row keeps its last token, the end of the text.
    """

    pad_id: int
    to_max_length: bool = False
    side: Literal["left", "right"] = "right"
    keep_eos: bool = True


def check_texts(texts: Sequence[object]) -> None:
    """Raise UsageError unless `texts` is a list of strings of valid Unicode."""
    strings = [text for text in texts if isinstance(text, str)]
    if isinstance(texts, str) or len(strings) != len(texts):
        raise UsageError("texts must be a list of strings; put a single text in a list.")
    # Unpaired surrogates, which come from reading bytes with errors="surrogateescape".
    invalid = [
        i for i, text in enumerate(strings) if not text.isascii() and re.search("[\ud800-\udfff]", text)
    ]
    if invalid:
        raise UsageError(
            f"texts{invalid[:1]} is not valid Unicode (half of a surrogate pair); read its file as UTF-8, or "
            "replace such characters: text.encode('utf-8', 'replace').decode()."
        )


def pad(
    texts: Sequence[str],
    rows: list[list[int]],
    limit: int,
    padding: Padding,
    decode: Callable[[list[int]], str],
) -> Tokens:
    """Truncate and pad rows of token ids; one UserWarning reports how many texts and tokens were cut.

    Rows [1, 5, 2] and [1, 5, 6, 7, 2] with limit 4, padding 0 and EOS 2 become [[1, 5, 2, 0], [1, 5, 6, 2]].

    Args:
        texts: The R texts, for the warning.
        rows: Their token ids; rows above `limit` are replaced.
        limit: Largest number of tokens in a row.
        padding: Options.
        decode: The text of ids, for the warning.

    Returns:
        Ids int64 `[R, L]` and lengths `[R]`.
    """
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))  # [R]
    kept = np.minimum(lengths, limit)
    truncated = np.flatnonzero(lengths > limit)
    if truncated.size:
        longest = int(truncated[lengths[truncated].argmax()])
        lost = decode(rows[longest][limit - padding.keep_eos :])
        message = _truncation_message(texts, lengths, truncated, limit)
        for row in truncated.tolist():
            ids = rows[row]
            rows[row] = [*ids[: limit - 1], ids[-1]] if padding.keep_eos else ids[:limit]
        warnings.warn(f"{message}, which loses {lost[-60:]!r}", UserWarning, stacklevel=3)
    width = limit if padding.to_max_length else int(kept.max(initial=0))
    array = np.full((len(rows), width), padding.pad_id, np.int64)  # [R, L]
    column = np.arange(width)
    # True where a row has a token: the first (or, padded on the left, the last) kept[r] columns.
    used = column < kept[:, None] if padding.side == "right" else column >= width - kept[:, None]  # [R, L]
    array[used] = np.fromiter(chain.from_iterable(rows), np.int64, int(kept.sum()))
    return Tokens(ids=array, lengths=np.full_like(kept, limit) if padding.to_max_length else kept)


def _truncation_message(texts: Sequence[str], lengths: Integers, truncated: Integers, limit: int) -> str:
    lost = int((lengths[truncated] - limit).sum())
    longest = int(truncated[lengths[truncated].argmax()])
    return (
        f"{truncated.size} of {len(texts)} texts have more than {limit} tokens and were cut; {lost} tokens are lost. "
        f"The longest is text {longest} ({int(lengths[longest])} tokens): {texts[longest][:60]!r}..."
    )
