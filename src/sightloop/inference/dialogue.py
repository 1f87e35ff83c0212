"""Answers in a dialogue, judged: whether one is true, and attributes such as whether it is sensible.

BLIP, section 5.5: an image and its caption are the memory, and ITM judges "history question? answer".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from sightloop.data.text.tokenizer import Tokenizer
from sightloop.errors import UnsupportedError
from sightloop.inference.judges import Judge
from sightloop.inference.matching import TokenizedTexts, text_batches
from sightloop.protocols import require
from sightloop.ranking.dialogue_network import AnswerScores, DialogueNetwork, judges_dialogues
from sightloop.ranking.dialogue_text import fitting_context
from sightloop.tasks.embed import require_finite
from sightloop.types import Dialogue, Encoded, Floats32, ImageSource

_NEVER_CUT = 1 << 20  # tokens


def judge_rounds(
    network: DialogueNetwork,
    tokenizer: Tokenizer,
    image: Encoded,
    dialogues: Sequence[Dialogue],
    history: int | None = None,
) -> list[list[AnswerScores]]:
    """Scores of the candidates of every round of B dialogues.

    Args:
        network: trained to judge answers.
        tokenizer: its own.
        image: B encoded images, tokens `[B, N, D]`, one for each dialogue.
        dialogues: B dialogues.
        history: how many of the rounds before are read with a question; None for as many as there is room for.

    Returns:
        For each dialogue the scores of its rounds; arrays of no numbers for a round without candidates.

    Raises:
        CheckpointError: NaN or infinity among them.
    """
    device = image.tokens.device
    texts: list[str] = []
    ends: list[list[int]] = []
    rows_of: list[np.ndarray[tuple[int, ...], np.dtype[np.int64]]] = []
    for dialogue in dialogues:
        start, own = len(texts), list[int]()
        for index, one in enumerate(dialogue.rounds):
            if one.candidates:
                longest = max(one.candidates, key=len)
                context = fitting_context(room_for(tokenizer), dialogue, index, longest, history)
                texts += [f"{context} {text}" for text in one.candidates]
            own.append(len(texts) - start)
        ends.append(own)
        rows_of.append(np.arange(start, len(texts)))
    names, width = network.config.attributes, 1 + len(network.config.attributes)
    if not texts:
        return [[_scores(np.zeros((0, width), np.float32), names) for _ in own] for own in ends]
    memory = caption_memory(network, tokenizer, image, [dialogue.caption for dialogue in dialogues])
    tokens = TokenizedTexts(tokenizer, texts, device)
    scored = [np.zeros((len(rows), width), np.float32) for rows in rows_of]
    for batch, part in text_batches(tokens, rows_of, memory.tokens.shape[1]):
        rows = np.concatenate([rows_of[b][part] for b in batch])
        mask = None if memory.mask is None else memory.mask[batch]
        with torch.inference_mode():
            logits, attributes = network.judge_answers(
                Encoded(memory.tokens[batch], mask=mask), *tokens.rows(rows)
            )
        both = torch.cat([(logits[:, 1] - logits[:, 0])[:, None].float(), attributes.float().sigmoid()], 1)
        values = require_finite(both, "scores of answers", memory.tokens.dtype).cpu().numpy()
        for i, b in enumerate(batch):
            scored[b][part] = values[i * len(part) : (i + 1) * len(part)]
    return [
        [_scores(own, names) for own in np.split(values, cuts[:-1])]
        for values, cuts in zip(scored, ends, strict=True)
    ]


def judge_dialogue(
    judge: Judge, tokenizer: Tokenizer, image: ImageSource, dialogue: Dialogue, history: int | None = None
) -> list[AnswerScores]:
    """`judge_rounds` of one dialogue about one image.

    Raises:
        UnsupportedError: the model was not trained for it.
        ImageError: the image cannot be read.
    """
    if not judges_dialogues(judge.network):
        raise UnsupportedError(
            f"{judge.name} judges no answers in a dialogue; `sightloop train dialogue` makes models that do"
        )
    encoded = judge.encode(judge.preprocessor.read_distinct([image]))
    return judge_rounds(require(judge.network, DialogueNetwork), tokenizer, encoded, [dialogue], history)[0]


def room_for(tokenizer: Tokenizer) -> Callable[[str], bool]:
    """Whether a text has room."""

    def fits(text: str) -> bool:
        most = tokenizer.max_length
        return not most or int(tokenizer.encode([text], max_length=_NEVER_CUT).lengths[0]) <= most

    return fits


def _scores(values: Floats32, names: Sequence[str]) -> AnswerScores:
    """Of `[C, 1 + A]`: the log-odds of being true, and the attributes."""
    return AnswerScores(values[:, 0], {name: values[:, i] for i, name in enumerate(names, 1)})


@torch.inference_mode()
def caption_memory(
    network: DialogueNetwork, tokenizer: Tokenizer, image: Encoded, captions: Sequence[str]
) -> Encoded:
    """What B dialogues are about: their images `[B, N, D]`, each followed by its caption, which may be ""."""
    tokens = TokenizedTexts(tokenizer, list(captions), image.tokens.device)
    ids: Tensor = tokens.ids
    return network.read_caption(image, ids, tokens.device_lengths)
