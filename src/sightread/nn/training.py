"""What blocks do only while they train."""

from __future__ import annotations

from torch import nn

from sightread.errors import UsageError
from sightread.nn.blocks import Block


def regularise(network: nn.Module, *, dropout: float = 0.0, drop_path: float = 0.0) -> None:
    """Set what the blocks of a network leave out while they train (0: nothing, as in a new network).

    dropout: the share of single values of each residual branch (Srivastava et al. 2014). drop_path: the share of rows
    for which the last block of a stack leaves a whole branch out, rising in equal steps from 0 at the first block
    (stochastic depth, Huang et al. 2016). Both draw from torch's generator of the device: seed it for each step.
    """
    for name, value in (("dropout", dropout), ("drop_path", drop_path)):
        if not 0 <= value < 1:
            raise UsageError(f"{name}={value}: must be in [0, 1)")
    for stack in network.modules():
        if isinstance(stack, nn.ModuleList):
            blocks = [block for block in stack if isinstance(block, Block)]
            for depth, block in enumerate(blocks):
                block.dropout = dropout
                block.drop_path = drop_path * depth / max(len(blocks) - 1, 1)


def checkpoint_blocks(network: nn.Module, on: bool = True) -> None:
    """Whether blocks keep only their input for the backward pass and compute the rest again (Chen et al. 2016).

    A third more arithmetic for a fraction of the memory; the numbers, random ones too, are the same.
    """
    for module in network.modules():
        if isinstance(module, Block):
            module.recompute = on
