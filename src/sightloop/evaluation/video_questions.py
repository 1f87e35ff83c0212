"""Question answering about videos: exact match, as MSRVTT-QA and MSVD-QA are scored (Xu et al. 2017).

By BLIP's protocol (Li et al. 2022, section 5.6): 16 frames of a video, their tokens in one sequence, and the answer is
written by the model without training on videos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sightloop.data.video.pixels import ANSWERING
from sightloop.errors import ImageError
from sightloop.evaluation.dataset import PredictBatch
from sightloop.evaluation.predictions import Records
from sightloop.evaluation.results import TaskScores
from sightloop.evaluation.task import EvalOptions, Events, RunPhase, TaskContext
from sightloop.evaluation.vqa import VqaTask
from sightloop.types import Done, Failed, Sample, Video


class VideoQuestionsTask(VqaTask):
    """Answers to the questions about each video, generated or ranked; otherwise as about images."""

    def __init__(self, options: EvalOptions, samples: Sequence[Sample]) -> None:
        super().__init__(options, samples)
        self.method += f", of {ANSWERING.count} frames"
        self.settings |= {"frames": ANSWERING.count}

    def over(self, predict: PredictBatch) -> RunPhase:
        """A phase that applies `predict` to videos, one at a time."""

        def run(work: TaskContext, samples: list[Sample]) -> Events:
            reader = work.model.encoder.sampling(ANSWERING).preprocessor
            for sample in samples:
                try:
                    path = work.dataset.image(sample.key)
                    assert not isinstance(path, bytes)
                    frames = reader.read_distinct([Video(path)])
                except ImageError as error:
                    yield Failed(sample.key, error.reason)
                    continue
                yield Done(sample.key, predict(work.model, [sample], frames)[0])

        return run

    def score(self, samples: Sequence[Sample], records: Records) -> TaskScores:
        """As of images; no examples, which are shown as images."""
        return replace(super().score(samples, records), cases=())
