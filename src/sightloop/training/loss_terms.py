"""Forward pass and loss of each training objective for one batch.

Here networks and objectives meet: networks return features and logits, `objectives` turn them into losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from sightloop.nn.attention import Linear
from sightloop.objectives import contrastive, language, masked, matching
from sightloop.objectives.flow import add_noise, flow_loss
from sightloop.objectives.gather import gather_rows, row_offset
from sightloop.objectives.positives import NO_CAPTION, Positives
from sightloop.protocols import (
    BiasNetwork,
    DecoderNetwork,
    DrawNetwork,
    Embedder,
    FlowNetwork,
    ImageNetwork,
    LabelClassifier,
    LanguageModelingNetwork,
    Matcher,
    PromptedNetwork,
    ScaleNetwork,
    TemperatureNetwork,
    require,
)
from sightloop.towers.text import LanguageModel
from sightloop.training.dataloader import TextRows
from sightloop.training.dialogue_terms import attributes, dialogue, reply
from sightloop.training.flow_draws import drop_texts, flow_draws
from sightloop.training.heads import WordHead
from sightloop.training.loss_context import (
    LossContext,
    PairIds,
    embed_pixels,
    gather_pairs,
    global_count,
    select_rows,
)
from sightloop.training.masking import mask_patches, mask_words
from sightloop.types import Encoded


def itc(context: LossContext) -> None:
    """Image-text contrast (BLIP, section 3.2), with a momentum teacher, soft targets and a queue if there are any.

    Without a teacher the candidates are the network's own embeddings, detached: with a gradient on both sides small
    networks stay at chance for longer.
    """
    teacher, queue = context.teacher, context.queue
    image, text, positives = context.image_embeddings, context.text_embeddings, context.positives
    rows = context.batch.captions or context.first_captions
    with torch.no_grad():
        features = {"image": image.detach(), "text": text.detach()}
        if teacher is not None:
            pixels = select_rows(context.pixels, context.first_captions.image_rows)
            embedded = _in_parts(context, partial(embed_pixels, teacher), pixels)
            features["image"] = context.repeat_per_caption(embedded)
            features["text"] = _in_parts(
                context, require(teacher, Embedder).embed_text, rows.ids, rows.lengths
            )
        features = {name: gather_rows(x) for name, x in features.items()}
        count, offset = len(positives.ids), row_offset(len(image))[0]
        images, texts = features["image"], features["text"]
        if queue:  # the candidates are the global batch, then the queue
            ids = gather_pairs(context.pairs)
            context.new_features = features | {"ids": ids.samples, "texts": ids.texts}
            images, texts = (torch.cat([features[name], queue[name]]) for name in ("image", "text"))
            positives = _with_queue(ids, queue)
        candidates = contrastive.Candidates(images, texts, count, offset, positives)
    if count:
        temperature = context.net(TemperatureNetwork).temperature
        context.add("itc", contrastive.itc_loss(image, text, candidates, temperature, alpha=context.alpha))


def _with_queue(pairs: PairIds, queue: Mapping[str, Tensor]) -> Positives:
    """Matching pairs among those of the batch and those of the queue, of which one text each is known."""
    captions = nn.functional.pad(queue["texts"][:, None], (0, pairs.captions.shape[1] - 1), value=NO_CAPTION)
    rows = ((pairs.samples, queue["ids"]), (pairs.texts, queue["texts"]), (pairs.captions, captions))
    return Positives.from_texts(*(torch.cat(both) for both in rows))


def _in_parts(context: LossContext, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function over micro-batches of the inputs' rows, without cache: `[r, ...]` -> `[r, P]`."""
    count = inputs[0].shape[0]
    if count == 0:
        return context.pixels.new_zeros(0, context.net(Embedder).embed_dim)
    return torch.cat([function(*(x[part] for x in inputs)) for part in context.cache.micro_batches(count)])


