"""Self-filtering of dialogues: a model answers the questions, its discriminators choose the turns to train on again.

As LaMDA does it (Thoppilan et al. 2022, section 6.1), and CapFilt with captions: a model that was trained for dialogues
says of a person's answer and of written ones whether they are true of the image after the rounds before (ITM), and
whether they are sensible, grounded and safe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sightloop.capfilt.filtering import SCORE_DIGITS, CandidateText, drop_unusable
from sightloop.capfilt.options import CapFiltOptions
from sightloop.errors import UnsupportedError
from sightloop.ranking.dialogue_network import judges_dialogues
from sightloop.ranking.dialogue_text import conversation, true_answer
from sightloop.ranking.options import RankedText
from sightloop.ranking.policy import Policy
from sightloop.types import Dialogue, Pixels, Round, Sample

if TYPE_CHECKING:
    from sightloop.inference.model import Model


def check_judge(model: Model) -> None:
    """Raises `UnsupportedError` unless a model was trained to judge answers in a dialogue."""
    if not judges_dialogues(model.network):
        raise UnsupportedError(
            f"{model.name}: judges no answers in a dialogue, which a filter of dialogues must; `sightloop train "
            "dialogue` makes models that do"
        )


def answers_of(
    writer: Model | None, sample: Sample, image: Pixels | None, options: CapFiltOptions
) -> list[CandidateText]:
    """The answers to every question of a sample's dialogues: a person's, then those that a model writes.

    Args:
        writer: Answers; None where people's answers alone are judged.
        sample: With its dialogues.
        image: Preprocessed for the writer.
        options: Of the run.
    """
    texts: list[CandidateText] = []
    for turn, (dialogue, index) in enumerate(_turns(sample)):
        answer = true_answer(dialogue.rounds[index])
        if answer is not None:
            texts.append(CandidateText("web", answer, turn=turn))
        if writer is not None and image is not None:
            messages = conversation(writer.network, image, dialogue, index)
            drawn = writer.chat(messages, details=True, policy=Policy(safe=0.0), **options.answering())
            assert isinstance(drawn, RankedText)
            in_order = sorted(drawn.candidates, key=lambda one: one.draws)
            texts += [CandidateText("synthetic", one.text, turn=turn) for one in in_order]
    return texts


def drop_unusable_answers(texts: Sequence[CandidateText]) -> list[CandidateText]:
    """`drop_unusable` of each turn."""
    turns = sorted({text.turn or 0 for text in texts})
    return [one for turn in turns for one in drop_unusable([text for text in texts if text.turn == turn])]


def score_answers(judge: Model, sample: Sample, image: Pixels, texts: Sequence[CandidateText]) -> None:
    """Sets what the judge says of each answer, after the rounds before as people answered them.

    Args:
        judge: Trained for dialogues.
        sample: With its dialogues.
        image: Preprocessed for the judge.
        texts: Answers, of any turns.
    """
    turn = 0
    for dialogue in sample.dialogues:
        own = [[text for text in texts if text.turn == turn + i] for i in range(len(dialogue.rounds))]
        rounds = tuple(
            Round(one.question, true_answer(one), tuple(text.text for text in answers))
            for one, answers in zip(dialogue.rounds, own, strict=True)
        )
        judged = judge.judge_answers(image, replace(dialogue, rounds=rounds))
        for answers, scores in zip(own, judged, strict=True):
            for i, text in enumerate(answers):
                text.itm = round(1 / (1 + math.exp(-float(scores.match[i]))), SCORE_DIGITS)
                text.attributes = {
                    name: round(float(values[i]), SCORE_DIGITS) for name, values in scores.attributes.items()
                }
        turn += len(rounds)


def kept_dialogues(sample: Sample, texts: Sequence[CandidateText]) -> tuple[Dialogue, ...]:
    """The dialogues with the turns that are kept, a written answer where that was chosen."""
    chosen = {text.turn: text for text in texts if text.kept}
    rounds_of: dict[int, list[Round]] = {}
    numbers = [i for i, dialogue in enumerate(sample.dialogues) for _ in dialogue.rounds]
    for turn, (dialogue, index) in enumerate(_turns(sample)):
        if turn in chosen:
            one = _with_answer(dialogue.rounds[index], chosen[turn])
            rounds_of.setdefault(numbers[turn], []).append(one)
    return tuple(replace(sample.dialogues[i], rounds=tuple(rounds)) for i, rounds in rounds_of.items())


def question_of(sample: Sample, turn: int) -> str:
    """The question of a turn."""
    dialogue, index = list(_turns(sample))[turn]
    return dialogue.rounds[index].question


def _with_answer(one: Round, text: CandidateText) -> Round:
    """The round with an answer, which is one more candidate with the judge's labels unless it is there already."""
    if text.source == "web":
        return one
    if text.text in one.candidates:
        return replace(one, answer=text.text, truth=one.candidates.index(text.text), relevance=())
    attributes = {
        name: (*values, float(text.attributes[name] >= 0.5))
        for name, values in one.attributes.items()
        if name in text.attributes
    }
    candidates = (*one.candidates, text.text)
    return Round(one.question, text.text, candidates, len(one.candidates), attributes=attributes)


def _turns(sample: Sample) -> Iterator[tuple[Dialogue, int]]:
    """Every round of the dialogues: its dialogue, and its index in it."""
    for dialogue in sample.dialogues:
        for index in range(len(dialogue.rounds)):
            yield dialogue, index
