"""Blocks as kernels that torch compiles on this machine."""

from __future__ import annotations

import os
import shutil
import sys

import torch
from torch import nn

from sightloop.errors import UsageError
from sightloop.nn.blocks import Block


def check_compiler(device: torch.device) -> None:
    """Raises UsageError where torch finds nothing to compile with, rather than in the first step of a run."""
    names = {"cpu": [os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")]}
    wanted = names.get(device.type, [os.environ.get("CC", "gcc"), "clang"])
    why = "" if any(map(shutil.which, wanted)) else f"there is no {' or '.join(wanted)}"
    if not why:
        try:
            torch.compile(torch.sin)(torch.zeros(8, device=device))
        except RuntimeError as error:
            why = str(error).strip().split("\n")[0]
    if why:
        raise UsageError(
            f"compile=true: torch cannot compile on this machine ({why}); install a C++ compiler and Python's headers "
            "(g++, python3-dev), or set compile=false"
        )


def compile_blocks(network: nn.Module) -> None:
    """Each block is compiled when it first runs, and again for what it has not met yet (a mask, a memory, ...)."""
    # All blocks are one piece of code to torch, which by default gives up on the ninth variant of it.
    torch._dynamo.config.recompile_limit = 64  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    for module in network.modules():
        if isinstance(module, Block):
            module.compile()