def itm(context: LossContext) -> None:
    """Image-text matching: each pair, the image with a wrong text, and the text with a wrong image.

    Wrong ones are drawn by ITC similarity, or uniformly (`hard_negatives` of the recipe).
    """
    rows, network, recipe = context.first_captions, context.net(Matcher), context.recipe
    with torch.no_grad():
        features = (context.image_embeddings.detach(), context.text_embeddings.detach(), *context.pairs)
        image, text, *pairs = (x[:: context.captions_per_image] for x in features)
        images, texts = gather_rows(image), gather_rows(text)
        positives = Positives.from_texts(*gather_pairs(PairIds(*pairs)))
        offset = row_offset(len(image))[0]
        ids, own = positives.ids, torch.arange(offset, offset + len(image), device=image.device)
        if _all_match(positives):
            return  # no pair has a negative
        keys = {"offset": offset, "seed": recipe.seed, "step": context.batch.step}
        scale = context.net(TemperatureNetwork).temperature.detach()
        draw = partial(matching.hard_negatives, ids=ids, share=recipe.hard_negatives, **keys)
        shared = positives.texts is not None
        wrong_text = draw(
            contrastive.similarities(image, texts) / scale,
            stream=0,
            positive=positives.of_images(own) if shared else None,
        )
        wrong_image = draw(
            contrastive.similarities(text, images) / scale,
            stream=1,
            positive=positives.of_texts(own) if shared else None,
        )
    tokens = select_rows(context.tokens, rows.image_rows)
    all_tokens, _ = context.cache.gather(tokens)
    width = max(int(gather_rows(torch.tensor([[rows.ids.shape[1]]])).max()), rows.ids.shape[1])
    padded = nn.functional.pad(rows.input_ids, (0, width - rows.ids.shape[1]), value=network.pad_id)
    all_texts, all_lengths = gather_rows(padded), gather_rows(rows.lengths)
    count = 3 * len(ids)
    if not len(rows.ids):  # the backward pass of the gathered tokens is collective
        context.cache.add(all_tokens.sum() * 0)
    for part in context.cache.micro_batches(len(rows.ids)):
        # A row without a negative keeps its row with an ignored pair.
        lacks = (wrong_text[part] < 0) | (wrong_image[part] < 0)
        other_text, other_image = wrong_text[part].clamp(min=0), wrong_image[part].clamp(min=0)
        # 1. The image with its own text and with the wrong one, next to each other: [2r, L].
        both = torch.stack([padded[part], all_texts[other_text]], 1).flatten(0, 1)
        both_lengths = torch.stack([rows.lengths[part], all_lengths[other_text]], 1).flatten()
        both = both[:, : int(both_lengths.max())]
        own_tokens = select_rows(context.tokens, rows.image_rows[part])
        text_logits = network.match_logits(Encoded(own_tokens), both, both_lengths)
        # 2. The text with the wrong image: [r, L].
        image_logits = network.match_logits(
            Encoded(all_tokens[other_image]), rows.input_ids[part], rows.lengths[part]
        )
        wrong = torch.where(lacks, matching.IGNORED, 0)
        labels = torch.cat([torch.stack([torch.ones_like(wrong), wrong], 1).flatten(), wrong])
        logits = torch.cat([text_logits, image_logits])
        context.add("itm", matching.itm_loss(logits, labels, count, match_weight=recipe.match_weight))


def _all_match(positives: Positives) -> bool:
    """Whether each image of the global batch matches each text, or there are none."""
    ids = positives.ids
    if not len(ids) or bool((ids == ids[0]).all()):
        return True
    rows = torch.arange(len(ids), device=ids.device)
    return positives.texts is not None and all(bool(positives.of_images(r).all()) for r in rows.split(512))


def lm(context: LossContext) -> None:
    """Language modeling: the decoder predicts the captions' tokens from the image."""
    rows = context.batch.lm_captions
    if rows is not None:
        rows = _frame(context.net(LanguageModelingNetwork), rows)
    count = 0 if rows is None else int((rows.lengths - rows.prompt_length).clamp(min=0).sum())
    all_count = global_count(count)
    if rows is None or all_count == 0:
        return
    each = len(rows.ids) // len(rows.image_rows)
    for part in context.cache.micro_batches(len(rows.image_rows)):
        texts = slice(part.start * each, part.stop * each)
        memory = Encoded(select_rows(context.tokens, rows.image_rows[part]))
        _add_lm(context, "lm", memory, rows, texts, all_count)


