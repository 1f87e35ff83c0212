"""Compilation of blocks with torch.compile."""

from __future__ import annotations

import os
import shutil
import sys

import torch
from torch import nn

from sightloop.errors import UsageError
from sightloop.nn.blocks import Block


def check_compiler(device: torch.device) -> None:
    """Raises UsageError if torch finds no compiler for the device."""
    names = {"cpu": [os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")]}
    compilers = names.get(device.type, [os.environ.get("CC", "gcc"), "clang"])
    why = "" if any(map(shutil.which, compilers)) else f"no {' or '.join(compilers)}"
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
    """Compiles each block at its first call, and again for a new kind of call (a mask, a memory, ...), in place."""
    # All blocks share one code object, of which torch compiles 8 variants by default.
    torch._dynamo.config.recompile_limit = 64  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    for module in network.modules():
        if isinstance(module, Block):
            module.compile()
