"""Memory of the devices that models run on, for the size of batches."""

from __future__ import annotations

import gc

import torch

from sightloop.data.batch_size import Memory, ProcessMemory


def memory_of(device: torch.device) -> Memory:
    """What batches on a device take: of this process for the CPU, of the GPU for CUDA; else nothing is measured."""
    return ProcessMemory() if device.type == "cpu" else DeviceMemory(device)


class DeviceMemory:
    """Memory of tensors on a GPU; of devices other than CUDA nothing is known.

    Args:
        device: The GPU.
    """

    default_size = 32
    largest_size = 512

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_known = device.type == "cuda"

    def free(self) -> int | None:
        """Bytes that the GPU has, and those that torch holds for later."""
        if not self._is_known:
            return None
        held = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return torch.cuda.mem_get_info(self._device)[0] + held

    def used(self) -> int | None:
        """Bytes of tensors."""
        return torch.cuda.memory_allocated(self._device) if self._is_known else None

    def peak(self) -> int | None:
        """The most that `used` was since `forget_peak`."""
        return torch.cuda.max_memory_allocated(self._device) if self._is_known else None

    def forget_peak(self) -> None:
        """Begin to measure `peak` anew."""
        if self._is_known:
            torch.cuda.reset_peak_memory_stats(self._device)

    def release(self) -> None:
        """Give back what torch holds for later."""
        gc.collect()
        if self._is_known:
            torch.cuda.empty_cache()
