"""What is hidden from a network that learns by filling gaps: words of texts (MLM) and patches of images (MIM).

Which ones is a function of (seed, step, row): the same for every number of processes, and whatever the padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sightloop.data.rng import generator
from sightloop.errors import UsageError

_MASKED, _REPLACED = 0.8, 0.1  # of the hidden words; the rest stays as it is
_SMALLEST_BLOCK = 16  # patches
_NARROWEST = 0.3  # height / width of a block, or the inverse
_TRIES = 100


class MaskedWords(NamedTuple):
    """ids int64 `[R, L]`: what the network reads. chosen bool `[R, L]`: where it has to tell what stood there."""

    ids: NDArray[np.int64]
    masked: NDArray[np.bool_]


def mask_words(
    ids: NDArray[np.int64],
    lengths: NDArray[np.int64],
    *,
    mask_id: int,
    vocab: int,
    share: float = 0.15,
    seed: int,
    step: int,
    rows: Sequence[int] | NDArray[np.int64],
) -> MaskedWords:
    """Hide words as BERT does (Devlin et al. 2019, section 3.1): of those chosen 80 % become `mask_id`, 10 % a random
    token, 10 % stay.

    ids `[R, L]`, lengths `[R]`: each row begins and ends with a special token; these two and the padding are never
    chosen. share: of the words between, rounded, but one at least where there is one (and none with 0). rows: where
    each stands in the global batch; with fewer, `[P]`, R/P consecutive texts belong to each.
    Raises `UsageError` for a share outside 0..1, and where R is no multiple of P.
    """
    _check_share(share)
    texts = _texts_per_row(len(ids), len(rows))
    read, chosen = ids.copy(), np.zeros(ids.shape, np.bool_)
    for i, length in enumerate(lengths.tolist()):
        words = max(length - 2, 0)
        count = min(words, max(1, round(share * words))) if share else 0
        if not count:
            continue
        random = generator("words", seed, step, int(rows[i // texts]), i % texts)
        places = 1 + random.permutation(words)[:count]
        fate, others = random.random(count), random.integers(vocab, size=count)
        kept = ids[i, places]
        changed = np.where(fate < _MASKED, mask_id, np.where(fate < _MASKED + _REPLACED, others, kept))
        read[i, places], chosen[i, places] = changed, True
    return MaskedWords(read, chosen)


def mask_patches(
    grid: tuple[int, int],
    *,
    share: float = 0.6,
    seed: int,
    step: int,
    rows: Sequence[int] | NDArray[np.int64],
    unit: int = 2,
    blocks: bool = False,
) -> NDArray[np.bool_]:
    """Hide patches: bool `[B, height, width]`, True = hidden, exactly `round(share * height * width)` of each image.

    grid: patches down and across. rows `[B]`: where each image stands in the global batch. Hidden together are
    squares of `unit` x `unit` patches, the last one perhaps in part (SimMIM, Xie et al. 2022, section 3.2); or with
    `blocks`, fewer and larger rectangles (BEiT, Bao et al. 2022, algorithm 1).
    Raises `UsageError` for a share outside 0..1 and a grid or unit below 1.
    """
    _check_share(share)
    height, width = grid
    if height < 1 or width < 1 or unit < 1:
        raise UsageError(f"grid={grid}, unit={unit}: must be at least 1.")
    count = round(share * height * width)
    hidden = np.zeros((len(rows), height, width), np.bool_)
    for picture, row in zip(hidden, rows, strict=True):
        random = generator("patches", seed, step, int(row))
        if blocks:
            _hide_blocks(picture, count, random)
        else:
            _hide_units(picture, count, unit, random)
    return hidden


def _hide_units(hidden: NDArray[np.bool_], count: int, unit: int, random: np.random.Generator) -> None:
    down, across = (-(-side // unit) for side in hidden.shape)
    turn = random.permutation(down * across).reshape(down, across)  # which unit is hidden first, second, ...
    turns = turn.repeat(unit, 0).repeat(unit, 1)[: hidden.shape[0], : hidden.shape[1]]
    hidden.flat[np.argsort(turns, axis=None, kind="stable")[:count]] = True


def _hide_blocks(hidden: NDArray[np.bool_], count: int, random: np.random.Generator) -> None:
    height, width = hidden.shape
    for _ in range(_TRIES):
        left = count - int(hidden.sum())
        if not left:
            return
        area = random.uniform(min(_SMALLEST_BLOCK, left), left)
        aspect = math.exp(random.uniform(math.log(_NARROWEST), -math.log(_NARROWEST)))
        tall = min(height, max(1, round(math.sqrt(area * aspect))))
        wide = min(width, max(1, round(math.sqrt(area / aspect))))
        top, start = random.integers(height - tall + 1), random.integers(width - wide + 1)
        block = np.zeros_like(hidden)
        block[top : top + tall, start : start + wide] = True
        hidden.flat[np.flatnonzero(block & ~hidden)[:left]] = True
    # A nearly full image, whose last gaps no block happened to hit.
    gaps = np.flatnonzero(~hidden)
    hidden.flat[random.permutation(gaps)[: count - int(hidden.sum())]] = True


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise UsageError(f"share={share}: must be from 0 to 1.")


def _texts_per_row(texts: int, rows: int) -> int:
    if rows == 0 or texts % rows:
        if texts:
            raise UsageError(f"{texts} texts for {rows} rows: every row must have the same number of texts.")
        return 1
    return texts // rows
