"""Masks as COCO's compressed run lengths: what pycocotools and every reader of COCO's json take.

Lin et al., "Microsoft COCO" (2014): runs of false and true in turn, down the columns, false first; each number from
the third on is written as the difference from the one two before, in groups of five bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sightloop.types import JsonDict, JsonMapping, Limits


def encode_rle(mask: NDArray[np.bool_]) -> JsonDict:
    """bool `[H, W]` -> {"size": [H, W], "counts": text}."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    ends = changes if len(changes) and changes[-1] == mask.size else np.append(changes, mask.size)
    counts: list[int] = np.diff(ends, prepend=0).tolist()
    text = "".join(_packed(n - counts[i - 2] if i > 2 else n) for i, n in enumerate(counts))
    return {"size": list(mask.shape), "counts": text}


def decode_rle(runs: JsonMapping) -> NDArray[np.bool_]:
    """{"size": [H, W], "counts": text, or the numbers themselves} -> bool `[H, W]`. Raises ValueError, TypeError or
    KeyError for what is none."""
    height, width = (int(n) for n in runs["size"])
    given = runs["counts"]
    counts = _unpacked(given) if isinstance(given, str) else [int(n) for n in given]
    if min(counts, default=0) < 0 or sum(counts) != height * width or sum(counts) > Limits().max_pixels:
        raise ValueError("a mask's runs do not fill its size, or it is too large")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape((height, width), order="F")


def _packed(number: int) -> str:
    """Groups of five bits, low first; bit 6 says that more follow, the last group's bit 5 is the sign."""
    text = ""
    while True:
        group = number & 31
        number >>= 5
        last = number == (-1 if group & 16 else 0)
        text += chr(48 + group + (0 if last else 32))
        if last:
            return text


def _unpacked(text: str) -> list[int]:
    counts: list[int] = []
    number = shift = 0
    for char in text:
        group = ord(char) - 48
        if not 0 <= group < 64:
            raise ValueError("a mask's runs are no compressed run lengths")
        number |= (group & 31) << shift
        shift += 5
        if not group & 32:
            if group & 16:
                number -= 1 << shift
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number = shift = 0
    if shift:
        raise ValueError("a mask's runs end too early")
    return counts
