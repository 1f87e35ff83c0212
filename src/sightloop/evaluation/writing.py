"""What tasks let a model write: captions and answers, decoded as the options say.

Every task that judges written text comes through here, so that another way to choose a text (several samples, ranked)
reaches all of them at one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sightloop.evaluation.task import EvalOptions
from sightloop.types import JsonDict, Pixels

if TYPE_CHECKING:
    from sightloop.inference.model import Model


def write_captions(model: Model, images: Sequence[Pixels], options: EvalOptions) -> list[JsonDict]:
    """One caption for each image, as the field `caption` of its record."""
    captions = model.caption(images, options.prompt, **options.decoding)
    return [{"caption": caption} for caption in captions]


def write_answers(
    model: Model,
    images: Sequence[Pixels],
    questions: Sequence[Sequence[str]],
    options: EvalOptions,
    candidates: Sequence[str] | None = None,
) -> list[JsonDict]:
    """Answers to the questions about each image, as the field `answers` of its record.

    Args:
        model: that answers.
        images: B images.
        questions: for each image its questions.
        options: how text is decoded.
        candidates: answers to choose among, by likelihood; None to write freely.
    """
    # Images with 2 and 1 questions: images [a, a, b], ends [2, 3].
    repeated = [image for image, own in zip(images, questions, strict=True) for _ in own]
    asked = [question for own in questions for question in own]
    answers = model.answer(repeated, asked, candidates=candidates, **options.decoding) if asked else []
    ends = np.cumsum([len(own) for own in questions]).tolist()
    return [{"answers": answers[end - len(own) : end]} for own, end in zip(questions, ends, strict=True)]
