"""Ids of the captions of a batch as one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sightloop.objectives.positives import NO_CAPTION


def pad_caption_ids(rows: Sequence[Sequence[int]]) -> Tensor:
    """int64 `[b, M]` of b lists of ids, M the longest, at least 1."""
    width = max(1, *map(len, rows), 1)
    padded = [[*row, *[NO_CAPTION] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64).reshape(len(rows), width)
