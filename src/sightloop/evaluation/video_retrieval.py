"""Retrieval between videos and captions, by the protocols of BLIP and of CLIP4Clip.

BLIP's (eval_retrieval_video.py, for a model with an ITM head): 8 frames, resized to the model's square; ITC is the mean
of the frames' projected class tokens; ITM reads the tokens of all frames in one sequence, and its logit is added to the
ITC cosine of the k best (128 there). CLIP4Clip's (parameter-free, for a model without one): 12 frames of one a second;
the mean of the frames' vectors of unit length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sightloop.errors import ImageError
from sightloop.evaluation.predictions import Records, packed
from sightloop.evaluation.results import TaskScores
from sightloop.evaluation.retrieval import MatchBatch, RetrievalTask
from sightloop.evaluation.task import Events, TaskContext
from sightloop.protocols import Embedder, require
from sightloop.types import Done, Encoded, Failed, Sample, Video

if TYPE_CHECKING:
    from sightloop.inference.model import Model


class VideoRetrievalTask(RetrievalTask):
    """Every video against every caption, by the protocol of the model; otherwise as images."""

    def embed_images(self, work: TaskContext, samples: list[Sample]) -> Events:
        """Events of samples with the vectors of their videos."""
        from sightloop.tasks.embed import embed_images  # imports torch, which scoring does not need

        model = work.model
        for sample in samples:
            try:
                video = Video(_path(work, sample))
                if "match" in model.capabilities:
                    encoded = _encode(model, video)
                    self.keep(sample.key, encoded, 0)
                    vector = embed_images(require(model.network, Embedder), encoded)[0].cpu().numpy()
                else:
                    vector = model.embed_images(video)[0]
            except ImageError as error:
                yield Failed(sample.key, error.reason)
                continue
            yield Done(sample.key, {"image": packed(vector)})

    def match_again(self, work: TaskContext, samples: list[Sample], match: MatchBatch) -> Events:
        """Events of videos that were not kept."""
        for sample in samples:
            try:
                encoded = _encode(work.model, Video(_path(work, sample)))
                yield Done(sample.key, match([sample], encoded)[0])
            except ImageError as error:
                yield Failed(sample.key, error.reason)

    def score(self, samples: Sequence[Sample], records: Records) -> TaskScores:
        """Recall and median rank both ways; no examples, which are shown as images."""
        return replace(super().score(samples, records), cases=())


def _path(work: TaskContext, sample: Sample) -> Path:
    path = work.dataset.image(sample.key)
    assert not isinstance(path, bytes)
    return path


def _encode(model: Model, video: Video) -> Encoded:
    """Tokens `[1, F * N, D]` of a video's F frames. Raises ImageError if it cannot be read."""
    return model.encode(model.preprocessor.read_distinct([video]))
