"""Look-alikes: pairs of images whose vectors are closer than unrelated pairs ever come."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sightloop.data.copies.clusters import Clusters
from sightloop.types import Floats32

QUANTILE = 1e-6  # share of unrelated pairs that reach the threshold
MIN_IMAGES = 200  # fewer have too few pairs to know the tail

_SAMPLE = 3000  # images whose pairs are the null
_ROWS_AT_ONCE = 1024


def look_alike_threshold(vectors: Floats32, clusters: Clusters, seed: int = 0) -> float | None:
    """Cosine that unrelated pairs reach once in a million.

    The null are the pairs of a random sample, without those that are copies. Its own tail at 1e-6 would be made of the
    look-alikes that are searched, so the tail is extrapolated from where they do not matter yet, the shares 1e-2 and
    1e-4 (of few pairs, that of the 20 closest). The share of pairs within a distance is a power of it, as the volume of
    a ball is: log share is linear in log(1 - cosine).

    Args:
        vectors: unit vectors `[n, d]`; rows with NaN are left out.
        clusters: copies that are known.
        seed: of the sample.

    Returns:
        Below 1; None for fewer than 200 images.
    """
    readable = np.flatnonzero(np.isfinite(vectors).all(axis=1))
    if len(readable) < MIN_IMAGES:
        return None
    rows = np.sort(np.random.default_rng(seed).permutation(readable)[:_SAMPLE])
    first, second = np.triu_indices(len(rows), 1)
    cosines = (vectors[rows] @ vectors[rows].T)[first, second]
    cosines = cosines[~clusters.joined(rows[first], rows[second])]
    low, high = 1e-2, max(1e-4, 20 / len(cosines))
    distances = 1 - np.quantile(cosines, [1 - low, 1 - high]).clip(max=1 - 1e-6)
    at_low, at_high = np.log(distances)
    power = np.log(low / high) / max(at_low - at_high, 1e-3)
    return float(1 - np.exp(at_low - np.log(low / QUANTILE) / power))


def look_alike_pairs(
    vectors: Floats32, threshold: float, clusters: Clusters
) -> Iterator[tuple[int, int, float]]:
    """Pairs with at least this cosine that are not in one cluster, the closest of each block first.

    All pairs are compared, blocks of 1,024 rows at a time: 100,000 vectors of 512 numbers take 5e12 products.
    """
    for start in range(0, len(vectors), _ROWS_AT_ONCE):
        block = vectors[start : start + _ROWS_AT_ONCE]
        cosines = block @ vectors[start:].T
        first, second = np.nonzero(cosines >= threshold)
        first, second, values = (
            first[later := second > first],
            second[later],
            cosines[first[later], second[later]],
        )
        order = np.argsort(-values, kind="stable")
        first, second, values = first[order] + start, second[order] + start, values[order]
        apart = ~clusters.joined(first, second)
        yield from zip(first[apart].tolist(), second[apart].tolist(), values[apart].tolist(), strict=True)
