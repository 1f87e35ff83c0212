"""Shuffling of a training set: the sample at each position as a function of (seed, epoch, position).

A permutation of any size that is never stored: a Feistel network with cycle walking (Black and Rogaway, "Ciphers with
Arbitrary Finite Domains", 2002). Any process can ask for any position of any epoch, so that every number of workers and
ranks sees the same global batches, and a run resumes in the middle of an epoch.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sightloop.errors import UsageError
from sightloop.types import Integers

_ROUNDS = 12
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # SplitMix64's finalizer


def shuffled_index(index: Integers, *, count: int, seed: int, epoch: int) -> Integers:
    """Samples at the given positions of an epoch: for each (seed, epoch) a permutation of 0..count-1.

    Args:
        index: positions, int64 of any shape `[...]`, 0 <= i < count.
        count: samples, 1..2**62.
        seed: 0 or more.
        epoch: 0 or more.

    Returns:
        int64 `[...]`.

    Raises:
        UsageError: a value out of range.
    """
    index = np.asarray(index, np.int64)
    if not 1 <= count <= 1 << 62:
        raise UsageError(f"count {count}: must be from 1 to 2**62.")
    if index.size and not (index.min() >= 0 and index.max() < count):
        raise UsageError(f"index: must be from 0 to {count - 1}, and one is not.")
    # Half of the bits: the network permutes 4 ** half < 4 * count numbers. 10 samples: half 2, 16 numbers.
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    keys = _keys(seed, epoch)
    values = _permuted(index.reshape(-1).astype(np.uint64), half, keys)
    while (outside := np.flatnonzero(values >= count)).size:  # walk the cycle until it comes back inside
        values[outside] = _permuted(values[outside], half, keys)
    return values.astype(np.int64).reshape(index.shape)


def rank_slice(indices: Integers, rank: int, world: int) -> Integers:
    """This rank's part of a global batch `[n]`, contiguous: `[n // world]` or one more.

    The parts of all ranks in order are the batch; with n < world some are empty.
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
