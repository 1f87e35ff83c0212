"""Scores of candidate answers in a dialogue: their log-likelihood under a model that writes, or ITM of the whole.

likelihood   log P("yes" | image, "a dog on a beach. is it sunny? yes. any people?")
itm          logit that the image matches "a dog on a beach. is it sunny? yes. any people? no"

A model that was trained for dialogues reads the caption as it learned to: beside the image (`inference.dialogue`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from sightloop.errors import UnsupportedError
from sightloop.protocols import ChatNetwork, DecoderNetwork, PromptedNetwork, require
from sightloop.ranking.dialogue_network import AnswerScores, DialogueNetwork, judges_dialogues
from sightloop.ranking.dialogue_text import as_messages, context_text, readings
from sightloop.tasks.text_scores import text_log_likelihoods
from sightloop.types import Dialogue, Encoded, Floats32, ImageSource, Pixels

if TYPE_CHECKING:
    from sightloop.inference.model import Model

ScoreBy: TypeAlias = Literal["likelihood", "itm", "both"]

_NEVER_CUT = 1 << 20  # tokens


def score_method(model: Model, wanted: ScoreBy | None) -> ScoreBy:
    """How a model scores candidates: as wanted, or as it was trained, or by likelihood if it answers, else by ITM.

    A model that was trained to judge answers and to write them scores by both: among 100 candidates of rendered scenes
    its true answers were first in .834 of the rounds by ITM, .910 by likelihood, .914 by the sum.

    Raises:
        UnsupportedError: the model cannot.
    """
    needed: dict[ScoreBy, str] = {"likelihood": "answer", "itm": "match"}
    has_both = model.capabilities >= {*needed.values()}
    if has_both and (wanted == "both" or (wanted is None and judges_dialogues(model.network))):
        return "both"
    if wanted is None and judges_dialogues(model.network):
        return "itm"
    for method, capability in needed.items():
        if wanted in (None, method) and capability in model.capabilities:
            return method
    what = "answer and match" if wanted == "both" else needed[wanted] if wanted else "answer or match"
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
    if method == "both":
        two = (score_dialogues(model, images, dialogues, each, history) for each in ("itm", "likelihood"))
        return [[a + b for a, b in zip(*own, strict=True)] for own in zip(*two, strict=True)]
    if method == "itm" and judges_dialogues(model.network):
        judged = judge_dialogues(model, images, dialogues, history)
        return [[one.match for one in own] for own in judged]
    score = _itm_scores if method == "itm" else _likelihood_scores
    return score(model, images, dialogues, history)


def judge_dialogues(
    model: Model, images: Sequence[Pixels], dialogues: Sequence[Sequence[Dialogue]], history: int | None
) -> list[list[AnswerScores]]:
    """Scores and attributes of the candidates of every round, by a model that was trained for dialogues.

    Args:
        model: `judges_dialogues` is true of its network.
        images: B images.
        dialogues: those about each image.
        history: see `score_dialogues`.
    """
    return [
        [one for dialogue in own for one in model.judge_answers(pixels, dialogue, history)]
        for pixels, own in zip(images, dialogues, strict=True)
    ]


def _fitting(texts: Iterable[str], model: Model, limit: int, longest: str = "", tokens: int = 0) -> str:
    """The first of some texts, each shorter than the one before, that has room; the last one if none has.

    Args:
        texts: at least one.
        model: whose tokenizer counts.
        limit: most tokens; 0 for any number.
        longest: a text that follows.
        tokens: that come beside the text's own.
    """
    text = ""
    for text in texts:
        length = int(model.tokenizer.encode([f"{text} {longest}".strip()], max_length=_NEVER_CUT).lengths[0])
        if not limit or length + tokens <= limit:
            break
    return text


def _itm_scores(
    model: Model, images: Sequence[Pixels], dialogues: Sequence[Sequence[Dialogue]], history: int | None
) -> list[list[Floats32]]:
    """ITM log-odds of "caption history question answer"."""
    counts: list[list[int]] = []  # of candidates, by image and round
    texts: list[str] = []
    for own in dialogues:
        counts.append([])
        for dialogue in own:
            for index, one in enumerate(dialogue.rounds):
                counts[-1].append(len(one.candidates))
                if one.candidates:
                    contexts = _contexts(dialogue, index, history)
                    context = _fitting(
                        contexts, model, model.tokenizer.max_length, max(one.candidates, key=len)
                    )
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
                    memory, contexts = Encoded(encoded.tokens[None]), _contexts(dialogue, index, history)
                    if judges_dialogues(model.network):
                        memory, contexts = _with_caption(model, memory, dialogue, index, history)
                    context = _fitting(contexts, model, model.tokenizer.max_length)
                    scores[-1].append(_decoder_scores(model, memory, context, one.candidates))
                else:
                    prompts = _prompts(model, encoded.pixels, dialogue, index, history)
                    limit = require(model.network, PromptedNetwork).config.text.positions
                    longest, tokens = max(one.candidates, key=len), len(encoded.tokens)
                    prompt = _fitting(prompts, model, limit, longest, tokens)
                    prefix, _ = model.generator.build_prefix([[encoded]], [prompt])
                    scores[-1].append(_prompted_scores(model, prefix, one.candidates))
    return scores


@torch.inference_mode()
def _with_caption(
    model: Model, image: Encoded, dialogue: Dialogue, index: int, history: int | None
) -> tuple[Encoded, Iterator[str]]:
    """What a model that was trained for dialogues reads: the image `[1, N, D]` with its caption, and the rounds."""
    caption = model.tokenize([dialogue.caption]).rows(np.zeros(1, np.int64))
    memory = require(model.network, DialogueNetwork).read_caption(image, *caption)
    own = readings(dialogue, index, history, captioned=False)
    return memory, (context_text(dialogue, index, reading) for reading in own)


@torch.inference_mode()
def _decoder_scores(model: Model, memory: Encoded, context: str, candidates: Sequence[str]) -> Floats32:
    """BLIP: the encoder reads the dialogue beside the image `[1, N, D]`; its states are the decoder's memory."""
    network = require(model.network, DecoderNetwork)
    states = network.encode_text(memory, *model.tokenize([context]).rows(np.zeros(1, np.int64)))
    answers = model.tokenize(list(candidates), first_id=network.config.start_id)
    scores = text_log_likelihoods(network.decoder, states, answers.ids, answers.device_lengths)
    return scores.cpu().numpy()


