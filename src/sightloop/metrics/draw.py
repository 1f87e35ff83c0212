"""Distances between drawn and real images, of their embeddings: CMMD and KID."""

from __future__ import annotations

import numpy as np

from sightloop.types import Floats

_SIGMA, _SCALE = 10.0, 1000.0  # of CMMD


def cmmd(drawn: Floats, real: Floats) -> float:
    """CMMD (Jayasumana et al. 2024, arXiv 2401.09603): squared MMD, RBF kernel of width 10, biased, times 1000.

    Args:
        drawn: embeddings `[N, P]`, unit length.
        real: embeddings `[M, P]`, unit length.
    """

    def mean_kernel(x: Floats, y: Floats) -> float:
        squared = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T
        return float(np.exp(-squared / (2 * _SIGMA**2)).mean())

    return _SCALE * (mean_kernel(drawn, drawn) + mean_kernel(real, real) - 2 * mean_kernel(drawn, real))


def kid(drawn: Floats, real: Floats) -> float:
    """KID's estimator (Binkowski et al. 2018, arXiv 1801.01401): unbiased squared MMD, kernel (x.y / P + 1)^3.

    It is called KID only of Inception's features; of others it is an MMD on theirs.

    Args:
        drawn: features `[N, P]`, N at least 2.
        real: features `[M, P]`, M at least 2.
    """

    def kernel(x: Floats, y: Floats) -> Floats:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def off_diagonal_mean(x: Floats) -> float:
        values = kernel(x, x)
        return float((values.sum() - np.trace(values)) / (len(x) * (len(x) - 1)))

    return off_diagonal_mean(drawn) + off_diagonal_mean(real) - 2 * float(kernel(drawn, real).mean())
