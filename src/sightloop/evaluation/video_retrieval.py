"""Retrieval between videos and captions, by the protocols of BLIP and of CLIP4Clip.

BLIP's (eval_retrieval_video.py, for a model with an ITM head): 8 frames, resized to the model's square; ITC is the mean
of the frames' projected class tokens; ITM reads the tokens of all frames in one sequence, and its logit is added to the
ITC cosine of the k best (128 there). CLIP4Clip's (parameter-free, for a model without one): 12 frames of one a second;
the mean of the frames' vectors of unit length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike, fspath
from typing import TYPE_CHECKING

from sightloop.data.video.reader import read_frames
from sightloop.data.video.sampling import blip, clip4clip
from sightloop.errors import ImageError
from sightloop.evaluation.predictions import Records, packed
from sightloop.evaluation.results import TaskScores
from sightloop.evaluation.retrieval import MatchBatch, RetrievalTask
from sightloop.evaluation.task import Events, TaskContext
from sightloop.protocols import Embedder, require
from sightloop.types import Done, Encoded, Failed, Floats32, Sample

if TYPE_CHECKING:
    from sightloop.inference.model import Model


class VideoRetrievalTask(RetrievalTask):
    """Every video against every caption, by the protocol of the model; otherwise as images."""

    def embed_images(self, work: TaskContext, samples: list[Sample]) -> Events:
        """Events of samples with the vectors of their videos."""
        for sample in samples:
            try:
                video = encode_video(work.model, work.dataset.image(sample.key))
            except ImageError as error:
                yield Failed(sample.key, error.reason)
                continue
            self.keep(sample.key, _in_one(video), 0)
            yield Done(sample.key, {"image": packed(video_vector(work.model, video))})

    def match_again(self, work: TaskContext, samples: list[Sample], match: MatchBatch) -> Events:
        """Events of videos that were not kept."""
        for sample in samples:
            try:
                yield Done(
                    sample.key,
                    match([sample], _in_one(encode_video(work.model, work.dataset.image(sample.key))))[0],
                )
            except ImageError as error:
                yield Failed(sample.key, error.reason)

    def score(self, samples: Sequence[Sample], records: Records) -> TaskScores:
        """Recall and median rank both ways; no examples, which are shown as images."""
        return replace(super().score(samples, records), cases=())


def encode_video(model: Model, video: bytes | PathLike[str] | str) -> Encoded:
    """The frames of a video by the model's protocol, tokens `[F, N, D]`.

    Raises:
        ImageError: the video cannot be read.
    """
    assert not isinstance(video, bytes)
    sampling = blip() if "match" in model.capabilities else clip4clip()
    frames = [frame.pixels for frame in read_frames(video, sampling, warn=lambda _: None)]
    pixels = [each for each in model.read(frames, isolate=False) if not isinstance(each, ImageError)]
    if not pixels:
        raise ImageError(fspath(video), "no frame of it can be decoded")
    return model.encode(pixels)


def video_vector(model: Model, video: Encoded) -> Floats32:
    """The vector of a video, float32 `[P]` or `[Q, P]`, unit length, of its frames `[F, N, D]`."""
    import torch

    from sightloop.tasks.embed import embed_images

    network = require(model.network, Embedder)
    with torch.inference_mode():
        vectors = embed_images(network, video)  # [F, P], or [F, Q, P] of a Q-Former
        if "match" in model.capabilities and vectors.ndim == 2:
            # The projection is linear: that of the mean class token is the mean of the projected ones.
            vectors = embed_images(network, Encoded(video.tokens[:, :1].mean(dim=0, keepdim=True)))
        mean = torch.nn.functional.normalize(vectors.float().mean(dim=0), dim=-1)
    return mean.cpu().numpy()


def _in_one(video: Encoded) -> Encoded:
    """Tokens `[F, N, D]` of frames as one sequence `[1, F * N, D]`."""
    return Encoded(video.tokens.flatten(0, 1)[None])
