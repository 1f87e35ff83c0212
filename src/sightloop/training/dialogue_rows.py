"""Rounds of dialogues as rows of a training batch: what was said, and answers of which one is true."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from sightloop.data.datasets.dataset import Dataset
from sightloop.data.text.tokenizer import Tokenizer
from sightloop.errors import ImageError
from sightloop.ranking.dialogue_text import context_text, readings
from sightloop.types import Dialogue, Sample

T = TypeVar("T")
_COUNTED = 500  # samples whose attributes are looked at


class DialogueRows(NamedTuple):
    """Rounds of the dialogues about I images of a batch, R of each, with K answers, the first of which is true.

    Args:
        image_rows: int64 `[I]`, batch rows of the images.
        caption_ids: int64 `[I, C]`, what is read beside each image.
        caption_lengths: int64 `[I]`, tokens without padding.
        context_ids: int64 `[I * R, L]`, all up to the question.
        context_lengths: int64 `[I * R]`.
        reply_ids: int64 `[I * R, A]`, the true answers alone.
        reply_lengths: int64 `[I * R]`.
        ids: int64 `[I * R * K, L]`, all up to an answer.
        lengths: int64 `[I * R * K]`.
        attributes: float32 `[I * R * K, N]`, of each answer 1 or 0, NaN where nothing is known.
    """

    image_rows: Tensor
    caption_ids: Tensor
    caption_lengths: Tensor
    context_ids: Tensor
    context_lengths: Tensor
    reply_ids: Tensor
    reply_lengths: Tensor
    ids: Tensor
    lengths: Tensor
    attributes: Tensor

    @property
    def answers(self) -> int:
        """K."""
        return len(self.ids) // max(1, len(self.context_ids))

    def to(self, device: torch.device) -> DialogueRows:
        """A copy on another device."""
        return DialogueRows(*(x.to(device, non_blocking=True) for x in self))


class RoundDraw(NamedTuple):
    """A round that was drawn.

    Attributes:
        dialogue: of the round.
        number: of the round in it, from 0.
        answers: the true one and wrong ones.
        attributes: `[K][N]`, of each answer 1 or 0, NaN where nothing is known.
        captioned: whether the caption is read.
    """

    dialogue: Dialogue
    number: int
    answers: list[str]
    attributes: list[list[float]]
    captioned: bool


def dialogue_attributes(dataset: Dataset) -> tuple[str, ...]:
    """Names of the attributes of answers in a dataset, of evenly spaced samples, in alphabetical order."""
    names: set[str] = set()
    for index in range(0, len(dataset), max(1, len(dataset) // _COUNTED)):
        try:
            dialogues = dataset[index].dialogues
        except ImageError:
            continue  # reported when a batch needs it
        names.update(name for own in dialogues for one in own.rounds for name in one.attributes)
    return tuple(sorted(names))


def draw_rounds(
    random: np.random.Generator,
    sample: Sample,
    rounds: int,
    wrong: int,
    *,
    captioned: float,
    names: Sequence[str],
) -> list[RoundDraw]:
    """Rounds of a sample's dialogues whose true answer is known, each with wrong answers drawn from its candidates.

    Args:
        random: of this sample and epoch.
        sample: with its dialogues.
        rounds: how many, repeated where there are fewer; [] where there is none.
        wrong: wrong answers a round.
        captioned: share of the samples whose captions are read.
        names: of the attributes.
    """
    usable = [
        (dialogue, index)
        for dialogue in sample.dialogues
        for index, one in enumerate(dialogue.rounds)
        if one.truth is not None and len({*one.candidates}) > 1
    ]
    is_captioned = bool(random.random() < captioned)
    drawn: list[RoundDraw] = []
    for dialogue, index in draw_each(random, usable, rounds):
        one = dialogue.rounds[index]
        assert one.truth is not None
        others = [i for i, text in enumerate(one.candidates) if text != one.candidates[one.truth]]
        chosen = [one.truth, *draw_each(random, others, wrong)]
        known = [one.attributes.get(name) for name in names]
        attributes = [[math.nan if values is None else values[i] for values in known] for i in chosen]
        answers = [one.candidates[i] for i in chosen]
        drawn.append(RoundDraw(dialogue, index, answers, attributes, is_captioned))
    return drawn


def draw_each(random: np.random.Generator, items: Sequence[T], count: int) -> list[T]:
    """`count` of the items in random order, each before any is repeated; [] if there are none."""
    if not items or not count:
        return []
    order = np.concatenate([random.permutation(len(items)) for _ in range(-(-count // len(items)))])
    return [items[i] for i in order[:count].tolist()]


def dialogue_rows(
    tokenizer: Tokenizer, drawn: Sequence[Sequence[RoundDraw]], max_tokens: int
) -> DialogueRows | None:
    """Tokens of the rounds of each image of a batch, None if there are none.

    The first rounds of a dialogue are left out where its tokens are more than `max_tokens`.
    """
    rounds = [one for own in drawn for one in own]
    if not rounds:
        return None
    image_rows = [row for row, own in enumerate(drawn) if own]
    first = [drawn[row][0] for row in image_rows]
    captions = [one.dialogue.caption if one.captioned else "" for one in first]
    max_tokens = min(max_tokens, tokenizer.max_length or max_tokens)
    contexts = _contexts(tokenizer, rounds, max_tokens)
    texts = [
        f"{context} {text}" for context, one in zip(contexts, rounds, strict=True) for text in one.answers
    ]
    columns: list[tuple[Tensor, Tensor]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # texts truncated to max_tokens
        for each in (captions, contexts, [one.answers[0] for one in rounds], texts):
            tokens = tokenizer.encode(each, max_length=max_tokens)
            columns.append((torch.from_numpy(tokens.ids), torch.from_numpy(tokens.lengths)))
    attributes = torch.tensor([row for one in rounds for row in one.attributes], dtype=torch.float32)
    caption, context, reply, answer = columns
    return DialogueRows(torch.tensor(image_rows), *caption, *context, *reply, *answer, attributes)


def _contexts(tokenizer: Tokenizer, rounds: Sequence[RoundDraw], max_tokens: int) -> list[str]:
    """For each round as much of its dialogue as leaves room for its longest answer."""
    choices = [
        [
            context_text(one.dialogue, one.number, reading)
            for reading in readings(one.dialogue, one.number, captioned=False)
        ]
        for one in rounds
    ]
    chosen = [0] * len(rounds)
    longest = [max(one.answers, key=len) for one in rounds]
    rest = list(range(len(rounds)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        while rest:
            texts = [f"{choices[i][chosen[i]]} {longest[i]}" for i in rest]
            lengths = tokenizer.encode(texts, max_length=1 << 20).lengths.tolist()
            rest = [
                i
                for i, length in zip(rest, lengths, strict=True)
                if length > max_tokens and chosen[i] + 1 < len(choices[i])
            ]
            for i in rest:
                chosen[i] += 1
    return [own[i] for own, i in zip(choices, chosen, strict=True)]
