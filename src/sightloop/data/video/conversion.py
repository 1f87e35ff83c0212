"""Decoded frames to RGB: upright, square pixels, transparency over white, reduced where a caller needs less."""

from __future__ import annotations

from typing import Final

import av
import numpy as np
from av.sidedata.sidedata import SideDataContainer, Type
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray

_UNSPECIFIED: Final = 2  # AVCOL_SPC_UNSPECIFIED
_HD_LINES: Final = 720  # from here on, players take untagged colors for BT.709, below for BT.601


def to_rgb(
    frame: av.VideoFrame, width: int, side: int | None, reformatter: VideoReformatter
) -> NDArray[np.uint8]:
    """uint8 `[H, W, 3]` of a frame, upright.

    Args:
        frame: as decoded.
        width: of the frame in square pixels.
        side: length of the shorter side that suffices: larger frames are reduced to it by area averaging; None for
            the frame's own size.
        reformatter: kept by the caller for many frames.
    """
    size = _reduced((frame.height, width), side)
    has_alpha = any(component.is_alpha for component in frame.format.components)
    hd = frame.colorspace == _UNSPECIFIED and frame.height >= _HD_LINES
    smaller = size[0] < frame.height
    converted = reformatter.reformat(
        frame,
        width=size[1],
        height=size[0],
        format="rgba" if has_alpha else "rgb24",
        src_colorspace=Colorspace.ITU709 if hd else None,
        interpolation=Interpolation.AREA if smaller else Interpolation.BICUBIC,
        threads=1,
    )
    pixels = np.asarray(converted.to_ndarray(), np.uint8)
    if has_alpha:
        alpha = pixels[:, :, 3:].astype(np.uint16)
        blended = pixels[:, :, :3] * alpha + np.uint16(255) * (255 - alpha)
        pixels = ((blended + 127) // 255).astype(np.uint8)
    return turn_upright(pixels, display_matrix(frame))


def _reduced(size: tuple[int, int], side: int | None) -> tuple[int, int]:
    height, width = size
    shorter = min(height, width)
    if side is None or shorter <= side:
        return height, width
    return max(1, round(height * side / shorter)), max(1, round(width * side / shorter))


def display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """Signs (a, b, c, d) of the frame's display matrix, which takes (x, y) to (a x + c y, b x + d y); y downwards.

    Turns by other than quarters are taken for none.
    """
    try:
        entries: SideDataContainer = frame.side_data  # pyright: ignore[reportAssignmentType]  # wrong in the stubs
        values = np.frombuffer(bytes(entries[Type.DISPLAYMATRIX]), np.int32)
    except KeyError:
        return 1, 0, 0, 1
    if len(values) == 9:
        a, b, c, d = (int(np.sign(values[i])) for i in (0, 1, 3, 4))
        if abs(a * d - b * c) == 1 and abs(a) + abs(b) == 1 and abs(c) + abs(d) == 1:
            return a, b, c, d
    return 1, 0, 0, 1


def rotation_of(frame: av.VideoFrame) -> int:
    """Clockwise degrees by which a frame is turned to be upright; mirrored ones count as what comes nearest."""
    a, b, _, _ = display_matrix(frame)
    return {(1, 0): 0, (0, 1): 90, (-1, 0): 180, (0, -1): 270}[a, b]


def turn_upright(pixels: NDArray[np.uint8], matrix: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """`[H, W, 3]` turned and mirrored by a display matrix: `[H, W, 3]` or `[W, H, 3]`, contiguous."""
    a, b, c, d = matrix
    if a == 0:  # x becomes y
        pixels = pixels.transpose(1, 0, 2)
        a, d = c, b
    if a < 0:
        pixels = pixels[:, ::-1]
    if d < 0:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
