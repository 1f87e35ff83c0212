"""Scores of candidate answers in a dialogue: their log-likelihood under a model that writes, or ITM of the whole.

likelihood   log P("yes" | image, "a dog on a beach. is it sunny? yes. any people?")
itm          logit that the image matches "a dog on a beach. is it sunny? yes. any people? no"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from sightloop.errors import UnsupportedError
from sightloop.protocols import ChatNetwork, DecoderNetwork, PromptedNetwork, require
from sightloop.tasks.text_scores import text_log_likelihoods
from sightloop.types import Dialogue, Encoded, Floats32, Message, Pixels

if TYPE_CHECKING:
    from sightloop.inference.model import Model

ScoreBy: TypeAlias = Literal["likelihood", "itm"]

_NEVER_CUT = 1 << 20  # tokens


def score_method(model: Model, wanted: ScoreBy | None) -> ScoreBy:
    """How a model scores candidates: as wanted, or by likelihood if it answers, else by ITM.

    Raises:
        UnsupportedError: the model cannot.
    """
    needed: dict[ScoreBy, str] = {"likelihood": "answer", "itm": "match"}
    for method, capability in needed.items():
        if wanted in (None, method) and capability in model.capabilities:
            return method
    what = needed[wanted] if wanted else "answer or match"
    own = ", ".join(sorted(model.capabilities))
    other = " Without score_by (--score-by) the model decides how it scores." if wanted else ""
    raise UnsupportedError(f"{model.name} cannot {what} (it can: {own}).{other}")


def score_dialogues(
    model: Model,
    images: Sequence[Pixels],
    dialogues: Sequence[Sequence[Dialogue]],
    method: ScoreBy,
    history: int | None = None,
) -> list[list[Floats32]]:
    """Scores of the candidates of every round.

    Args:
        model: that scores.
        images: B images.
        dialogues: those about each image.
        method: see `score_method`.
        history: how many of the rounds before are read with a question; None for all. The caption comes first; 0: the
            question alone.

    Returns:
        For each image the rounds of its dialogues, one after the other: float32 `[C]` each, higher is better; `[0]`
        for a round without candidates.
    """
    score = _itm_scores if method == "itm" else _likelihood_scores
    return score(model, images, dialogues, history)


def context_texts(dialogue: Dialogue, index: int, history: int | None = None) -> list[str]:
    """What is said up to the question of a round: the caption, then each round, then the question, one text each.

    ["a dog on a beach.", "is it sunny? yes.", "any people?"]
    """
    question = _ended(dialogue.rounds[index].question, "?")
    if history == 0:
        return [question]
    first = 0 if history is None else max(0, index - history)
    said = [
        f"{_ended(one.question, '?')} {_ended(one.answer or '', '.')}".strip()
        for one in dialogue.rounds[first:index]
    ]
    caption = [_ended(dialogue.caption, ".")] if dialogue.caption.strip() else []
    return [*caption, *said, question]


def _ended(text: str, mark: str) -> str:
    text = text.strip()
    return text if not text or text[-1] in ".?!" else text + mark


def _fitting_context(
    dialogue: Dialogue, index: int, history: int | None, longest: str, fits: Callable[[str], bool]
) -> str:
    """`context_texts` as one text; the oldest rounds are left out until the longest answer has room behind it."""
    parts = context_texts(dialogue, index, history)
    has_caption = bool(dialogue.caption.strip()) and history != 0
    while len(parts) > 1 and not fits(f"{' '.join(parts)} {longest}"):
        del parts[int(has_caption and len(parts) > 2)]
    return " ".join(parts)


def _room(model: Model) -> Callable[[str], bool]:
    """Whether the text encoder of a model has room for a text."""
    tokenizer = model.tokenizer
    return lambda text: (
        int(tokenizer.encode([text], max_length=_NEVER_CUT).lengths[0]) <= tokenizer.max_length
    )


def _itm_scores(
    model: Model, images: Sequence[Pixels], dialogues: Sequence[Sequence[Dialogue]], history: int | None
) -> list[list[Floats32]]:
    """ITM log-odds of "caption history question answer"."""
    fits = _room(model)
    counts: list[list[int]] = []  # of candidates, by image and round
    texts: list[str] = []
    for own in dialogues:
        counts.append([])
        for dialogue in own:
            for index, one in enumerate(dialogue.rounds):
                counts[-1].append(len(one.candidates))
                if one.candidates:
                    longest = max(one.candidates, key=len)
                    context = _fitting_context(dialogue, index, history, longest, fits)
                    texts += [f"{context} {candidate}" for candidate in one.candidates]
    ends = np.cumsum([0, *(sum(own) for own in counts)])
    rows_of = [np.arange(ends[i], ends[i + 1]) for i in range(len(images))]
    if not texts:
        return [[np.zeros(0, np.float32) for _ in own] for own in counts]
    logits = model.match_scores(model.encode(images), model.tokenize(texts), rows_of)
    return [
        np.split(both[:, 1] - both[:, 0], np.cumsum(own)[:-1])
        for both, own in zip(logits, counts, strict=True)
    ]


def _likelihood_scores(
    model: Model, images: Sequence[Pixels], dialogues: Sequence[Sequence[Dialogue]], history: int | None
) -> list[list[Floats32]]:
    """Log-likelihoods of answers; each image is encoded once."""
    scores: list[list[Floats32]] = []
    for encoded, own in zip(model.encoder.encode_each(images), dialogues, strict=True):
        scores.append([])
        for dialogue in own:
            for index, one in enumerate(dialogue.rounds):
                if not one.candidates:
                    scores[-1].append(np.zeros(0, np.float32))
                elif isinstance(model.network, DecoderNetwork):
                    context = _fitting_context(dialogue, index, history, "", _room(model))
                    scores[-1].append(_decoder_scores(model, encoded.tokens, context, one.candidates))
                else:
                    prompt = _prompt(model, encoded.pixels, dialogue, index, history)
                    prefix, _ = model.generator.build_prefix([[encoded]], [prompt])
                    scores[-1].append(_prompted_scores(model, prefix, one.candidates))
    return scores


@torch.inference_mode()
def _decoder_scores(model: Model, image: Tensor, context: str, candidates: Sequence[str]) -> Floats32:
    """BLIP: the encoder reads the dialogue beside the image `[N, D]`; its states are the decoder's memory."""
    network = require(model.network, DecoderNetwork)
    states = network.encode_text(Encoded(image[None]), *model.tokenize([context]).rows(np.zeros(1, np.int64)))
    answers = model.tokenize(list(candidates), first_id=network.config.start_id)
    scores = text_log_likelihoods(network.decoder, states, answers.ids, answers.device_lengths)
    return scores.cpu().numpy()


