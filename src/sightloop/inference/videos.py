"""Embeddings of videos: of the whole by CLIP4Clip and by BLIP, of frames and of scenes with their times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from sightloop.data.images.reader import BatchSizer
from sightloop.data.video.pixels import EMBEDDING, MATCHING, frame_side, preprocess_frame
from sightloop.data.video.reader import VideoInput, as_video, find_scenes, read_frames, video_info
from sightloop.data.video.sampling import Sampling, at_times, every, sample_times, uniform
from sightloop.errors import UsageError
from sightloop.inference.arguments import ImageInput
from sightloop.inference.arrays import as_numpy
from sightloop.inference.image_encoding import ImageEncoder, split_frames
from sightloop.protocols import Embedder, Matcher, require
from sightloop.tasks import embed
from sightloop.tasks.embed import require_finite
from sightloop.types import Floats, Floats32, Pixels, VideoScene

VideoPart: TypeAlias = Literal["frame", "scene"]


class VideoEmbeddings(NamedTuple):
    """Embeddings of parts of a video.

    Args:
        starts: in seconds, float64 `[n]`.
        ends: likewise.
        vectors: float32 `[n, P]`, unit length.
    """

    starts: Floats
    ends: Floats
    vectors: Floats32


def default_sampling(network: object) -> Sampling:
    """Frames of videos for verbs without a protocol: BLIP's for networks with an ITM head, else CLIP4Clip's."""
    return MATCHING if isinstance(network, Matcher) else EMBEDDING


def embed_videos(encoder: ImageEncoder, network: Embedder, batch: Sequence[Pixels]) -> Tensor:
    """CLIP4Clip's vectors of videos, and those of images among them: `[B, P]` or `[B, Q, P]`, unit length."""
    if all(pixels.frames == 1 for pixels in batch):
        return embed.embed_images(network, encoder.encode(batch))
    vectors = [embed.embed_images(network, encoder.encode(split_frames(pixels))) for pixels in batch]
    return torch.nn.functional.normalize(torch.stack([own.mean(dim=0) for own in vectors]), dim=-1)


def embed_all(encoder: ImageEncoder, sizer: BatchSizer, images: ImageInput) -> Iterator[Tensor]:
    """`embed_videos` of many, `[B, P]` a batch. Raises CheckpointError for NaN or infinity among the vectors."""
    network = require(encoder.network, Embedder)
    for batch in encoder.sampling(EMBEDDING).preprocessor.batches(images):
        vectors = sizer.run(lambda part: [*embed_videos(encoder, network, part)], batch)
        yield require_finite(torch.stack(vectors), "image embeddings", encoder.dtype)


def embed_parts(
    encoder: ImageEncoder, network: Embedder, video: VideoInput, by: VideoPart, seconds: float
) -> VideoEmbeddings:
    """Vectors of frames or scenes of a video, `[n, P]`, with times `[n]`.

    Args:
        encoder: of the model.
        network: of the model.
        video: a file, or a part of one.
        by: "frame", or "scene": the mean over its frames, as of CLIP4Clip.
        seconds: between two frames; each scene has one at least.
    """
    if by not in ("frame", "scene"):
        raise UsageError(f"by={by!r}: must be frame or scene")
    spec, video = encoder.preprocessor.spec, as_video(video)
    scenes = find_scenes(video) if by == "scene" else []
    sampling = at_times(_scene_times(scenes, seconds)) if scenes else every(seconds)
    starts: list[float] = []
    rows: list[Tensor] = []
    stream = read_frames(video, sampling, side=frame_side(spec))
    while frames := list(islice(stream, encoder.preprocessor.sizer.size)):
        starts += [frame.time for frame in frames]
        batch = [preprocess_frame(frame, spec) for frame in frames]
        rows += [*embed.embed_images(network, encoder.encode(batch))]
    end = video.end if video.end is not None else max(video_info(video).duration, starts[-1])
    if not scenes:
        return VideoEmbeddings(np.array(starts), np.array([*starts[1:], end]), as_numpy(torch.stack(rows)))
    kept: list[VideoScene] = []
    means: list[Tensor] = []
    for scene in scenes:
        own = [
            row for row, start in zip(rows, starts, strict=True) if scene.start - 1e-3 <= start < scene.end
        ]
        if own:
            kept.append(scene)
            means.append(torch.nn.functional.normalize(torch.stack(own).mean(dim=0), dim=-1))
    edges = np.array([(scene.start, scene.end) for scene in kept])
    return VideoEmbeddings(edges[:, 0], edges[:, 1], as_numpy(torch.stack(means)))


def _scene_times(scenes: Sequence[VideoScene], seconds: float) -> list[float]:
    """Times of frames in the middle of equal parts of each scene."""
    times: list[float] = []
    for scene in scenes:
        count = max(1, round((scene.end - scene.start) / seconds))
        times += sample_times(uniform(count), scene.start, scene.end)
    return times
