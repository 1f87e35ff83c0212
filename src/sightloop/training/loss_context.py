"""What the objectives of one step share: networks, this process's rows, the features computed so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from sightloop.objectives.gather import gather_rows
from sightloop.objectives.positives import NO_CAPTION, Positives
from sightloop.protocols import Embedder, ImageNetwork, require
from sightloop.training.config import Recipe
from sightloop.training.dataloader import Batch, TextRows
from sightloop.training.grad_cache import GradCache
from sightloop.types import Encoded, Loss

P = TypeVar("P")


@dataclass(eq=False)
class LossContext:
    """One step: networks, this process's rows, the features computed so far, the sums to report.

    Args:
        network: the network in training.
        teacher: the momentum teacher, None without.
        heads: modules that only training needs.
        recipe: weights of the objectives, and their options.
        batch: b images with their texts, on the device.
        pixels: `[b, 3, S, S]`, normalized.
        queue: past features, "image" and "text" `[Q, P]`, "ids" `[Q]`; empty without.
        alpha: weight of the teacher's soft targets, 0..1.
        cache: features and gradients of the batch, a micro-batch at a time.

    Attributes:
        values: this process's share of each loss and fact.
        chances: each loss of a model that has learned nothing.
        new_features: features of the global batch for the queue.
    """

    network: nn.Module
    teacher: nn.Module | None
    heads: nn.ModuleDict
    recipe: Recipe
    batch: Batch
    pixels: Tensor
    queue: Mapping[str, Tensor]
    alpha: float
    cache: GradCache
    values: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    chances: dict[str, float] = field(default_factory=dict[str, float])
    new_features: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def net(self, protocol: type[P]) -> P:
        """The network as one of `protocols`."""
        return require(self.network, protocol)

    def add(self, name: str, loss: Loss, **others: Loss) -> None:
        """Adds a loss with the recipe's weight, and its facts to the report; others: losses of the same pass."""
        losses = {name: loss, **others}
        self.cache.add(torch.stack([self.recipe.terms[n] * one.value for n, one in losses.items()]).sum())
        for term, one in losses.items():
            shares = {term: one.value} | {f"{term}.{fact}": value for fact, value in one.facts.items()}
            for key, value in shares.items():
                self.values[key] = self.values.get(key, torch.zeros(())) + value.detach().float().cpu()
            self.chances[term] = one.chance

    @cached_property
    def tokens(self) -> Tensor:
        """Image tokens of every image `[b, N, D]`."""
        network = self.net(ImageNetwork)
        return self.cache.encode(partial(_image_tokens, network), self.pixels)

    @cached_property
    def first_captions(self) -> TextRows:
        """The first caption of each image that has one, c rows."""
        return _first(self.batch.captions, self.pixels.device)

    @property
    def captions_per_image(self) -> int:
        """K, captions that are read with each captioned image (`data.texts`)."""
        rows = self.batch.captions
        return len(rows.ids) // len(rows.image_rows) if rows is not None and len(rows.ids) else 1

    @cached_property
    def text_embeddings(self) -> Tensor:
        """Embeddings of all captions `[c * K, P]`, those of one image together."""
        rows = self.batch.captions
        if rows is None or not len(rows.ids):
            return self._no_rows()
        return self.cache.encode(self.net(Embedder).embed_text, rows.input_ids, rows.lengths)

    @cached_property
    def image_embeddings(self) -> Tensor:
        """Embeddings of their images, one for each caption: `[c * K, P]`."""
        rows, network = self.first_captions, self.net(Embedder)
        if not len(rows.ids):
            return self._no_rows()
        if network.embeds_first_token:  # cheap for the whole batch, from tokens that other objectives share
            tokens = select_rows(self.tokens, rows.image_rows)
            return self.repeat_per_caption(network.embed_image(Encoded(tokens, tokens[:, 0])))
        pixels = select_rows(self.pixels, rows.image_rows)
        return self.repeat_per_caption(self.cache.encode(partial(embed_pixels, self.network), pixels))

    def repeat_per_caption(self, x: Tensor) -> Tensor:
        """A row for each image -> one for each of its captions: `[c, ...]` -> `[c * K, ...]`."""
        return x if self.captions_per_image == 1 else x.repeat_interleave(self.captions_per_image, 0)

    @cached_property
    def pairs(self) -> PairIds:
        """Ids of this process's pairs, one for each caption: c * K rows."""
        rows, texts = self.first_captions.image_rows, self.batch.text_ids
        samples, captions = self.batch.sample_indices[rows], self.batch.caption_ids[rows]
        return PairIds(self.repeat_per_caption(samples), texts, self.repeat_per_caption(captions))

    @cached_property
    def positives(self) -> Positives:
        """Images and texts of the global batch that match."""
        return Positives.from_texts(*gather_pairs(self.pairs))

    def _no_rows(self) -> Tensor:
        return self.pixels.new_zeros(0, self.net(Embedder).embed_dim)


class PairIds(NamedTuple):
    """Ids of pairs of an image and one of its captions.

    Args:
        samples: int64 `[n]`, index of the sample.
        texts: int64 `[n]`, equal for equal texts.
        captions: int64 `[n, M]`, ids of all captions of the sample, padded.
    """

    samples: Tensor
    texts: Tensor
    captions: Tensor


def gather_pairs(pairs: PairIds) -> PairIds:
    """The pairs of all processes, in rank order."""
    width = int(gather_rows(torch.tensor([[pairs.captions.shape[1]]])).max())
    missing = width - pairs.captions.shape[1]
    captions = nn.functional.pad(pairs.captions, (0, missing), value=NO_CAPTION)
    return PairIds(gather_rows(pairs.samples), gather_rows(pairs.texts), gather_rows(captions))


def _image_tokens(network: ImageNetwork, pixels: Tensor) -> Tensor:
    """pixels `[b, 3, S, S]` -> `[b, N, D]`."""
    return network.encode_image(pixels).tokens


def embed_pixels(network: nn.Module, pixels: Tensor) -> Tensor:
    """pixels `[b, 3, S, S]` -> `[b, P]`."""
    return require(network, Embedder).embed_image(require(network, ImageNetwork).encode_image(pixels))


def select_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], `[n, ...]` -> `[r, ...]`, without a copy if that is x.

    Call it for each micro-batch: each has its own backward pass.
    """
    if len(rows) == len(x) and bool((rows == torch.arange(len(x), device=rows.device)).all()):
        return x
    return x[rows]


def _first(rows: TextRows | None, device: torch.device) -> TextRows:
    if rows is None:
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return TextRows(none[:, None], none, none, 1, none[:, None])
    each = len(rows.ids) // len(rows.image_rows)
    lengths = rows.lengths[::each]
    ids, read = (x[::each, : int(lengths.max())] for x in (rows.ids, rows.input_ids))
    return TextRows(ids, lengths, rows.image_rows, rows.prompt_length, read)


def global_count(count: int) -> int:
    """Sum of a count over the processes."""
    return int(gather_rows(torch.tensor([[float(count)]])).sum())
