"""What blocks do only while they train."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from sightloop.errors import UsageError
from sightloop.nn.blocks import Block


def set_regularization(network: nn.Module, *, dropout: float = 0.0, drop_path: float = 0.0) -> None:
    """Set what the blocks of a network leave out while they train (0: nothing, as in a new network).

    dropout: the share of single values of each residual branch (Srivastava et al. 2014). drop_path: the share of rows
    for which the last block of a stack leaves a whole branch out, rising in equal steps from 0 at the first block
    (stochastic depth, Huang et al. 2016). Both draw from torch's generator of the device: seed it for each step.
    """
    for name, value in (("dropout", dropout), ("drop_path", drop_path)):
        if not 0 <= value < 1:
            raise UsageError(f"{name}={value}: must be in [0, 1)")
    for blocks in _stacks(network):
        for depth, block in enumerate(blocks):
            block.dropout = dropout
            block.drop_path = drop_path * depth / max(len(blocks) - 1, 1)


def set_activation_checkpointing(network: nn.Module, on: bool = True) -> None:
    """Whether blocks keep only their input for the backward pass and compute the rest again (Chen et al. 2016).

    A third more arithmetic for a fraction of the memory; the numbers, random ones too, are the same.
    """
    for blocks in _stacks(network):
        for block in blocks:
            block.recompute = on


def _stacks(network: nn.Module) -> Iterator[list[Any]]:
    """Blocks that follow one another: lists of them, and what a tower of other layers calls its `stack`."""
    for module in network.modules():
        if isinstance(module, nn.ModuleList):
            yield [block for block in module if isinstance(block, Block)]
        elif isinstance(stack := getattr(module, "stack", None), list):
            yield stack
