"""What becomes of freed memory: kept for the next step or batch, but given back at once while a checkpoint is read."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

# glibc, malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SMALL, _LARGE = 1 << 20, 1 << 25  # the latter: how far glibc itself raises the limit
_KEPT = 1 << 30
_SMALL_KEPT = 1 << 26
_BETWEEN_BATCHES = 1 << 29  # bytes
_kept = False


def keep_freed_memory() -> bool:
    """Keep what is freed instead of giving it back to the system; whether this system's allocator can.

    glibc maps every tensor above 32 MB anew, and the system clears each page of it again: measured at CLIP ViT-B/32
    and batch 32, 220,000 page faults and a quarter of the processor time of each step on a CPU. The process grows for
    two or three steps and stays at its largest size until it ends. Call it before the first step; it holds for the
    whole process, for good.
    """
    return _keep(-1)


def keep_small_tensors() -> bool:
    """Keep up to 64 MB of what is freed of tensors below 32 MB, and give larger ones back; whether that is so.

    For networks whose maps are large: with `keep_between_batches` an autoencoder's, of 270 MB each, leave holes.
    Measured at Stable Diffusion 1.5's size, 512 px: 1.6 GB beside the weights at most, and 0.7 GB so.
    """
    mallopt = _mallopt()
    return not _kept and mallopt is not None and bool(mallopt(_M_TRIM_THRESHOLD, _SMALL_KEPT))


def keep_between_batches() -> bool:
    """Keep up to 512 MB of what one batch frees for the next; whether that is so.

    Measured while CLIP ViT-B/32 embeds 32 images on a CPU: 150,000 to 220,000 page faults a batch and an eighth of the
    processor time without it, a few faults with it, at the same largest size of the process (1.02 GB). It holds for the
    whole process. The environment variable SIGHTLOOP_KEEP_MEMORY=0 turns it off.
    """
    return _kept or (os.environ.get("SIGHTLOOP_KEEP_MEMORY", "1") != "0" and _keep(_BETWEEN_BATCHES))


def _keep(trim: int) -> bool:
    global _kept
    mallopt = _mallopt()
    _kept = (
        mallopt is not None
        and bool(mallopt(_M_MMAP_THRESHOLD, _KEPT))
        and bool(mallopt(_M_TRIM_THRESHOLD, trim))
    )
    return _kept


@contextmanager
def give_back_freed_memory() -> Generator[None]:
    """Inside the context every tensor above a megabyte has its own pages, returned to the system when it is freed.

    What is read of a checkpoint only to be put together or rounded then leaves no holes: measured at 1.7 GB in
    bfloat16, a process grows by 1.01 times the weights, and by 1.26 times without.
    """
    mallopt = _mallopt()
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _KEPT if _kept else _LARGE)


def _mallopt() -> Callable[[int, int], int] | None:
    return getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
