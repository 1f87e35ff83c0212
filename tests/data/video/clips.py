"""Small videos for the tests: frames whose colors say which frame they are, and files that are odd or hostile."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

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


def write_large_h264(path: Path, height: int, width: int, before: tuple[int, int] | None = None) -> None:
    """H.264 of one gray frame of so many pixels, a few kilobytes; before: size of frames that come first.

    As MP4 its header says the size; as a bare stream (.h264), which is in parts of any size, each part says its own.
    """
    parts: list[bytes] = []
    for rows, columns in [*([before] if before else []), (height, width)]:
        buffer = path if before is None else io.BytesIO()
        with av.open(
            str(path) if before is None else buffer, "w", format=None if before is None else "h264"
        ) as out:
            stream = out.add_stream(
                "libx264", rate=25, options={"preset": "ultrafast", "threads": "1", "crf": "51"}
            )
            stream.height, stream.width, stream.pix_fmt = rows, columns, "gray"
            frame = av.VideoFrame(columns, rows, "gray")
            frame.planes[0].update(bytes(frame.planes[0].buffer_size))
            out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
        if isinstance(buffer, io.BytesIO):
            parts.append(buffer.getvalue())
    if parts:
        path.write_bytes(b"".join(parts))


def write_webp(
    path: Path, frames: Sequence[NDArray[np.uint8]], milliseconds: Sequence[int], *, lossless: bool = True
) -> None:
    """An animated WebP of frames, `[H, W, 3]` or `[H, W, 4]`, with a duration each."""
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(
        path,
        "WEBP",
        save_all=True,
        append_images=images[1:],
        duration=list(milliseconds),
        lossless=lossless,
        method=0,
        exact=True,
    )


def write_endless_webp(path: Path, frames: int) -> None:
    """An animated WebP of a canvas of 4000 x 4000 pixels and many frames of one pixel."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "WEBP", lossless=True)
    pixel = buffer.getvalue()[12:]
    canvas = (3999).to_bytes(3, "little") * 2
    frame = bytes(12) + (40).to_bytes(3, "little") + b"\0" + pixel
    chunks = (
        _chunk(b"VP8X", b"\x02\0\0\0" + canvas) + _chunk(b"ANIM", bytes(6)) + _chunk(b"ANMF", frame) * frames
    )
    path.write_bytes(_chunk(b"RIFF", b"WEBP" + chunks))


def _chunk(kind: bytes, body: bytes) -> bytes:
    return kind + len(body).to_bytes(4, "little") + body + bytes(len(body) % 2)


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
