"""Look-alikes: pairs of images whose vectors are closer than unrelated pairs ever come."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sightloop.data.copies.clusters import Clusters
from sightloop.types import Floats32, Integers

QUANTILE = 1e-6  # share of unrelated pairs that reach the threshold
MIN_IMAGES = 200  # fewer have too few pairs to know the tail

_SAMPLE = 3000  # images whose pairs are the null
_ROWS_AT_ONCE, _COLUMNS_AT_ONCE = 1024, 16_384
_PROJECTED_SAMPLE = 1000
_PAIR_COST = (
    400  # of a product of two rows that are picked one by one, by that of two rows in a matrix product
)
_PAIRS = 16_384  # whose cosines are computed at once


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

    No such pair is missed, and few others are compared: a projection onto the directions in which a sample varies most
    brings no two vectors further apart than they are, so pairs that are far apart there are left out. With a 16th of
    the directions 100,000 vectors of 512 numbers take 2e11 products instead of 3e12.
    """
    near = np.flatnonzero(np.isfinite(vectors).all(axis=1))
    # |a - b|^2 = 2 - 2 cosine; a little more, for rounding.
    reach = np.float32(max(0.0, 2 - 2 * threshold) + 1e-4)
    projected = _projected(vectors[near], float(reach))  # [m, p]
    lengths = np.einsum("np,np->n", projected, projected)
    for start in range(0, len(near), _ROWS_AT_ONCE):
        end = min(start + _ROWS_AT_ONCE, len(near))
        block: list[tuple[Integers, Integers, Floats32]] = []
        for low in range(start, len(near), _COLUMNS_AT_ONCE):
            high = min(low + _COLUMNS_AT_ONCE, len(near))
            # Squared distance <= reach, as a bound on twice the product of two vectors.
            bounds = lengths[start:end, None] + (lengths[low:high] - reach)
            rows, columns = np.nonzero(2 * projected[start:end] @ projected[low:high].T >= bounds)
            later = columns + low > rows + start
            rows, columns = near[rows[later] + start], near[columns[later] + low]
            cosines = _cosines(vectors, rows, columns)
            close = cosines >= threshold
            block.append((rows[close], columns[close], cosines[close]))
        first, second, values = (np.concatenate(column) for column in zip(*block, strict=True))
        order = np.argsort(-values, kind="stable")
        first, second, values = first[order], second[order], values[order]
        apart = ~clusters.joined(first, second)
        yield from zip(first[apart].tolist(), second[apart].tolist(), values[apart].tolist(), strict=True)


def _projected(vectors: Floats32, reach: float) -> Floats32:
    """Vectors `[n, d]` along the directions in which a sample of them varies most, `[n, p]`.

    p is what costs least: the fewer directions, the more pairs stay within reach by chance and are compared one by one.

    Args:
        vectors: to project.
        reach: greatest squared distance that counts.
    """
    count, width = vectors.shape
    if count < 2:
        return vectors
    sample = vectors[np.linspace(0, count - 1, min(_PROJECTED_SAMPLE, count)).astype(np.int64)]
    mean = sample.mean(axis=0)
    _, ascending = np.linalg.eigh(np.cov(sample - mean, rowvar=False))
    directions = ascending[:, ::-1].astype(np.float32)
    best, least = width, float(width)
    for number in (width // 32, width // 16, width // 8, width // 4):
        short = (sample - mean) @ directions[:, :number]
        lengths = np.einsum("np,np->n", short, short)
        near = lengths[:, None] + lengths - 2 * short @ short.T <= reach
        cost = number + width * _PAIR_COST * (near.mean() - 1 / len(sample))
        if number and cost < least:
            best, least = number, float(cost)
    return vectors if best == width else (vectors - mean) @ directions[:, :best]


def _cosines(vectors: Floats32, first: Integers, second: Integers) -> Floats32:
    """Cosines `[p]` of pairs of rows, `[p]` each."""
    parts = [
        np.einsum("pd,pd->p", vectors[first[low : low + _PAIRS]], vectors[second[low : low + _PAIRS]])
        for low in range(0, len(first), _PAIRS)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)