@torch.inference_mode()
def _prompted_scores(model: Model, prefix: Encoded, candidates: Sequence[str]) -> Floats32:
    """Prompted networks: the answers continue the prompt `[1, N, D]`, or are what a decoder makes of it."""
    network = require(model.network, PromptedNetwork)
    start = network.config.start_ids
    ids, lengths = _answer_ids(model, candidates, (*start, *network.answer_start), network.config.end_id)
    return text_log_likelihoods(network.language, prefix, ids, lengths, after_prefix=not start).cpu().numpy()


def _prompt(model: Model, pixels: Pixels, dialogue: Dialogue, index: int, history: int | None) -> str:
    """The dialogue in the network's chat template, or as a question."""
    if isinstance(model.network, ChatNetwork):
        return model.network.render_chat(_as_messages(pixels, dialogue, index, history))
    return model.generator.format_prompt("answer", " ".join(context_texts(dialogue, index, history)))


def _as_messages(pixels: Pixels, dialogue: Dialogue, index: int, history: int | None) -> list[Message]:
    """The dialogue as a conversation; the caption stands before the first question."""
    first = index if history == 0 else 0 if history is None else max(0, index - history)
    messages: list[Message] = []
    for number in range(first, index + 1):
        one = dialogue.rounds[number]
        text = _ended(one.question, "?")
        if number == first and history != 0 and dialogue.caption.strip():
            text = f"{_ended(dialogue.caption, '.')} {text}"
        messages.append(Message("user", text, (pixels,) if number == first else ()))
        if number < index:
            messages.append(Message("assistant", one.answer or ""))
    return messages


def _answer_ids(
    model: Model, candidates: Sequence[str], begin: tuple[int, ...], end_id: int
) -> tuple[Tensor, Tensor]:
    """Ids `[R, L]` and lengths `[R]` of answers between what every answer begins with and EOS, as in training."""
    tokenizer = model.tokenizer
    has_bos, has_eos = tokenizer.bos_id is not None, tokenizer.eos_id is not None
    read = tokenizer.encode(list(candidates), max_length=_NEVER_CUT)
    rows = [
        [*begin, *ids[int(has_bos) : length - has_eos].tolist(), end_id]
        for ids, length in zip(read.ids, read.lengths.tolist(), strict=True)
    ]
    ids = torch.full((len(rows), max(2, *map(len, rows))), tokenizer.pad_id)
    for target, row in zip(ids, rows, strict=True):
        target[: len(row)] = torch.tensor(row)
    return ids.to(model.device), torch.tensor([len(row) for row in rows], device=model.device)
