"""Small videos for the tests: frames whose colors say which frame they are, and files that are odd or hostile."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from sightloop.data.video.writing import write_video

CORNERS = (
    (230, 30, 30),
    (30, 200, 30),
    (30, 30, 230),
    (230, 230, 230),
)  # top left, top right, bottom left, right


def corner_frames(count: int, height: int = 48, width: int = 64) -> list[NDArray[np.uint8]]:
    """Frames of four colored quarters, so that a turned or mirrored one is seen; they get darker with time."""
    frame = np.zeros((height, width, 3), np.uint8)
    y, x = height // 2, width // 2
    for color, rows, columns in zip(
        CORNERS,
        (slice(y), slice(y), slice(y, None), slice(y, None)),
        (slice(x), slice(x, None)) * 2,
        strict=True,
    ):
        frame[rows, columns] = color
    return [(frame * (1 - 0.5 * i / max(1, count))).astype(np.uint8) for i in range(count)]


def corners_of(pixels: NDArray[np.uint8]) -> list[list[int]]:
    """Colors in the middles of the four quarters, in the order of `CORNERS`."""
    height, width = pixels.shape[:2]
    points = [(y, x) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    return [pixels[y, x].astype(int).tolist() for y, x in points]


def noise_frames(random: np.random.Generator, count: int, height: int, width: int) -> list[NDArray[np.uint8]]:
    """Frames of random blocks of 8 x 8 pixels."""
    blocks = random.integers(0, 256, (count, -(-height // 8), -(-width // 8), 3), np.uint8)
    return list(blocks.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width])


def reference_frames(path: Path) -> tuple[list[float], list[NDArray[np.uint8]]]:
    """Times and pixels of all frames, decoded one after another with PyAV alone."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        start = (container.start_time or 0) / av.time_base
    return [float(frame.time) - start for frame in frames], [f.to_ndarray(format="rgb24") for f in frames]


def write_rotated(path: Path, frames: Sequence[NDArray[np.uint8]], clockwise: int) -> None:
    """A video whose metadata says that it is to be turned clockwise by so many degrees."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25, options={"crf": "10", "threads": "1"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.set_display_rotation(-clockwise)
        for pixels in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode(None))


def write_sound(path: Path) -> None:
    """A second of silence."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 44100, 0, Fraction(1, 44100)
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def write_header_bomb(path: Path) -> None:
    """A GIF of a few bytes whose header states a canvas of 8K."""
    write_video(path, corner_frames(5), codec="gif", pixel_format="rgb8", container="gif")
    content = bytearray(path.read_bytes())
    content[6:10] = (7680).to_bytes(2, "little") + (4320).to_bytes(2, "little")
    path.write_bytes(content)


def write_endless_gif(path: Path, frames: int) -> None:
    """A GIF of a canvas of 3000 x 3000 pixels and many frames of one pixel, which repeats forever."""
    head = b"GIF89a" + (3000).to_bytes(2, "little") * 2 + b"\xf0\0\0" + b"\0\0\0\xff\xff\xff"
    loop = b"\x21\xff\x0bNETSCAPE2.0\x03\x01\0\0\0"
    frame = b"\x21\xf9\x04\0\x0a\0\0\0" + b"\x2c\0\0\0\0\x01\0\x01\0\0" + b"\x02\x02\x44\x01\0"
    path.write_bytes(head + loop + frame * frames + b"\x3b")
