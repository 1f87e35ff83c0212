"""Forward pass and loss of the objectives of visual dialogue (BLIP, section 5.5, and LaMDA's attributes).

What a dialogue is about, an image and its caption, is the memory of the text encoder, which reads the rounds so far,
the question and an answer. Its ITM head says whether the answer is true, its attribute head for example whether it is
sensible; the decoder learns to write the true answer from the states of everything up to the question.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sightloop.objectives import language, matching
from sightloop.objectives.attributes import attribute_chance, attribute_loss
from sightloop.protocols import DecoderNetwork, LanguageModelingNetwork
from sightloop.ranking.dialogue_network import DialogueNetwork
from sightloop.training.dialogue_rows import DialogueRows
from sightloop.training.loss_context import LossContext, global_count, select_rows
from sightloop.types import Encoded, Loss

_GROUPS = 3  # of rounds of like length, so that few tokens are padding


def dialogue(context: LossContext) -> None:
    """Answers judged: by ITM, whether one is true, and by the attribute head."""
    rows = context.batch.dialogue
    count = 0 if rows is None else len(rows.ids)
    total = global_count(count)
    weight = context.recipe.terms.get("attributes", 0.0)
    known = 0 if rows is None or not weight else int((~rows.attributes.isnan()).sum())
    known_total = global_count(known)
    if rows is None or total == 0:
        return
    network, answers = context.net(DialogueNetwork), rows.answers
    chance = attribute_chance(rows.attributes)
    for images in _groups(context, rows, rows.lengths):
        memory = _memory(context, rows, images)
        texts = _texts_of(images, len(rows.ids) // len(rows.image_rows))
        lengths = rows.lengths[texts]
        logits, attributes = network.judge_answers(memory, rows.ids[texts, : int(lengths.max())], lengths)
        labels = (torch.arange(len(texts), device=texts.device) % answers == 0).long()
        others: dict[str, Loss] = {}
        if known_total:
            others["attributes"] = attribute_loss(attributes, rows.attributes[texts], known_total, chance)
        context.add("dialogue", matching.itm_loss(logits, labels, total, matching=1 / answers), **others)


def attributes(_: LossContext) -> None:
    """Attributes of answers; learned in the pass of `dialogue`."""


def reply(context: LossContext) -> None:
    """True answers written by the decoder, from the states of all up to the question."""
    rows = context.batch.dialogue
    count = 0 if rows is None else int((rows.reply_lengths - 1).sum())
    total = global_count(count)
    if rows is None or total == 0:
        return
    encoder, writer = context.net(DecoderNetwork), context.net(LanguageModelingNetwork)
    smoothing = context.recipe.label_smoothing
    for images in _groups(context, rows, rows.context_lengths):
        memory = _memory(context, rows, images)
        texts = _texts_of(images, len(rows.context_ids) // len(rows.image_rows))
        lengths = rows.context_lengths[texts]
        states = encoder.encode_text(memory, rows.context_ids[texts, : int(lengths.max())], lengths)
        ids, ends = writer.frame_text(rows.reply_ids[texts], rows.reply_lengths[texts])
        kept = language.next_token_targets(ids, ends, 1)
        logits = writer.lm_logits(writer.decoder_states(states, ids).flatten(0, 1)[kept.positions])
        context.add("reply", language.lm_loss(logits, kept.targets, total, smoothing=smoothing))


def _groups(context: LossContext, rows: DialogueRows, lengths: Tensor) -> Iterator[Tensor]:
    """Some images at a time, int64 `[i]`, those with short texts first."""
    count = len(rows.image_rows)
    order = lengths.view(count, -1).amax(1).argsort(stable=True)
    for part in context.cache.micro_batches(count):
        own = order[part]
        yield from own.split(max(1, -(-len(own) // _GROUPS)))


def _memory(context: LossContext, rows: DialogueRows, images: Tensor) -> Encoded:
    """What the dialogues about some images `[i]` are about: tokens `[i, N + C, D]`."""
    tokens = select_rows(context.tokens, rows.image_rows[images])
    lengths = rows.caption_lengths[images]
    ids = rows.caption_ids[images, : int(lengths.max())]
    return context.net(DialogueNetwork).read_caption(Encoded(tokens), ids, lengths)


def _texts_of(images: Tensor, each: int) -> Tensor:
    """Rows of the texts of some images `[i]`, `each` of them an image: int64 `[i * each]`."""
    return (images[:, None] * each + torch.arange(each, device=images.device)).flatten()
