"""Writer of short videos with PyAV: H.264 in MP4 and what else a file name asks for; for rendered clips and tests."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sightloop.errors import UnsupportedError, UsageError, install_command

if TYPE_CHECKING:
    from av.container import OutputContainer


def write_video(
    path: str | os.PathLike[str],
    frames: Iterable[NDArray[np.uint8]],
    *,
    rate: int = 25,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    options: Mapping[str, str] | None = None,
    times: Iterable[float] | None = None,
    container: str | None = None,
) -> None:
    """Write frames, uint8 `[H, W, 3]` each, of one size; equal frames and options give equal bytes.

    Args:
        path: the file; its ending says the container.
        frames: one at least.
        rate: frames a second.
        codec: of libav.
        pixel_format: of the video; "yuv420p" needs even sizes.
        options: of the codec.
        times: when each frame begins, in seconds, for a variable rate; ascending.
        container: format, where the file's ending does not say it.

    Raises:
        UsageError: there is no frame.
    """
    try:
        import av
    except ModuleNotFoundError:
        raise UnsupportedError(f"videos need one more package, PyAV: {install_command('video')}") from None

    muxing = {"fflags": "+bitexact"}
    if container == "mp4" or os.fspath(path).endswith((".mp4", ".mov", ".m4v")):
        muxing["movflags"] = "+faststart"
    with av.open(os.fspath(path), "w", format=container, options=muxing) as output:
        _encode(output, frames, rate, (codec, pixel_format, dict(options or {})), times)


def _encode(
    output: OutputContainer,
    frames: Iterable[NDArray[np.uint8]],
    rate: int,
    codec: tuple[str, str, dict[str, str]],
    times: Iterable[float] | None,
) -> None:
    import av
    from av.video.stream import VideoStream

    name, pixel_format, options = codec
    if name == "libx264":  # whose rate control by macroblock trees is not the same in each run
        options = {"x264-params": "mbtree=0", **options}
    clock = None if times is None else iter(times)
    stream = None
    for number, pixels in enumerate(frames):
        if stream is None:
            added = output.add_stream(name, rate=rate, options={"threads": "1", **options})
            if not isinstance(added, VideoStream):
                raise UsageError(f"codec={name!r}: is none of videos")
            stream = added
            stream.height, stream.width = pixels.shape[:2]
            stream.pix_fmt = pixel_format
            if clock is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        if clock is not None:
            frame.time_base, frame.pts = Fraction(1, 1000), round(next(clock) * 1000)
        else:
            frame.time_base, frame.pts = Fraction(1, rate), number
        output.mux(stream.encode(frame))
    if stream is None:
        raise UsageError("frames: at least one is needed")
    output.mux(stream.encode(None))
