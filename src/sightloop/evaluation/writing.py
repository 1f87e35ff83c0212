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
    captions = model.caption(images, options.prompt, **options.decoding, **_ranking(options))
    return [{"caption": str(caption)} for caption in captions]


def write_answers(
    model: Model,
    images: Sequence[Pixels],
    questions: Sequence[Sequence[str]],
    options: EvalOptions,
    candidates: Sequence[str] | None = None,
    *,
    ranked: bool = False,
) -> list[JsonDict]:
    """Answers to the questions about each image, as the field `answers` of its record.

    Args:
        model: that answers.
        images: B images.
        questions: for each image its questions.
        options: how text is decoded.
        candidates: answers to choose among, by likelihood; None to write freely.
        ranked: draw `rank_samples` answers and keep the best, where the options say so.
    """
    # Images with 2 and 1 questions: images [a, a, b], ends [2, 3].
    repeated = [image for image, own in zip(images, questions, strict=True) for _ in own]
    asked = [question for own in questions for question in own]
    decoding = {**options.decoding, **(_ranking(options) if ranked and candidates is None else {})}
    answers = list(map(str, model.answer(repeated, asked, candidates, **decoding))) if asked else []
    ends = np.cumsum([len(own) for own in questions]).tolist()
    return [{"answers": answers[end - len(own) : end]} for own, end in zip(questions, ends, strict=True)]


def ranking_settings(options: EvalOptions) -> JsonDict:
    """What written text depends on beside its decoding, for the settings of a task; {} unless texts are ranked."""
    if options.rank_samples is None:
        return {}
    return {"rank_samples": options.rank_samples, "rank_by": options.rank_by}


def how_written(options: EvalOptions) -> str:
    """The end of a protocol: "" or how one of several texts was chosen."""
    if options.rank_samples is None:
        return ""
    judge = f", judged by {options.rank_by}" if options.rank_by else ""
    return f"; of {options.rank_samples} samples the one that ranks first{judge}"


def _ranking(options: EvalOptions) -> JsonDict:
    """Options of `Model.caption` and `Model.answer`."""
    return {} if options.rank_samples is None else {"samples": options.rank_samples, "judge": options.rank_by}
