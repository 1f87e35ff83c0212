"""Gradients of a whole batch, however few images fit at once.

A contrastive loss couples all rows of a batch, so that adding up the gradients of its parts is not the gradient of the
whole. Here the towers first run without a graph, part by part; what they give becomes leaves; the losses are taken on
the leaves of the whole batch; then each part runs again with a graph and hands its leaves' gradient on
(Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup", section 3).
Exact up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sightloop.objectives.gather import gather_rows, row_offset


class GradCache:
    """Rows that networks make of one batch, and the way back through them. chunk: rows at once, 0 for all.

    With a chunk, each loss goes backward as soon as it is added; without, all go together in `finish`.
    """

    def __init__(self, chunk: int) -> None:
        self.micro_batch = chunk
        self._again: list[tuple[Tensor, Callable[..., Tensor], tuple[Tensor, ...], list[Tensor]]] = []
        self._gathered: list[tuple[Tensor, Tensor]] = []
        self._total: Tensor | None = None

    def micro_batches(self, rows: int) -> Iterator[slice]:
        """Slices of at most `chunk` rows: all of them at once without a chunk; none where there are no rows."""
        step = self.micro_batch or max(rows, 1)
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def encode(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """function(*inputs), whose row i depends on row i of the inputs alone."""
        count = inputs[0].shape[0]
        if not self.micro_batch or count == 0:
            return function(*inputs)
        made: list[Tensor] = []
        states: list[Tensor] = []
        with torch.no_grad():
            for part in self.micro_batches(count):
                states.append(_random_state(inputs[0].device))
                made.append(function(*(x[part] for x in inputs)))
        leaf = torch.cat(made).requires_grad_(torch.is_grad_enabled())
        self._again.append((leaf, function, inputs, states))
        return leaf

    def gather(self, rows: Tensor) -> tuple[Tensor, int]:
        """The rows of all processes in their order, and where ours start; gradients find their way back."""
        if not self.micro_batch:
            return gather_rows(rows), row_offset(rows.shape[0])[0]
        leaf = gather_rows(rows.detach()).requires_grad_(rows.requires_grad)
        self._gathered.append((leaf, rows))
        return leaf, row_offset(rows.shape[0])[0]

    def add(self, loss: Tensor) -> None:
        """Count a (weighted) loss in."""
        if self.micro_batch:
            if loss.requires_grad:
                loss.backward()
        else:
            self._total = loss if self._total is None else self._total + loss

    def finish(self) -> None:
        """Take the gradients back to the parameters."""
        if self._total is not None and self._total.requires_grad:
            self._total.backward()
        for leaf, rows in self._gathered:
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            if rows.requires_grad:  # the way back of gather_rows, once for all parts
                gather_rows(rows).backward(gradient)
        for leaf, function, inputs, states in self._again:
            if leaf.grad is None:
                continue
            for part, state in zip(self.micro_batches(leaf.shape[0]), states, strict=True):
                with _replayed(state, inputs[0].device):
                    again = function(*(x[part] for x in inputs))
                if again.requires_grad:
                    again.backward(leaf.grad[part])


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


class _replayed:
    """Dropout draws again what it drew; afterwards the generator goes on from where it was."""

    def __init__(self, state: Tensor, device: torch.device) -> None:
        self.state, self.device = state, device

    def __enter__(self) -> None:
        self.kept = _random_state(self.device)
        self._set(self.state)

    def __exit__(self, *_: object) -> None:
        self._set(self.kept)

    def _set(self, state: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)
