"""Ids of captions: equal for texts that say the same, so that equal captions of different images are no negatives."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from sightloop.objectives.positives import NO_CAPTION


def text_id(text: str) -> int:
    """Id of a text, 0 to 2^63 - 1, independent of letter case and white space."""
    words = " ".join(text.casefold().split())
    digest = blake2b(words.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def pad_caption_ids(rows: Sequence[Sequence[int]]) -> Tensor:
    """int64 `[b, M]` of b lists of ids, M the longest, at least 1."""
    width = max(1, *map(len, rows), 1)
    padded = [[*row, *[NO_CAPTION] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64).reshape(len(rows), width)
