"""What each objective asks of the networks, for one batch: towers -> features -> losses.

Here networks and objectives meet; neither knows the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from sightloop.models.blip import Blip
from sightloop.models.blip2 import Blip2
from sightloop.objectives import contrastive, language, masked, matching
from sightloop.objectives.gather import gather_rows, row_offset
from sightloop.training.config import Recipe
from sightloop.training.dataloader import Batch, TextRows
from sightloop.training.grad_cache import GradCache
from sightloop.training.masking import mask_patches, mask_words
from sightloop.types import Encoded, Loss


@dataclass(eq=False)
class LossContext:
    """One step: the networks, this process's rows, the features made so far, the sums to report.

    teacher: the momentum network, None without. heads: modules that only training needs. queue: past features,
    {"image", "text"} `[Q, P]`. counts: of the global batch: images with captions, tokens to write, ...
    """

    network: Any
    teacher: Any
    heads: nn.ModuleDict
    recipe: Recipe
    batch: Batch
    pixels: Tensor
    queue: Mapping[str, Tensor]
    alpha: float
    features: GradCache
    values: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    chances: dict[str, float] = field(default_factory=dict[str, float])
    fresh: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def add(self, name: str, loss: Loss) -> None:
        """Count a loss in with the recipe's weight, and what it reports."""
        self.features.add(self.recipe.terms[name] * loss.value)
        shares = {name: loss.value} | {f"{name}.{fact}": value for fact, value in loss.facts.items()}
        for key, value in shares.items():
            self.values[key] = self.values.get(key, torch.zeros(())) + value.detach().float().cpu()
        self.chances[name] = loss.chance

    @cached_property
    def tokens(self) -> Tensor:
        """Image tokens of every image `[b, N, D]`."""

        def encode(pixels: Tensor) -> Tensor:
            return self.network.encode_image(pixels).tokens

        return self.features.rows(encode, self.pixels)

    @cached_property
    def captioned(self) -> TextRows:
        """The first caption of each image that has one; no rows where none has."""
        return _first(self.batch.captions, self.pixels.device)

    @property
    def each(self) -> int:
        """K: how many captions are read with each image that has any (`data.texts`)."""
        rows = self.batch.captions
        return len(rows.ids) // len(rows.pictures) if rows is not None and len(rows.ids) else 1

    @cached_property
    def texts(self) -> Tensor:
        """ITC embeddings of all captions `[c * K, P]`, those of one image beside each other."""
        rows = self.batch.captions
        if rows is None or not len(rows.ids):
            return self._no_rows()
        return self.features.rows(self.network.embed_text, rows.read, rows.lengths)

    @cached_property
    def pictures(self) -> Tensor:
        """ITC embeddings of their images, one for each caption: `[c * K, P]`."""
        rows = self.captioned
        if not len(rows.ids):
            return self._no_rows()
        if isinstance(self.network, Blip):  # its first token is all, and other terms share them
            tokens = pick(self.tokens, rows.pictures)
            return self.repeated(self.network.embed_image(Encoded(tokens, tokens[:, 0])))
        return self.repeated(
            self.features.rows(partial(_embed, self.network), pick(self.pixels, rows.pictures))
        )

    def repeated(self, x: Tensor) -> Tensor:
        """A row of each image -> one for each of its captions: `[c, ...]` -> `[c * K, ...]`."""
        return x if self.each == 1 else x.repeat_interleave(self.each, 0)

    @cached_property
    def groups(self) -> Tensor:
        """int64 `[c * K]`: rows of one image, or with one and the same caption, are no negatives of each other."""
        return self.repeated(self.batch.identities[self.captioned.pictures])

    def _no_rows(self) -> Tensor:
        return self.pixels.new_zeros(0, self.network.config.embed_dim)


def _embed(network: Any, pixels: Tensor) -> Tensor:
    return network.embed_image(network.encode_image(pixels))