@torch.inference_mode()
def caption_likelihoods(model: Model, images: Sequence[ImageSource], text: str) -> list[float]:
    """Log-likelihood of one caption for each image, under a model that writes captions beside it (BLIP).

    Raises:
        UnsupportedError: the model writes by a prompt.
    """
    if not isinstance(model.network, DecoderNetwork):
        raise UnsupportedError(
            f"{model.name}: likelihoods of captions need a decoder over the image, as BLIP's"
        )
    network = require(model.network, DecoderNetwork)
    caption = model.tokenize([text], first_id=network.config.start_id)
    pixels = [one for one in model.read(images) if isinstance(one, Pixels)]
    scores = [
        text_log_likelihoods(
            network.decoder, Encoded(encoded.tokens[None]), caption.ids, caption.device_lengths
        )
        for encoded in model.encoder.encode_each(pixels)
    ]
    return [float(score[0]) for score in scores]


@torch.inference_mode()
def _prompted_scores(model: Model, prefix: Encoded, candidates: Sequence[str]) -> Floats32:
    """Prompted networks: the answers continue the prompt `[1, N, D]`, or are what a decoder makes of it."""
    network = require(model.network, PromptedNetwork)
    start = network.config.start_ids
    ids, lengths = _answer_ids(model, candidates, (*start, *network.answer_start), network.config.end_id)
    return text_log_likelihoods(network.language, prefix, ids, lengths, after_prefix=not start).cpu().numpy()


def _contexts(dialogue: Dialogue, index: int, history: int | None) -> Iterator[str]:
    """The dialogue up to a question, from its whole to the question alone."""
    return (context_text(dialogue, index, reading) for reading in readings(dialogue, index, history))


def _prompts(
    model: Model, pixels: Pixels, dialogue: Dialogue, index: int, history: int | None
) -> Iterator[str]:
    """The dialogue up to a question in the network's chat template, or as a question, likewise."""
    if "chat" not in model.capabilities:
        return (model.generator.format_prompt("answer", text) for text in _contexts(dialogue, index, history))
    network = require(model.network, ChatNetwork)
    return (
        network.render_chat(as_messages(pixels, dialogue, index, reading))
        for reading in readings(dialogue, index, history)
    )


def _answer_ids(
    model: Model, candidates: Sequence[str], begin: tuple[int, ...], end_id: int
) -> tuple[Tensor, Tensor]:
    """Ids `[R, L]` and lengths `[R]` of answers between what every answer begins with and EOS, as in training."""
    tokenizer = model.tokenizer
    read = tokenizer.encode(list(candidates), max_length=_NEVER_CUT)
    rows: list[list[int]] = []
    for ids, length in zip(read.ids, read.lengths.tolist(), strict=True):
        words: list[int] = ids[:length].tolist()
        # OPT's tokenizer puts a first token, T5's a last one.
        words = words[words[:1] == [tokenizer.bos_id] :]
        words = words[: len(words) - (words[-1:] == [tokenizer.eos_id])]
        rows.append([*begin, *words, end_id])
    ids = torch.full((len(rows), max(2, *map(len, rows))), tokenizer.pad_id)
    for target, row in zip(ids, rows, strict=True):
        target[: len(row)] = torch.tensor(row)
    return ids.to(model.device), torch.tensor([len(row) for row in rows], device=model.device)
