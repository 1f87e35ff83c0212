"""Messages between the reader of videos and its child process; see `decode_worker`."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass
from typing import Final, Literal

from sightloop.data.video.sampling import Sampling
from sightloop.types import JsonDict, VideoLimits

MESSAGE: Final = struct.Struct(">BdIIQ")  # kind, time, H, W, bytes of the body
ALIVE, FRAME, RESULT, WARNING, FAILED, END = range(6)


@dataclass(frozen=True, slots=True)
class VideoRequest:
    """What is wanted of a video.

    Args:
        want: its properties, frames, or scenes.
        path: of the file.
        start: of the part, in seconds.
        end: likewise.
        sampling: which frames; of "scenes" the kind "keyframes" looks at keyframes only.
        side: shorter side of the frames in pixels, None for their own.
        limits: bounds.
    """

    want: Literal["info", "frames", "scenes"]
    path: str
    start: float | None
    end: float | None
    sampling: Sampling
    side: int | None
    limits: VideoLimits

    def line(self) -> bytes:
        """As a line of JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> VideoRequest:
        """Of a line of JSON."""
        fields: JsonDict = json.loads(line)
        times = tuple(fields["sampling"].pop("times"))
        fields["sampling"] = Sampling(**fields["sampling"], times=times)
        fields["limits"] = VideoLimits(**fields["limits"])
        return cls(**fields)