def vqa(context: LossContext) -> None:
    """Question answering: the decoder predicts the answer from the states of the question, encoded with its image."""
    questions, answers = context.batch.questions, context.batch.answers
    count = 0 if answers is None else int((answers.lengths - 1).sum())
    all_count = global_count(count)
    if questions is None or answers is None or all_count == 0:
        return
    encoder = context.net(DecoderNetwork)
    answers = _frame(context.net(LanguageModelingNetwork), answers)
    each = len(questions.ids) // len(questions.image_rows)
    for part in context.cache.micro_batches(len(questions.image_rows)):
        texts = slice(part.start * each, part.stop * each)
        tokens = select_rows(context.tokens, questions.image_rows[part])
        states = encoder.encode_text(Encoded(tokens), questions.ids[texts], questions.lengths[texts])
        _add_lm(context, "vqa", states, answers, texts, all_count)


def _frame(network: LanguageModelingNetwork, rows: TextRows) -> TextRows:
    """Texts with the first and last token that the decoder expects; a prompt was counted without its last token."""
    ids, lengths = network.frame_text(rows.ids, rows.lengths)
    read, _ = network.frame_text(rows.input_ids, rows.lengths)
    longer = ids.shape[1] > rows.ids.shape[1]
    return TextRows(
        ids, lengths, rows.image_rows, rows.prompt_length + (longer and rows.prompt_length > 1), read
    )


def _add_lm(
    context: LossContext, name: str, memory: Encoded, rows: TextRows, texts: slice, count: int
) -> None:
    """Adds the loss of some of the texts: logits `[T, V]` and targets `[T]` of all T tokens to predict."""
    network, lengths = context.net(LanguageModelingNetwork), rows.lengths[texts]
    ids, read = (x[texts, : int(lengths.max())] for x in (rows.ids, rows.input_ids))
    kept = language.next_token_targets(ids, lengths, rows.prompt_length)
    states = network.decoder_states(memory, read).flatten(0, 1)  # [r * L, D]
    logits = network.lm_logits(states[kept.positions])
    context.add(name, language.lm_loss(logits, kept.targets, count, smoothing=context.recipe.label_smoothing))


def prompted(context: LossContext) -> None:
    """Answers of prompted networks: continued from the prompt (LM, or prefix-LM), or decoded from its encoding.

    Prefix-LM: PaliGemma, section 3; encoder-decoder: Florence-2.
    """
    rows, network = context.batch.prompted, context.net(PromptedNetwork)
    count = 0 if rows is None else int((rows.lengths - rows.prompt_lengths).sum())
    all_count = global_count(count)
    if rows is None or all_count == 0:
        return
    forward = _decode_answers if network.config.start_ids else _continue_prompts
    for part in context.cache.micro_batches(len(rows.ids)):
        # Inside the loop: each micro-batch has its own backward pass.
        tokens = select_rows(context.tokens, rows.image_rows[part])
        logits, targets = forward(
            network, tokens, rows.ids[part], rows.lengths[part], rows.prompt_lengths[part]
        )
        smoothing = context.recipe.label_smoothing
        context.add("prompted", language.lm_loss(logits, targets, all_count, smoothing=smoothing))


