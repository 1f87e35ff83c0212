"""Dropout, drop path and activation checkpointing of a network's blocks, set for training."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from sightloop.errors import UsageError
from sightloop.nn.blocks import Block, ResidualLayer


def set_regularization(network: nn.Module, *, dropout: float = 0.0, drop_path: float = 0.0) -> None:
    """Set dropout and drop path of every block; both act in training mode only.

    Random values come from torch's generator of the device: seed it before each step for reproducible runs.

    Args:
        network: changed in place.
        dropout: probability that a value of a residual branch is zeroed (Srivastava et al. 2014), in [0, 1).
        drop_path: probability that the last block of a stack drops a row's whole branch, in [0, 1); it rises linearly
            from 0 at the first block (stochastic depth, Huang et al. 2016, section 3).

    Raises:
        UsageError: a probability is out of range.
    """
    for name, value in (("dropout", dropout), ("drop_path", drop_path)):
        if not 0 <= value < 1:
            raise UsageError(f"{name}={value}: must be in [0, 1)")
    for blocks in _stacks(network):
        for depth, block in enumerate(blocks):
            block.dropout = dropout
            block.drop_path = drop_path * depth / max(len(blocks) - 1, 1)


def set_activation_checkpointing(network: nn.Module, on: bool = True) -> None:
    """Switch activation checkpointing (Chen et al. 2016): blocks save their input only and recompute the rest.

    Costs a third more arithmetic for a fraction of the memory; results are the same, random values included.
    """
    for blocks in _stacks(network):
        for block in blocks:
            block.activation_checkpointing = on


def _stacks(network: nn.Module) -> Iterator[list[ResidualLayer]]:
    """Lists of consecutive blocks: those of each ModuleList, and the `stack` of towers made of other layers (DaViT)."""
    for module in network.modules():
        if isinstance(module, nn.ModuleList):
            yield [block for block in module if isinstance(block, Block)]
        elif isinstance(stack := getattr(module, "stack", None), list):
            yield stack
