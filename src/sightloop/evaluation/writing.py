"""What tasks let a model write: captions, answers and turns of a dialogue, decoded as the options say.

Every task that judges written text comes through here, so that another way to choose a text (several samples, ranked)
reaches all of them at one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from sightloop.evaluation.ranked_answers import as_record
from sightloop.evaluation.task import EvalOptions
from sightloop.ranking.dialogue_text import conversation, true_answer
from sightloop.ranking.options import RankedText
from sightloop.types import Dialogue, JsonDict, JsonMapping, Pixels

if TYPE_CHECKING:
    from sightloop.inference.model import Model

T = TypeVar("T")


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
) -> list[JsonDict]:
    """Answers to the questions about each image, as the field `answers` of its record.

    Args:
        model: that answers.
        images: B images.
        questions: for each image its questions.
        options: how text is decoded.
        candidates: answers to choose among, by likelihood; None to write freely.
    """
    repeated, asked = _pairs(images, questions)
    answers = list(map(str, model.answer(repeated, asked, candidates, **options.decoding))) if asked else []
    return [{"answers": own} for own in _regrouped(answers, questions)]


def write_replies(
    model: Model, images: Sequence[Pixels], dialogues: Sequence[Sequence[Dialogue]], options: EvalOptions
) -> list[JsonDict]:
    """Answers to the rounds of the dialogues about each image, as the field `answers` of its record.

    The rounds before are as people answered them; of a round whose answer is not known it is "".
    """
    return [
        {"answers": [str(text or "") for text in _replies(model, image, own, options, options.decoding)]}
        for image, own in zip(images, dialogues, strict=True)
    ]


def draw_captions(model: Model, images: Sequence[Pixels], options: EvalOptions) -> list[JsonDict]:
    """Captions that are drawn of each image and judged, as the field `ranked` of its record."""
    texts = model.caption(images, options.prompt, **_drawing(options))
    return [{"ranked": _candidates(text)} for text in texts]


def draw_answers(
    model: Model, images: Sequence[Pixels], questions: Sequence[Sequence[str]], options: EvalOptions
) -> list[JsonDict]:
    """Answers that are drawn to each question and judged, as the field `ranked` of its image's record."""
    repeated, asked = _pairs(images, questions)
    texts = model.answer(repeated, asked, **_drawing(options)) if asked else []
    ranked = [_candidates(text) for text in texts]
    return [{"ranked": own} for own in _regrouped(ranked, questions)]


def draw_replies(
    model: Model, images: Sequence[Pixels], dialogues: Sequence[Sequence[Dialogue]], options: EvalOptions
) -> list[JsonDict]:
    """As `write_replies`, answers that are drawn and judged, as the field `ranked`; [] where it has ""."""
    records: list[JsonDict] = []
    for image, own in zip(images, dialogues, strict=True):
        texts = _replies(model, image, own, options, _drawing(options))
        records.append({"ranked": [[] if text is None else _candidates(text) for text in texts]})
    return records


def _replies(
    model: Model, image: Pixels, dialogues: Sequence[Dialogue], options: EvalOptions, decoding: JsonMapping
) -> list[str | None]:
    """Answers to all rounds, one dialogue after the other; None where the true one is not known."""
    texts: list[str | None] = []
    for dialogue in dialogues:
        for index, one in enumerate(dialogue.rounds):
            texts.append(None)
            if true_answer(one) is not None:
                messages = conversation(model.network, image, dialogue, index, options.history)
                texts[-1] = model.chat(messages, **decoding)
    return texts


def _pairs(images: Sequence[Pixels], questions: Sequence[Sequence[str]]) -> tuple[list[Pixels], list[str]]:
    """Images with 2 and 1 questions: images [a, a, b] and their questions."""
    repeated = [image for image, own in zip(images, questions, strict=True) for _ in own]
    return repeated, [question for own in questions for question in own]


def _regrouped(results: Sequence[T], questions: Sequence[Sequence[str]]) -> list[list[T]]:
    """Results of all questions, by image again."""
    ends = np.cumsum([len(own) for own in questions]).tolist()
    return [list(results[end - len(own) : end]) for own, end in zip(questions, ends, strict=True)]


def _candidates(text: str) -> list[JsonDict]:
    """What the predictions keep of a ranked text."""
    assert isinstance(text, RankedText)
    return as_record(text.as_json()["candidates"])


def _drawing(options: EvalOptions) -> JsonDict:
    """Options of a verb that draws as many texts as the options say, with all that is known of them."""
    decoding = {name: value for name, value in options.decoding.items() if name != "num_beams"}
    return {**decoding, **_ranking(options), "details": True}


def table_settings(options: EvalOptions) -> JsonDict:
    """What texts drawn beside those of greedy search depend on, for the settings of a task; {} without."""
    if options.rank_samples is None:
        return {}
    return {"drawn_beside": options.rank_samples, "rank_by": options.rank_by}


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
