"""Shuffled order of training samples, computed from (seed, epoch, position) without a stored permutation.

A pseudorandom permutation of any size: a Feistel network with cycle walking (Black and Rogaway, "Ciphers with
Arbitrary Finite Domains", 2002). Every process can compute any position of any epoch, so that all numbers of workers
and ranks see the same global batches, and training can resume in the middle of an epoch.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sightloop.errors import UsageError
from sightloop.types import Integers

_ROUNDS = 12
_SPLITMIX = (
    np.uint64(0xBF58476D1CE4E5B9),
    np.uint64(0x94D049BB133111EB),
)  # constants of SplitMix64's finalizer


def shuffled_index(index: Integers, *, count: int, seed: int, epoch: int) -> Integers:
    """Sample indices at the given positions of an epoch; for each (seed, epoch) a bijection on 0..count-1.

    Example with count = 5, seed = 0, epoch = 0: the network permutes the 4-bit numbers 0..15. It maps position 2 to 7,
    which is no sample; 7 is mapped again, to 3, and sample 3 is the result. Position 1 walks 1 -> 14 -> 6 -> 0. A walk
    ends because its cycle returns to the start at the latest; two walks never meet because the network is injective.

    Args:
        index: int64 `[...]`, positions from 0 to count-1.
        count: Number of samples, 1 to 2**62.
        seed: Any integer >= 0.
        epoch: Any integer >= 0.

    Returns:
        int64 `[...]`, of the shape of `index`.

    Raises:
        UsageError: A value out of range.
    """
    index = np.asarray(index, np.int64)
    if not 1 <= count <= 1 << 62:
        raise UsageError(f"count {count}: must be from 1 to 2**62.")
    if index.size and not (index.min() >= 0 and index.max() < count):
        raise UsageError(f"index: must be from 0 to {count - 1}, and one is not.")
    # The domain has 2 * half_bits bits, so 4 ** half_bits < 4 * count numbers: a walk takes under 4 steps on average.
    half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    values = _feistel(index.reshape(-1).astype(np.uint64), half_bits, keys)  # [M]
    while (outside := np.flatnonzero(values >= count)).size:
        values[outside] = _feistel(values[outside], half_bits, keys)
    return values.astype(np.int64).reshape(index.shape)


def rank_slice(indices: Integers, rank: int, world_size: int) -> Integers:
    """Contiguous part of a global batch for one rank; the parts of all ranks, concatenated, are the batch.

    7 indices over 3 ranks: 2, 2 and 3 of them.

    Args:
        indices: int64 `[B]`, the global batch.
        rank: 0 to world_size-1.
        world_size: Number of ranks.

    Returns:
        int64 `[b]`; the sizes differ by at most one, and b is 0 for some ranks where B < world_size.

    Raises:
        UsageError: `rank` out of range.
    """
    if not 0 <= rank < world_size:
        raise UsageError(f"rank {rank}: must be from 0 to {world_size - 1}.")
    return indices[rank * len(indices) // world_size : (rank + 1) * len(indices) // world_size]


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    """One key per round: uint64 `[_ROUNDS]`."""
    return np.random.SeedSequence((seed, epoch)).generate_state(_ROUNDS, np.uint64).astype(np.uint64)


def _feistel(values: NDArray[np.uint64], half_bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Balanced Feistel network on numbers of 2 * half_bits bits, `[M]`: a permutation for any round function.

    Each round is undone by itself with the halves swapped: (left, right) -> (right, left ^ f(right)).
    """
    bits, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_splitmix64(right ^ key) & mask)
    return (left << bits) | right


def _splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finalizer of SplitMix64 (Steele et al. 2014): every input bit changes half of the output bits."""
    values = (values ^ (values >> np.uint64(30))) * _SPLITMIX[0]
    values = (values ^ (values >> np.uint64(27))) * _SPLITMIX[1]
    return values ^ (values >> np.uint64(31))
