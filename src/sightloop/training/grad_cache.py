"""Gradient cache: exact gradients of a large batch from small forward passes.

(Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup", section 3.)
A contrastive loss couples all rows of a batch, so that gradients of micro-batches do not add up to the batch's:

    1. each micro-batch of inputs -> towers, without a graph -> features, which become leaves of a new graph
    2. features of the whole batch -> losses -> gradients of the features
    3. each micro-batch again, with a graph and the same dropout -> gradients of the parameters

The result equals that of one large batch up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sightloop.objectives.gather import gather_rows, row_offset


class GradCache:
    """Features and gradients of one batch.

    Args:
        micro_batch: rows of one forward pass; 0 for all, without a cache. With micro-batches each loss goes backward
            when it is added; without, their sum does in `finish`.
    """

    def __init__(self, chunk: int) -> None:
        self.micro_batch = chunk
        # (features, function, its inputs, random state of each micro-batch)
        self._encoded: list[tuple[Tensor, Callable[..., Tensor], tuple[Tensor, ...], list[Tensor]]] = []
        self._gathered: list[tuple[Tensor, Tensor]] = []  # (rows of all processes, this process's)
        self._total: Tensor | None = None

    def micro_batches(self, rows: int) -> Iterator[slice]:
        """Slices of at most `micro_batch` rows that cover `rows`; none if there are no rows."""
        step = self.micro_batch or max(rows, 1)
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def encode(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """function(*inputs), a micro-batch at a time.

        Args:
            function: row i of its output depends on row i of the inputs alone.
            inputs: `[b, ...]` each.

        Returns:
            `[b, ...]`.
        """
        count = inputs[0].shape[0]
        if not self.micro_batch or count == 0:
            return function(*inputs)
        outputs: list[Tensor] = []
        states: list[Tensor] = []
        with torch.no_grad():
            for part in self.micro_batches(count):
                states.append(_random_state(inputs[0].device))
                outputs.append(function(*(x[part] for x in inputs)))
        leaf = torch.cat(outputs).requires_grad_(torch.is_grad_enabled())
        self._encoded.append((leaf, function, inputs, states))
        return leaf

    def gather(self, rows: Tensor) -> tuple[Tensor, int]:
        """Rows of all processes, with gradient: `[b, ...]` -> `[B, ...]` in rank order, index of the first own row."""
        if not self.micro_batch:
            return gather_rows(rows), row_offset(rows.shape[0])[0]
        leaf = gather_rows(rows.detach()).requires_grad_(rows.requires_grad)
        self._gathered.append((leaf, rows))
        return leaf, row_offset(rows.shape[0])[0]

    def add(self, loss: Tensor) -> None:
        """Adds a weighted loss, scalar `[]`."""
        if self.micro_batch:
            if loss.requires_grad:
                loss.backward()
        else:
            self._total = loss if self._total is None else self._total + loss

    def finish(self) -> None:
        """Propagates the gradients of the features to the parameters."""
        if self._total is not None and self._total.requires_grad:
            self._total.backward()
        for leaf, rows in self._gathered:
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            if rows.requires_grad:  # backward of gather_rows, once for all micro-batches
                gather_rows(rows).backward(gradient)
        for leaf, function, inputs, states in self._encoded:
            if leaf.grad is None:
                continue
            for part, state in zip(self.micro_batches(leaf.shape[0]), states, strict=True):
                with _RandomState(state, inputs[0].device):
                    output = function(*(x[part] for x in inputs))
                if output.requires_grad:
                    output.backward(leaf.grad[part])


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


class _RandomState:
    """Context manager that sets torch's random state, so that dropout repeats its draws, and restores it after."""

    def __init__(self, state: Tensor, device: torch.device) -> None:
        self.state, self.device = state, device

    def __enter__(self) -> None:
        self.previous = _random_state(self.device)
        self._set(self.state)

    def __exit__(self, *_: object) -> None:
        self._set(self.previous)

    def _set(self, state: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)
