"""Question answering: free text, or the likeliest of given answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sightloop.errors import UnsupportedError
from sightloop.inference.arguments import VisualSource
from sightloop.inference.image_encoding import ImageEncoder
from sightloop.inference.matching import TokenizedTexts, text_batches
from sightloop.inference.text_generation import (
    TextGenerator,
    WrittenText,
    sampling_key,
    sampling_keys,
    select_rows,
)
from sightloop.protocols import DecoderNetwork, require
from sightloop.tasks.decoding_options import Decoding
from sightloop.tasks.text_scores import rank_answers

ANSWER_DEFAULTS = {"num_beams": 1}  # answers are short: BLIP's own evaluation decodes them greedily


def answer_questions(
    encoder: ImageEncoder,
    generator: TextGenerator,
    images: Sequence[VisualSource],
    questions: Sequence[str],
    candidates: Sequence[str] | None,
    options: Decoding,
    *,
    top: int,
    scored: bool = False,
) -> list[list[WrittenText]]:
    """`num_return` answers for each of R pairs of an image and a question.

    Args:
        encoder: of the model.
        generator: of the model.
        images: R images; each distinct one is encoded once.
        questions: R questions.
        candidates: answers to choose among; None to write freely.
        options: how text is chosen.
        top: candidates that are scored whole.
        scored: whether log-probabilities are wanted; of candidates there are none.

    Raises:
        UnsupportedError: the network cannot choose among candidates.
    """
    if not generator.is_prompted:
        return _decoder_answers(
            encoder, generator, images, questions, candidates, options, top=top, scored=scored
        )
    if candidates is not None:
        raise UnsupportedError("this model cannot choose among candidates; leave them out")
    prompts = [generator.format_prompt("answer", text) for text in questions]
    answers: list[list[WrittenText]] = [[] for _ in questions]
    for rows, encoded in encoder.batches_by_image(images):
        keys = sampling_keys(encoded, [questions[i] for i in rows])
        own_images, own_prompts = [[image] for image in encoded], [prompts[i] for i in rows]
        texts = generator.answer_prompts(own_images, own_prompts, options, keys, scored=scored)
        for i, own in zip(rows, texts, strict=True):
            answers[i] = own
    return answers


def _decoder_answers(
    encoder: ImageEncoder,
    generator: TextGenerator,
    images: Sequence[VisualSource],
    questions: Sequence[str],
    candidates: Sequence[str] | None,
    options: Decoding,
    *,
    top: int,
    scored: bool,
) -> list[list[WrittenText]]:
    """BLIP: the question is encoded beside its image, and its states are the decoder's memory."""
    network, device = require(generator.network, DecoderNetwork), generator.device
    tokens = TokenizedTexts(generator.tokenizer, questions, device)
    choices = None
    if candidates is not None:
        start_id = network.config.start_id
        choices = TokenizedTexts(generator.tokenizer, candidates, device, first_id=start_id)
    answers: list[list[WrittenText]] = [[] for _ in questions]
    for batch, image, rows_of in encoder.distinct_batches(images):
        for owners, part in text_batches(tokens, rows_of, image.tokens.shape[1]):
            rows = np.concatenate([rows_of[b][part] for b in owners])
            memory = select_rows(image, torch.tensor(owners, device=device))
            with torch.inference_mode():
                states = network.encode_text(memory, *tokens.rows(rows))
            if candidates is not None and choices is not None:
                best = rank_answers(network.decoder, states, choices.ids, choices.device_lengths, top=top)
                texts = [[WrittenText(candidates[i])] for i in best]
            else:
                pixels = [batch[b] for b in owners for _ in part]
                asked: list[str] = [questions[int(row)] for row in rows]
                keys = [sampling_key(own, text) for own, text in zip(pixels, asked, strict=True)]
                texts = generator.continue_texts(states, None, keys, options, scored=scored)
            for row, own in zip(rows.tolist(), texts, strict=True):
                answers[row] = own
    return answers