def pick(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], without a copy where that is x. Pick for each part of a batch anew: each goes backward by itself."""
    if len(rows) == len(x) and bool((rows == torch.arange(len(x), device=rows.device)).all()):
        return x
    return x[rows]


def _first(rows: TextRows | None, device: torch.device) -> TextRows:
    if rows is None:
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return TextRows(none[:, None], none, none, 1, none[:, None])
    per = len(rows.ids) // len(rows.pictures)
    lengths = rows.lengths[::per]
    ids, read = (x[::per, : int(lengths.max())] for x in (rows.ids, rows.read))
    return TextRows(ids, lengths, rows.pictures, rows.prompt, read)


def total(count: int) -> int:
    """The sum of a count over all processes."""
    return int(gather_rows(torch.tensor([[float(count)]])).sum())


def itc(context: LossContext) -> None:
    """BLIP's contrast with a momentum teacher, soft targets and a queue (section 3.2); without a teacher, against the
    network's own embeddings as they are: with a gradient on both sides small networks stay at chance for longer."""
    network, teacher, queue = context.network, context.teacher, context.queue
    image, text, ids = context.pictures, context.texts, context.groups
    rows = context.batch.captions or context.captioned
    with torch.no_grad():
        fresh = {"image": image.detach(), "text": text.detach(), "ids": ids}
        if teacher is not None:
            pixels = pick(context.pixels, context.captioned.pictures)
            fresh["image"] = context.repeated(_in_parts(context, partial(_embed, teacher), pixels))
            fresh["text"] = _in_parts(context, teacher.embed_text, rows.ids, rows.lengths)
        fresh = context.fresh = {name: gather_rows(x) for name, x in fresh.items()}
        image_m, text_m, every = (torch.cat([x, queue[name]]) if queue else x for name, x in fresh.items())
        count, offset = len(fresh["ids"]), row_offset(len(image))[0]
        candidates = contrastive.Candidates(image_m, text_m, count, offset, every)
    if count:
        context.add(
            "itc", contrastive.itc_loss(image, text, candidates, network.temperature, alpha=context.alpha)
        )


