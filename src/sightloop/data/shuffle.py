"""The order of training: which sample comes when, as a function of (seed, epoch, position) alone.

A shuffle of any size that is never stored: a Feistel network with cycle walking (Black and Rogaway, "Ciphers with
Arbitrary Finite Domains", 2002). Any position of any epoch can be asked for on any process, so that every number of
workers and ranks sees the same global batches, and a run goes on in the middle of an epoch.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sightloop.errors import UsageError

_ROUNDS = 12
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # SplitMix64's finaliser


def shuffled_index(index: NDArray[np.int64], *, count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The sample that stands at each place of an epoch: for each (seed, epoch) a bijection on 0..count-1.

    index: int64 of any shape, each 0 <= i < count. count: 1..2**62. seed, epoch: any integers >= 0. Raises `UsageError`
    for values out of range.
    """
    index = np.asarray(index, np.int64)
    if not 1 <= count <= 1 << 62:
        raise UsageError(f"count {count}: must be from 1 to 2**62.")
    if index.size and not (index.min() >= 0 and index.max() < count):
        raise UsageError(f"index: must be from 0 to {count - 1}, and one is not.")
    half = max(
        1, ((count - 1).bit_length() + 1) // 2
    )  # bits: the network permutes 4 ** half < 4 * count numbers
    keys = _keys(seed, epoch)
    values = _permuted(index.reshape(-1).astype(np.uint64), half, keys)
    while (outside := np.flatnonzero(values >= count)).size:  # walk the cycle until it comes back inside
        values[outside] = _permuted(values[outside], half, keys)
    return values.astype(np.int64).reshape(index.shape)


def steps_per_epoch(batch: int, count: int, *, drop_last: bool) -> int:
    """How many batches an epoch has. Raises `UsageError` where that is none."""
    if batch < 1 or count < 1:
        raise UsageError(f"batch {batch}, samples {count}: both must be at least 1.")
    steps = count // batch if drop_last else -(-count // batch)
    if not steps:
        raise UsageError(
            f"batch {batch}: there are only {count} samples; take a smaller batch, or keep the last one."
        )
    return steps


def batch_indices(
    step: int, batch: int, count: int, seed: int, *, drop_last: bool
) -> tuple[int, NDArray[np.int64]]:
    """The epoch and the samples, int64 `[<= batch]`, of the global batch of a step (from 0).

    Each sample comes once an epoch; drop_last leaves out the count % batch last ones of each epoch's order, otherwise
    the epoch's last batch is short.
    """
    epoch, within = divmod(step, steps_per_epoch(batch, count, drop_last=drop_last))
    places = np.arange(within * batch, min((within + 1) * batch, count), dtype=np.int64)
    return epoch, shuffled_index(places, count=count, seed=seed, epoch=epoch)


def rank_slice(indices: NDArray[np.int64], rank: int, world: int) -> NDArray[np.int64]:
    """This rank's contiguous part of a global batch; the parts of all ranks, in order, are the batch.

    Their sizes differ by one at most; a rank may get none.
    """
    if not 0 <= rank < world:
        raise UsageError(f"rank {rank}: must be from 0 to {world - 1}.")
    return indices[rank * len(indices) // world : (rank + 1) * len(indices) // world]


@lru_cache(maxsize=8)
def _keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    """A key for each round, uint64."""
    return np.random.SeedSequence((seed, epoch)).generate_state(_ROUNDS, np.uint64).astype(np.uint64)


def _permuted(values: NDArray[np.uint64], half: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A balanced Feistel network on numbers of 2 * half bits."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << bits) | right


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * _MIX[0]
    values = (values ^ (values >> np.uint64(27))) * _MIX[1]
    return values ^ (values >> np.uint64(31))
