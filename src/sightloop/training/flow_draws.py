"""Random draws of rectified flow, functions of (seed, step, row of the global batch), and texts left out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sightloop.data.rng import generator


def flow_draws(
    shape: tuple[int, ...], seed: int, step: int, rows: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws of B images.

    Args:
        shape: of an image's latents, (C, h, w).
        seed: of the run.
        step: of the batch.
        rows: of the global batch.

    Returns:
        Standard normal noise `[B, C, h, w]`, standard normal numbers for the times `[B]`, and numbers in 0..1 `[B]`
        that say whose text is left out.
    """
    noise = np.empty((len(rows), *shape), np.float32)
    numbers = np.empty((len(rows), 2), np.float32)
    for i, row in enumerate(rows):
        random = generator("flow", seed, step, row)
        numbers[i] = random.standard_normal(), random.random()
        random.standard_normal(shape, np.float32, noise[i])
    return torch.from_numpy(noise), torch.from_numpy(numbers[:, 0]), torch.from_numpy(numbers[:, 1])


def drop_texts(ids: Tensor, lengths: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """Texts of which some become the empty text: their first and last token alone.

    Args:
        ids: `[R, L]`.
        lengths: `[R]`, at least 2.
        dropped: bool `[R]`.

    Returns:
        ids `[R, L]` and lengths `[R]`.
    """
    ends = ids.gather(1, (lengths - 1)[:, None])  # [R, 1]
    empty = torch.cat([ids[:, :1], ends, ids[:, 2:]], dim=1)
    return torch.where(dropped[:, None], empty, ids), torch.where(dropped, 2, lengths)