def _in_parts(context: LossContext, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    count = inputs[0].shape[0]
    if count == 0:
        return context.pixels.new_zeros(0, context.network.config.embed_dim)
    return torch.cat([function(*(x[part] for x in inputs)) for part in context.features.parts(count)])


def itm(context: LossContext) -> None:
    """Does the text say what the image shows: each pair, beside an image and a text that ITC mistakes for it, or
    that were drawn evenly (`hard_negatives` of the recipe)."""
    rows, network, recipe = context.captioned, context.network, context.recipe
    with torch.no_grad():
        pairs = (context.pictures.detach(), context.texts.detach(), context.groups)
        image, text, group = (x[:: context.each] for x in pairs)
        images, texts, ids = gather_rows(image), gather_rows(text), gather_rows(group)
        if not len(ids) or bool((ids == ids[0]).all()):
            return  # nothing to mistake it for
        place = {"offset": row_offset(len(image))[0], "seed": recipe.seed, "step": context.batch.step}
        scale = network.temperature.detach()
        draw = partial(matching.hard_negatives, ids=ids, share=recipe.hard_negatives, **place)
        wrong_text = draw(contrastive.similarities(image, texts) / scale, stream=0)
        wrong_image = draw(contrastive.similarities(text, images) / scale, stream=1)
    tokens = pick(context.tokens, rows.pictures)
    everyones, _ = context.features.everywhere(tokens)
    width = max(int(gather_rows(torch.tensor([[rows.ids.shape[1]]])).max()), rows.ids.shape[1])
    padded = nn.functional.pad(rows.read, (0, width - rows.ids.shape[1]), value=network.config.pad_id)
    words, lengths = gather_rows(padded), gather_rows(rows.lengths)
    everything = 3 * len(ids)
    if not len(rows.ids):  # the others wait for us on the way back
        context.features.add(everyones.sum() * 0)
    for part in context.features.parts(len(rows.ids)):
        # A row without a negative keeps its place with a pair that is not counted.
        lacks = (wrong_text[part] < 0) | (wrong_image[part] < 0)
        other, swap = wrong_text[part].clamp(min=0), wrong_image[part].clamp(min=0)
        both = torch.stack([padded[part], words[other]], 1).flatten(0, 1)
        both_lengths = torch.stack([rows.lengths[part], lengths[other]], 1).flatten()
        both = both[:, : int(both_lengths.max())]
        mine = pick(context.tokens, rows.pictures[part])
        same = network.match_logits(Encoded(mine), both, both_lengths)
        swapped = network.match_logits(Encoded(everyones[swap]), rows.read[part], rows.lengths[part])
        wrong = torch.where(lacks, matching.IGNORED, 0)
        labels = torch.cat([torch.stack([torch.ones_like(wrong), wrong], 1).flatten(), wrong])
        logits = torch.cat([same, swapped])
        context.add("itm", matching.itm_loss(logits, labels, everything, match_weight=recipe.match_weight))


def lm(context: LossContext) -> None:
    """The decoder writes the captions, word by word."""
    rows = context.batch.prompted
    if rows is not None and isinstance(context.network, Blip2):
        rows = _framed(context.network, rows)
    count = 0 if rows is None else int((rows.lengths - rows.prompt).clamp(min=0).sum())
    everything = total(count)
    if rows is None or everything == 0:
        return
    per = len(rows.ids) // len(rows.pictures)
    for part in context.features.parts(len(rows.pictures)):
        texts = slice(part.start * per, part.stop * per)
        tokens = pick(context.tokens, rows.pictures[part])
        logits, targets = _written(context.network, Encoded(tokens), rows, texts)
        loss = language.lm_loss(logits, targets, everything, smoothing=context.recipe.label_smoothing)
        context.add("lm", loss)


def vqa(context: LossContext) -> None:
    """The decoder writes the answer from the states of the question, which was read beside its image."""
    questions, answers = context.batch.questions, context.batch.answers
    count = 0 if answers is None else int((answers.lengths - 1).sum())
    everything = total(count)
    if questions is None or answers is None or everything == 0:
        return
    per = len(questions.ids) // len(questions.pictures)
    for part in context.features.parts(len(questions.pictures)):
        texts = slice(part.start * per, part.stop * per)
        tokens = pick(context.tokens, questions.pictures[part])
        read = context.network.encode_text(Encoded(tokens), questions.ids[texts], questions.lengths[texts])
        logits, targets = _written(context.network, read, answers, texts)
        loss = language.lm_loss(logits, targets, everything, smoothing=context.recipe.label_smoothing)
        context.add("vqa", loss)


def _framed(network: Blip2, rows: TextRows) -> TextRows:
    """Texts as BLIP-2 writes them: T5's tokenizer puts no first token before them, OPT's no last behind."""
    start, count = network.config.start_ids, len(rows.ids)
    lengths = rows.lengths + 1
    if network.config.language is None:
        read = rows.read.clone()
        read[:, 0] = start[0]
        return rows._replace(read=read)

    def framed(ids: Tensor) -> Tensor:
        if start:
            return torch.cat([ids.new_full((count, 1), start[0]), ids], dim=1)
        ids = nn.functional.pad(ids, (0, 1), value=network.config.pad_id)
        return ids.scatter(1, rows.lengths[:, None], network.config.end_id)

    # A prompt was counted without its last token, which the others have behind the words.
    prompt = rows.prompt + (rows.prompt > 1)
    return TextRows(framed(rows.ids), lengths, rows.pictures, prompt, framed(rows.read))


def _written(network: Any, memory: Encoded, rows: TextRows, part: slice) -> tuple[Tensor, Tensor]:
    """Logits `[T, V]` and targets `[T]` of every word that the decoder is to write of these texts."""
    lengths = rows.lengths[part]
    ids, read = (x[part, : int(lengths.max())] for x in (rows.ids, rows.read))
    if isinstance(network, Blip2):
        kept = language.next_token_targets(ids, lengths, rows.prompt)
        states = network.decoder_states(memory, read)
        head = network.head if network.config.language is None else network.language.logits
        return head(states.flatten(0, 1)[kept.positions]), kept.targets
    read = read.clone()
    read[:, 0] = network.config.start_id
    mask = None if memory.mask is None else memory.mask[:, None, None, :]
    tower = network.decoder.text
    kept = language.next_token_targets(ids, lengths, rows.prompt)
    states = tower(read, causal=True, memory=tower.memory(memory.tokens), memory_mask=mask).tokens
    return network.decoder.head(states.flatten(0, 1)[kept.positions]), kept.targets


def prompted(context: LossContext) -> None:
    """The language model writes on from its prompt, in which the image stands (LM, or prefix-LM where the network's
    prefix sees itself whole: PaliGemma, section 3), or from what an encoder made of the prompt (Florence-2)."""
    rows, network = context.batch.dialogues, context.network
    count = 0 if rows is None else int((rows.lengths - rows.prompts).sum())
    everything = total(count)
    if rows is None or everything == 0:
        return
    write = _answered if network.config.start_ids else _continued
    for part in context.features.parts(len(rows.ids)):
        tokens = pick(context.tokens, rows.pictures[part])  # in here: each part goes backward by itself
        logits, targets = write(network, tokens, rows.ids[part], rows.lengths[part], rows.prompts[part])
        loss = language.lm_loss(logits, targets, everything, smoothing=context.recipe.label_smoothing)
        context.add("prompted", loss)


def _continued(
    network: Any, tokens: Tensor, ids: Tensor, lengths: Tensor, prompts: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits `[T, V]` and targets `[T]` of what stands behind the prompts of ids `[R, L]`, each with an image."""
    model, more = network.language, tokens.shape[1] - 1
    ids, real = _with_places(network, ids, lengths, more)
    whole = None
    if model.config.bidirectional_prefix:
        whole = torch.arange(ids.shape[1], device=ids.device) < (prompts + more)[:, None]
    given = network.build_prefix(tokens.flatten(0, 1), ids, real).tokens
    states = model.text.forward_embeddings(given, valid_mask=real, prefix_mask=whole, causal=True)
    kept = language.next_token_targets(ids, lengths + more, prompts + more)
    return model.logits(states.flatten(0, 1)[kept.positions]), kept.targets


def _answered(
    network: Any, tokens: Tensor, ids: Tensor, lengths: Tensor, prompts: Tensor
) -> tuple[Tensor, Tensor]:
    """The same where an encoder reads the prompt, and the decoder starts from ids of its own."""
    model, start = network.language, ids.new_tensor(network.config.start_ids)
    asked, real = _with_places(network, ids, prompts, tokens.shape[1] - 1)
    memory = network.build_prefix(tokens.flatten(0, 1), asked, real)
    steps = torch.arange(int((lengths - prompts).max()), device=ids.device)
    words = ids.gather(1, (prompts[:, None] + steps).clamp(max=ids.shape[1] - 1))
    texts = torch.cat([start.expand(len(ids), -1), words], dim=1)
    kept = language.next_token_targets(texts, len(start) + lengths - prompts, len(start))
    states = model.text.forward_embeddings(
        model.text.embed_tokens(texts),
        causal=True,
        memory=model.text.memory(memory.tokens),
        memory_mask=real[:, None, None],
    )
    return model.logits(states.flatten(0, 1)[kept.positions]), kept.targets


def _with_places(network: Any, ids: Tensor, lengths: Tensor, more: int) -> tuple[Tensor, Tensor]:
    """The first `lengths` of ids `[R, L]` with `more` places for the image, which stands in them as one id, and bool
    `[R, L']`: which of them are real."""
    place = torch.arange(int(lengths.max()), device=ids.device)
    ids = ids[:, : len(place)].masked_fill(place >= lengths[:, None], 0)
    picture = ids == network.config.image_id
    ids = ids.flatten().repeat_interleave(1 + more * picture.flatten()).view(len(ids), -1)
    return ids, torch.arange(ids.shape[1], device=ids.device) < (lengths + more)[:, None]


def clip(context: LossContext) -> None:
    """CLIP's softmax over all pairs of the global batch (Radford et al. 2021, figure 3)."""
    scale = context.network.logit_scale.exp()
    loss = contrastive.clip_loss(context.pictures, context.texts, scale, ids=context.groups)
    context.add("clip", loss)


def siglip(context: LossContext) -> None:
    """A sigmoid for every pair of the global batch (Zhai et al. 2023, algorithm 1)."""
    network = context.network
    loss = contrastive.siglip_loss(
        context.pictures, context.texts, network.logit_scale.exp(), network.logit_bias, ids=context.groups
    )
    context.add("siglip", loss)


def mlm(context: LossContext) -> None:
    """Hidden words of a caption, told from the others and the image (Devlin et al. 2019; Li et al. 2021)."""
    rows, network, recipe = context.captioned, context.network, context.recipe
    hidden = mask_words(
        rows.ids.cpu().numpy(),
        rows.lengths.cpu().numpy(),
        mask_id=cast(Any, context.heads["mlm"]).mask_id,
        vocab=network.config.text.vocab,
        share=recipe.masked_words,
        seed=recipe.seed,
        step=context.batch.step,
        rows=context.batch.places[rows.pictures].cpu().numpy(),
    )
    device = context.pixels.device
    ids, wanted = torch.from_numpy(hidden.ids).to(device), torch.from_numpy(hidden.chosen).to(device)
    everything = total(int(wanted.sum()))
    if everything == 0:
        return
    for part in context.features.parts(len(rows.ids)):
        tokens = pick(context.tokens, rows.pictures[part])
        read = network.encode_text(Encoded(tokens), ids[part], rows.lengths[part])
        logits = context.heads["mlm"](read.tokens[wanted[part]])
        context.add("mlm", language.mlm_loss(logits, rows.ids[part][wanted[part]], everything))


def mim(context: LossContext) -> None:
    """Hidden patches of an image, told from the others (Xie et al. 2022, SimMIM): they are painted in the mean colour,
    so that any stem may read them."""
    network, recipe, pixels = context.network, context.recipe, context.pixels
    patch, side = network.config.vision.patch, network.config.vision.image_size
    grid = side // patch
    hidden = torch.from_numpy(
        mask_patches(
            (grid, grid),
            share=recipe.masked_patches,
            seed=recipe.seed,
            step=context.batch.step,
            rows=context.batch.places.cpu().numpy(),
        )
    ).to(pixels.device)  # [b, grid, grid]
    everything = total(int(hidden.sum()))
    if everything == 0:
        return
    targets = nn.functional.unfold(pixels, patch, stride=patch).transpose(1, 2)  # [b, N, 3 * patch^2]
    painted = pixels * ~hidden.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
    for part in context.features.parts(len(pixels)):
        predicted = context.heads["mim"](network.encode_image(painted[part]).tokens[:, 1:])
        context.add("mim", masked.mim_loss(predicted, targets[part], hidden[part].flatten(1), everything))


def classes(context: LossContext) -> None:
    """The class of an image, from its pooled state through the network's layer for them."""
    known = (context.batch.labels >= 0).nonzero()[:, 0]
    everything = total(len(known))
    if everything == 0:
        return
    labels, pixels = context.batch.labels[known], pick(context.pixels, known)
    for part in context.features.parts(len(known)):
        logits = context.network.label_logits(context.network.encode_image(pixels[part]))
        loss = language.lm_loss(logits, labels[part], everything, smoothing=context.recipe.label_smoothing)
        context.add("classes", loss)


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
}
