"""Videos as inputs of the verbs: frames by the published protocols, and what is made of their features.

match, rank   BLIP (Li et al. 2022, section 5.6; eval_retrieval_video.py): 8 frames, the tokens of all in one
              sequence for ITM; for ITC the mean of the projected class tokens, then unit length
answer        BLIP: 16 frames, their tokens in one sequence
caption       likewise, with 8 frames
embed,        CLIP4Clip (Luo et al. 2021, meanP): up to 12 frames at one a second, each of unit length, their mean,
classify      again of unit length
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from sightloop.data.images.preprocess import preprocess
from sightloop.data.video.reader import read_frames
from sightloop.data.video.sampling import Sampling, blip, clip4clip
from sightloop.errors import UsageError
from sightloop.types import ImageSpec, Pixels, Video, VideoFrame

MATCHING: Final = blip(8)
ANSWERING: Final = blip(16)
EMBEDDING: Final = clip4clip(12)


def read_video(video: Video, sampling: Sampling, spec: ImageSpec) -> Pixels:
    """Preprocessed frames of a video, as many as its `frames`, else as the sampling, has.

    Raises:
        ImageError: it cannot be read.
    """
    if video.frames is not None and video.frames < 1:
        raise UsageError(f"frames={video.frames}: must be at least 1")
    chosen = sampling if video.frames is None else replace(sampling, count=video.frames)
    frames = [preprocess_frame(frame, spec) for frame in read_frames(video, chosen, side=frame_side(spec))]
    return stack_frames(str(video.path), frames)


def stack_frames(name: str, frames: list[Pixels]) -> Pixels:
    """Frames `[3, H, W]` of one video as one input of a model, below one another."""
    values = np.concatenate([frame.values for frame in frames], axis=1)
    return Pixels(name, values, frames[0].size, len(frames))


def preprocess_frame(frame: VideoFrame, spec: ImageSpec) -> Pixels:
    """A frame uint8 `[H, W, 3]`, preprocessed as an image: uint8 `[3, H, W]`."""
    return replace(preprocess(frame.pixels, spec), name=f"{frame.time:.2f} s")


def frame_side(spec: ImageSpec) -> int | None:
    """Shorter side of frames that a model needs, in pixels: twice its input, from which `preprocess` resizes; or None.

    Frames of up to twice the input are left as they are, so that nothing is resized twice.
    """
    if spec.patches is not None or spec.tiles:
        return None
    sides = [spec.shortest_edge or 0, *(spec.resize or ()), *(spec.crop or ())]
    return 2 * max(sides) or None
