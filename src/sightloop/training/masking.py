"""Random masks of masked modeling: words of texts (MLM) and patches of images (MIM).

The masks are functions of (seed, step, row), independent of padding and number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sightloop.data.rng import generator
from sightloop.errors import UsageError

_MASKED, _REPLACED = 0.8, 0.1  # shares of the chosen words; the others keep their id
_SMALLEST_BLOCK = 16  # patches
_NARROWEST = 0.3  # height / width of a block, or the inverse
_TRIES = 100


class MaskedWords(NamedTuple):
    """Texts with masked words.

    Args:
        ids: int64 `[R, L]`, input of the network.
        masked: bool `[R, L]`, True for tokens to predict.
    """

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
    """Masks words as BERT does: of the chosen ones 80 % become `mask_id`, 10 % a random token, 10 % keep their id.

    (Devlin et al. 2019, section 3.1.)

    Args:
        ids: int64 `[R, L]`; each row begins and ends with a special token, which is never chosen, nor is padding.
        lengths: int64 `[R]`, tokens without padding.
        mask_id: id of [MASK].
        vocab: number of ids to draw random tokens from.
        share: of the words to choose, 0..1, rounded; at least one word of each text unless it is 0.
        seed: of the run.
        step: of the batch.
        rows: int64 `[P]`, rows of the global batch; R / P consecutive texts belong to each.

    Raises:
        UsageError: share is outside 0..1, or R is no multiple of P.
    """
    _check_share(share)
    texts = _texts_per_row(len(ids), len(rows))
    masked_ids, masked = ids.copy(), np.zeros(ids.shape, np.bool_)
    for i, length in enumerate(lengths.tolist()):
        words = max(length - 2, 0)
        count = min(words, max(1, round(share * words))) if share else 0
        if not count:
            continue
        random = generator("words", seed, step, int(rows[i // texts]), i % texts)
        positions = 1 + random.permutation(words)[:count]
        draw, others = random.random(count), random.integers(vocab, size=count)
        kept = ids[i, positions]
        # 0 [MASK] 0.8 random token 0.9 kept 1
        changed = np.where(draw < _MASKED, mask_id, np.where(draw < _MASKED + _REPLACED, others, kept))
        masked_ids[i, positions], masked[i, positions] = changed, True
    return MaskedWords(masked_ids, masked)


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
    """Masks of hidden patches, exactly round(share * height * width) in each image.

    Args:
        grid: (height, width) in patches, at least 1.
        share: of the patches to hide, 0..1.
        seed: of the run.
        step: of the batch.
        rows: int64 `[B]`, rows of the global batch.
        unit: squares of unit x unit patches are hidden together, the last one perhaps in part (SimMIM, Xie et al.
            2022, section 3.2); at least 1.
        blocks: hide fewer and larger rectangles instead (BEiT, Bao et al. 2022, algorithm 1).

    Returns:
        bool `[B, height, width]`, True for hidden patches.

    Raises:
        UsageError: share is outside 0..1, or grid or unit is below 1.
    """
    _check_share(share)
    height, width = grid
    if height < 1 or width < 1 or unit < 1:
        raise UsageError(f"grid={grid}, unit={unit}: must be at least 1.")
    count = round(share * height * width)
    hidden = np.zeros((len(rows), height, width), np.bool_)
    for mask, row in zip(hidden, rows, strict=True):
        random = generator("patches", seed, step, int(row))
        if blocks:
            _hide_blocks(mask, count, random)
        else:
            _hide_units(mask, count, unit, random)
    return hidden


def _hide_units(hidden: NDArray[np.bool_], count: int, unit: int, random: np.random.Generator) -> None:
    down, across = (-(-side // unit) for side in hidden.shape)
    order = random.permutation(down * across).reshape(down, across)  # of each unit
    orders = order.repeat(unit, 0).repeat(unit, 1)[: hidden.shape[0], : hidden.shape[1]]  # of each patch
    hidden.flat[np.argsort(orders, axis=None, kind="stable")[:count]] = True


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
    # Nearly all patches are hidden, and no block hit the last ones.
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
