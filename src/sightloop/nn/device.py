"""Choice of the device that a network runs on."""

from __future__ import annotations

import torch

from sightloop.errors import UsageError


def choose_device(name: str) -> torch.device:
    """The device of a name.

    Args:
        name: "auto" (CUDA if there is any, else MPS, else the CPU), or a name of torch's: "cpu", "cuda:1", "mps".

    Raises:
        UsageError: this machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f'device="{name}": not on this machine; use "auto", "cpu", "cuda" or "mps"'
        ) from error
    return device