def _continue_prompts(
    network: PromptedNetwork, tokens: Tensor, ids: Tensor, lengths: Tensor, prompts: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits `[T, V]` and targets `[T]` of the tokens after the prompts.

    Args:
        network: whose language model reads prompt and answer.
        tokens: image tokens `[R, N, D]`.
        ids: prompts and answers `[R, L]`, one id for the image.
        lengths: `[R]`.
        prompts: lengths of the prompts `[R]`.
    """
    model, more = require(network.language, LanguageModel), tokens.shape[1] - 1
    ids, valid_mask = _expand_image(network, ids, lengths, more)
    prefix_mask = None
    if model.config.bidirectional_prefix:
        prefix_mask = torch.arange(ids.shape[1], device=ids.device) < (prompts + more)[:, None]
    vectors = network.build_prefix(tokens.flatten(0, 1), ids, valid_mask).tokens
    states = model.text.forward_embeddings(
        vectors, valid_mask=valid_mask, prefix_mask=prefix_mask, causal=True
    )
    kept = language.next_token_targets(ids, lengths + more, prompts + more)
    return model.logits(states.flatten(0, 1)[kept.positions]), kept.targets


def _decode_answers(
    network: PromptedNetwork, tokens: Tensor, ids: Tensor, lengths: Tensor, prompts: Tensor
) -> tuple[Tensor, Tensor]:
    """As `_continue_prompts`, for an encoder that reads the prompt and a decoder that starts from its own ids."""
    model = require(network.language, LanguageModel)
    start = ids.new_tensor(network.config.start_ids)
    prompt_ids, valid_mask = _expand_image(network, ids, prompts, tokens.shape[1] - 1)
    memory = network.build_prefix(tokens.flatten(0, 1), prompt_ids, valid_mask)
    steps = torch.arange(int((lengths - prompts).max()), device=ids.device)
    answers = ids.gather(1, (prompts[:, None] + steps).clamp(max=ids.shape[1] - 1))
    texts = torch.cat([start.expand(len(ids), -1), answers], dim=1)
    kept = language.next_token_targets(texts, len(start) + lengths - prompts, len(start))
    states = model.text.forward_embeddings(
        model.text.embed_tokens(texts),
        causal=True,
        memory=model.text.memory(memory.tokens),
        memory_mask=valid_mask[:, None, None],
    )
    return model.logits(states.flatten(0, 1)[kept.positions]), kept.targets


def _expand_image(network: PromptedNetwork, ids: Tensor, lengths: Tensor, more: int) -> tuple[Tensor, Tensor]:
    """The first `lengths` ids of each row `[R, L]`, the image's one id repeated for its tokens.

    With more = 2, and i for the image: `[[i, 5, 6, 0]]`, lengths `[3]` -> ids `[[i, i, i, 5, 6]]`.

    Returns:
        ids `[R, L']` and valid_mask `[R, L']`, L' = L + more.
    """
    positions = torch.arange(int(lengths.max()), device=ids.device)
    ids = ids[:, : len(positions)].masked_fill(positions >= lengths[:, None], 0)
    is_image = ids == network.config.image_id
    ids = ids.flatten().repeat_interleave(1 + more * is_image.flatten()).view(len(ids), -1)
    return ids, torch.arange(ids.shape[1], device=ids.device) < (lengths + more)[:, None]


def clip(context: LossContext) -> None:
    """CLIP's softmax over all pairs of the global batch (Radford et al. 2021, figure 3)."""
    if global_count(len(context.first_captions.ids)) == 0:
        return
    scale = context.net(ScaleNetwork).logit_scale.exp()
    loss = contrastive.clip_loss(
        context.image_embeddings, context.text_embeddings, scale, ids=context.positives
    )
    context.add("clip", loss)


def siglip(context: LossContext) -> None:
    """SigLIP's sigmoid for every pair of the global batch (Zhai et al. 2023, algorithm 1)."""
    if global_count(len(context.first_captions.ids)) == 0:
        return
    scale, bias = context.net(ScaleNetwork).logit_scale.exp(), context.net(BiasNetwork).logit_bias
    embeddings = (context.image_embeddings, context.text_embeddings)
    context.add("siglip", contrastive.siglip_loss(*embeddings, scale, bias, ids=context.positives))


def mlm(context: LossContext) -> None:
    """Masked language modeling conditioned on the image (Devlin et al. 2019; Li et al. 2021, ALBEF)."""
    rows, network, recipe = context.first_captions, context.net(DecoderNetwork), context.recipe
    head = require(context.heads["mlm"], WordHead)
    words = mask_words(
        rows.ids.cpu().numpy(),
        rows.lengths.cpu().numpy(),
        mask_id=head.mask_id,
        vocab=network.config.text.vocab,
        share=recipe.masked_words,
        seed=recipe.seed,
        step=context.batch.step,
        rows=context.batch.row_indices[rows.image_rows].cpu().numpy(),
    )
    device = context.pixels.device
    ids, masked_positions = (
        torch.from_numpy(words.ids).to(device),
        torch.from_numpy(words.masked).to(device),
    )
    count = global_count(int(masked_positions.sum()))
    if count == 0:
        return
    for part in context.cache.micro_batches(len(rows.ids)):
        tokens = select_rows(context.tokens, rows.image_rows[part])
        states = network.encode_text(Encoded(tokens), ids[part], rows.lengths[part]).tokens  # [r, L, D]
        logits = head(states[masked_positions[part]])
        targets = rows.ids[part][masked_positions[part]]
        context.add("mlm", language.mlm_loss(logits, targets, count))


def mim(context: LossContext) -> None:
    """Masked image modeling (Xie et al. 2022, SimMIM): hidden patches are predicted from the others.

    Hidden patches are filled with the mean color, which works with any stem.
    """
    network, recipe, pixels = context.net(ImageNetwork), context.recipe, context.pixels
    patch, side = network.config.vision.patch, network.config.vision.image_size
    grid = side // patch
    hidden = torch.from_numpy(
        mask_patches(
            (grid, grid),
            share=recipe.masked_patches,
            seed=recipe.seed,
            step=context.batch.step,
            rows=context.batch.row_indices.cpu().numpy(),
        )
    ).to(pixels.device)  # [b, grid, grid]
    count = global_count(int(hidden.sum()))
    if count == 0:
        return
    head = require(context.heads["mim"], Linear)
    targets = nn.functional.unfold(pixels, patch, stride=patch).transpose(1, 2)  # [b, N, 3 * patch^2]
    visible = pixels * ~hidden.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
    for part in context.cache.micro_batches(len(pixels)):
        predicted = head(network.encode_image(visible[part]).tokens[:, 1:])
        context.add("mim", masked.mim_loss(predicted, targets[part], hidden[part].flatten(1), count))


def classes(context: LossContext) -> None:
    """Classification: cross-entropy of the label head on the pooled image state."""
    known = (context.batch.labels >= 0).nonzero()[:, 0]
    count = global_count(len(known))
    if count == 0:
        return
    network, encoder = context.net(LabelClassifier), context.net(ImageNetwork)
    labels, pixels = context.batch.labels[known], select_rows(context.pixels, known)
    for part in context.cache.micro_batches(len(known)):
        logits = network.label_logits(encoder.encode_image(pixels[part]))
        smoothing = context.recipe.label_smoothing
        context.add("classes", language.lm_loss(logits, labels[part], count, smoothing=smoothing))


def flow(context: LossContext) -> None:
    """Rectified flow of images, given their first caption; a share of them without it (`text_dropout`)."""
    rows, network, recipe = context.first_captions, context.net(DrawNetwork), context.recipe
    count = global_count(len(rows.ids))
    if count == 0:
        return
    clean = network.encode_pixels(select_rows(context.pixels, rows.image_rows))
    draws = flow_draws(
        tuple(clean.shape[1:]),
        recipe.seed,
        context.batch.step,
        context.batch.row_indices[rows.image_rows].tolist(),
    )
    noise, normals, shares = (draw.to(clean.device) for draw in draws)
    size = context.pixels.shape[2], context.pixels.shape[3]
    noisy = add_noise(clean, noise, normals, context.net(FlowNetwork).time_shift(size))
    ids, lengths = drop_texts(rows.ids, rows.lengths, shares < recipe.text_dropout)
    for part in context.cache.micro_batches(len(ids)):
        prompts = network.encode_prompts(ids[part], lengths[part])
        predicted = network.denoise(noisy.latents[part], noisy.times[part], prompts)
        context.add("flow", flow_loss(predicted, noisy.flow[part], count))


LOSS_TERMS: Mapping[str, Callable[[LossContext], None]] = {
    "itc": itc,
    "itm": itm,
    "lm": lm,
    "vqa": vqa,
    "prompted": prompted,
    "clip": clip,
    "siglip": siglip,
    "mlm": mlm,
    "mim": mim,
    "classes": classes,
    "dialogue": dialogue,
    "attributes": attributes,
    "reply": reply,
    "flow": flow,
}
