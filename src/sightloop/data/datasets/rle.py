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

from sightloop.types import Integers, JsonDict, JsonMapping, Limits, MaskRuns

_MAX_GROUPS = 7  # of five bits: more than the pixels of any image, and far from the end of int64 when summed


def encode_rle(mask: NDArray[np.bool_] | MaskRuns) -> JsonDict:
    """bool `[H, W]`, or its run lengths -> {"size": [H, W], "counts": text}."""
    counts: list[int] = mask.counts.tolist() if isinstance(mask, MaskRuns) else _run_lengths(mask)
    # counts [2, 3, 1, 4, 2] -> numbers 2, 3, 1, 4 - 3, 2 - 1
    text = "".join(_pack(count - counts[i - 2] if i > 2 else count) for i, count in enumerate(counts))
    return {"size": list(mask.shape), "counts": text}


def decode_rle(rle: JsonMapping) -> MaskRuns:
    """Run lengths of {"size": [H, W], "counts": text or list of counts}; the bitmap is not made.

    Time and memory grow with the text, not with the pixels.

    Raises:
        ValueError: not an RLE, counts do not add up to H * W, or more pixels than `Limits` allow.
    """
    size, encoded = rle.get("size"), rle.get("counts")
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(map(_is_count, size))):
        raise ValueError("the size of an RLE is not two whole numbers within the limits of an image")
    height, width = size
    if isinstance(encoded, str):
        counts = _unpack(encoded)
    elif isinstance(encoded, list | tuple) and all(map(_is_count, encoded)):
        counts = np.array(encoded, np.int64)
    else:
        raise ValueError(
            "the counts of an RLE are neither text nor whole numbers within the limits of an image"
        )
    too_large = height * width > Limits().max_pixels
    if too_large or (counts.size and int(counts.min()) < 0) or int(counts.sum()) != height * width:
        raise ValueError(f"RLE counts do not add up to {height} x {width}, or the mask is too large")
    return MaskRuns((height, width), counts)


def mask_area(mask: NDArray[np.bool_] | MaskRuns) -> int:
    """Number of pixels in a mask `[H, W]`."""
    return int(mask.counts[1::2].sum() if isinstance(mask, MaskRuns) else mask.sum())


def mask_box(mask: MaskRuns) -> tuple[float, float, float, float]:
    """The smallest box around a mask: left, top, right, bottom. Raises ValueError for an empty mask."""
    height = mask.shape[0]
    ends = np.cumsum(mask.counts)[1::2]  # [runs of ones]
    lengths = mask.counts[1::2]
    starts, ends = (ends - lengths)[lengths > 0], ends[lengths > 0]
    if not len(ends):
        raise ValueError("the mask of a region is empty")
    left, right = int(starts[0]) // height, (int(ends[-1]) - 1) // height + 1
    if np.any(starts // height != (ends - 1) // height):  # a run that continues in the next column
        return left, 0, right, height
    return left, int((starts % height).min()), right, int(((ends - 1) % height).max()) + 1


def _run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    # Column by column, with a zero at either end: a value differs from the next one where a run ends.
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    # mask 0 1 1 / 0 1 0: flat 0 001110 0, changes at 2 and 5.
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    # The end of the mask ends the last run too: ends [2, 5, 6], lengths [2, 3, 1].
    ends = changes if len(changes) and changes[-1] == mask.size else np.append(changes, mask.size)
    return np.diff(ends, prepend=0).tolist()


def _is_count(value: object) -> bool:
    if isinstance(value, float):
        return 0 <= value <= Limits().max_pixels and value.is_integer()
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= Limits().max_pixels


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


def _unpack(text: str) -> Integers:
    """Counts `[R]` of a compressed text; the inverse of `_pack` and of the differences."""
    groups = np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int64) - 48
    if groups.size and (int(groups.min()) < 0 or int(groups.max()) >= 64):
        raise ValueError("the counts are not compressed RLE: a character is out of range")
    last = np.flatnonzero(groups & 32 == 0)  # the last group of each number
    if groups.size and (not last.size or last[-1] != groups.size - 1):
        raise ValueError("the counts are not compressed RLE: the last number is cut short")
    starts = np.concatenate([np.zeros(1, np.int64), last[:-1] + 1])[: last.size]
    lengths = last - starts + 1
    if lengths.size and int(lengths.max()) > _MAX_GROUPS:
        raise ValueError("the counts are not compressed RLE: a number is larger than any image")
    shifts = 5 * (np.arange(groups.size) - np.repeat(starts, lengths))
    numbers = np.add.reduceat((groups & 31) << shifts, starts) if last.size else np.zeros(0, np.int64)
    numbers -= ((groups[last] & 16) != 0) * (np.int64(1) << (5 * lengths))  # negative: extend the sign
    # Counts 1, 3, 5, ... are running sums of every second number, and so are 2, 4, 6, ...
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers
