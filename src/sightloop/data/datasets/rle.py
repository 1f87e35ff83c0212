"""COCO's compressed run-length encoding (RLE) of masks, the format of pycocotools.

Lin et al., "Microsoft COCO" (2014). Counts are lengths of runs that alternate between 0 and 1. The first run is of
zeros (0 long where the mask begins with a one), and runs go down the columns:

    mask  0 1 1      columns 00 | 11 | 10      runs 00 111 0      counts [2, 3, 1]      text "231"
          0 1 0

In the text each count from the fourth on is the difference from the count two before it (neighboring columns of a shape
have similar runs), and each number is one or more characters of five bits (`_pack`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sightloop.types import JsonDict, JsonMapping, Limits


def encode_rle(mask: NDArray[np.bool_]) -> JsonDict:
    """bool `[H, W]` -> {"size": [H, W], "counts": text}."""
    # Column by column, with a zero at either end: a value differs from the next one where a run ends.
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    # mask 0 1 1 / 0 1 0: flat 0 001110 0, changes at 2 and 5.
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    # The end of the mask ends the last run too: ends [2, 5, 6], lengths [2, 3, 1].
    ends = changes if len(changes) and changes[-1] == mask.size else np.append(changes, mask.size)
    counts: list[int] = np.diff(ends, prepend=0).tolist()
    # counts [2, 3, 1, 4, 2] -> numbers 2, 3, 1, 4 - 3, 2 - 1
    text = "".join(_pack(count - counts[i - 2] if i > 2 else count) for i, count in enumerate(counts))
    return {"size": list(mask.shape), "counts": text}


def decode_rle(rle: JsonMapping) -> NDArray[np.bool_]:
    """{"size": [H, W], "counts": text or list of counts} -> bool `[H, W]`.

    Raises:
        ValueError, TypeError, KeyError: not an RLE, counts do not add up to H * W, or more pixels than `Limits` allow.
    """
    height, width = (int(side) for side in rle["size"])
    encoded = rle["counts"]
    counts = _unpack(encoded) if isinstance(encoded, str) else [int(count) for count in encoded]
    if min(counts, default=0) < 0 or sum(counts) != height * width or sum(counts) > Limits().max_pixels:
        raise ValueError(f"RLE counts do not add up to {height} x {width}, or the mask is too large")
    values = np.arange(len(counts)) % 2 == 1  # 0, 1, 0, ...
    return np.repeat(values, counts).reshape((height, width), order="F")  # [H, W]


def _pack(number: int) -> str:
    """A signed number as characters 48 + six bits: five bits of the number, low first, and bit 32 = "more follow".

    Bit 16 of the last group is the sign, so a group that would show a wrong sign is followed by another:

          3 = 00011               -> "3"
         20 = 10100 00000 (+)     -> 20 + 32, 0 -> "d0"     (10100 alone would be -12)
        100 = 00100 00011         ->  4 + 32, 3 -> "T3"
         -2 = 11110               -> "N"
    """
    text = ""
    while True:
        group = number & 31
        number >>= 5
        is_last = number == (-1 if group & 16 else 0)
        text += chr(48 + group + (0 if is_last else 32))
        if is_last:
            return text


def _unpack(text: str) -> list[int]:
    """Counts of a compressed text; the inverse of `_pack` and of the differences."""
    counts: list[int] = []
    number = shift = 0
    for char in text:
        group = ord(char) - 48
        if not 0 <= group < 64:
            raise ValueError("the counts are not compressed RLE: a character is out of range")
        number |= (group & 31) << shift
        shift += 5
        if not group & 32:  # the last group of this number
            if group & 16:  # negative: extend the sign
                number -= 1 << shift
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number = shift = 0
    if shift:
        raise ValueError("the counts are not compressed RLE: the last number is cut short")
    return counts
