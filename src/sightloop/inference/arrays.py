"""Arrays that verbs return: class probabilities, and tensors and parts as NumPy arrays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

from sightloop.types import Floats32, LogitActivation


class Probabilities(np.ndarray[Any, np.dtype[np.float32]]):
    """Array of class probabilities that knows its activation: "softmax" (rows sum to 1) or "sigmoid" (each alone)."""

    activation: LogitActivation

    @classmethod
    def of(cls, values: Floats32, activation: LogitActivation) -> Probabilities:
        """A view of values `[n, C]` with its activation."""
        view = values.view(cls)
        view.activation = activation
        return view

    def __array_finalize__(self, source: object) -> None:
        """Slices and copies keep the activation."""
        self.activation = getattr(source, "activation", "softmax")


def stack(parts: Iterable[Floats32], width: int = 0) -> Floats32:
    """Arrays `[b, d]` one below the other; `[0, width]` if there are none."""
    rows = list(parts)
    return np.concatenate(rows) if rows else np.zeros((0, width), dtype=np.float32)


def as_numpy(values: Tensor) -> Floats32:
    """float32 array `[...]` on the CPU."""
    return values.float().cpu().numpy()
