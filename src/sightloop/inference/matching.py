"""Texts on the network's device, and ITM logits of images with their texts, batched by length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sightloop.data.text.tokenizer import Tokenizer
from sightloop.inference.rerank import NOT_RANKED
from sightloop.protocols import Embedder, EmbeddingMatcher, Matcher, require
from sightloop.tasks.embed import embed_images, embed_texts, require_finite, similarities
from sightloop.tasks.text_scores import match_logits
from sightloop.types import Encoded, Floats32, Integers

_TOKENS_AT_ONCE = 4096  # text tokens in one pass
_PASS_COST = 64  # cost of a pass beside its tokens, in text tokens
_MEMORY_COST = 7  # image tokens whose keys and values cost as much as one text token


class TokenizedTexts:
    """Texts tokenized once, for many images.

    Args:
        tokenizer: the model's.
        texts: n texts.
        device: of the network.
        first_id: id that replaces every text's first token, None to keep it.

    Attributes:
        lengths: int64 `[n]`, tokens without padding.
    """

    def __init__(
        self, tokenizer: Tokenizer, texts: Sequence[str], device: torch.device, *, first_id: int | None = None
    ) -> None:
        tokens = tokenizer.encode(list(texts))
        self.ids = torch.from_numpy(tokens.ids).to(device)  # [n, L]
        if first_id is not None:
            self.ids[:, 0] = first_id
        self.device_lengths = torch.from_numpy(tokens.lengths).to(device)
        self.lengths: Integers = tokens.lengths
        self._embedded: tuple[Embedder, Tensor] | None = None

    def rows(self, index: Integers) -> tuple[Tensor, Tensor]:
        """ids `[r, L]`, cut to the longest of these texts, and lengths `[r]`; index: int64 `[r]`."""
        where = torch.from_numpy(index).to(self.ids.device)
        return self.ids[where, : int(self.lengths[index].max())], self.device_lengths[where]

    def embed(self, network: Embedder) -> Tensor:
        """Embeddings `[n, P]` of all texts, in the passes of like length that cost least (`_passes`); once a network.

        Raises:
            CheckpointError: NaN or infinity among them.
        """
        if self._embedded is not None and self._embedded[0] is network:
            return self._embedded[1]
        embedded: Tensor | None = None
        for rows in _passes(self.lengths, _PASS_COST):
            part = require_finite(
                embed_texts(network, *self.rows(rows)), "text embeddings", weights_dtype(network)
            )
            if embedded is None:
                embedded = part.new_empty(len(self.lengths), part.shape[1])
            embedded[torch.from_numpy(rows).to(part.device)] = part
        assert embedded is not None  # the tokenizer refuses no texts
        self._embedded = network, embedded
        return embedded


def weights_dtype(network: object) -> torch.dtype:
    """The dtype of a network's weights: that of its first parameter of floats."""
    parameters = network.parameters() if isinstance(network, torch.nn.Module) else ()
    return next((weight.dtype for weight in parameters if weight.is_floating_point()), torch.float32)


def match_scores(
    network: Matcher, image: Encoded, texts: TokenizedTexts, rows_of: Sequence[Integers]
) -> list[Floats32]:
    """ITM logits of each of B images with its own texts.

    Args:
        network: with an ITM head.
        image: B encoded images.
        texts: all texts.
        rows_of: for each image the rows of its n texts, int64 `[n]`.

    Returns:
        For each image float32 `[n, 2]`: (no match, match).

    Raises:
        CheckpointError: NaN or infinity among them.
    """
    tokens = image.tokens.to(texts.ids.device)
    if isinstance(network, EmbeddingMatcher) and network.matches_embeddings:
        return _embedding_scores(network, Encoded(tokens, frames=image.frames), texts, rows_of)
    logits_of = [np.zeros((len(rows), 2), np.float32) for rows in rows_of]
    for images, part in text_batches(texts, rows_of, tokens.shape[1]):
        rows = np.concatenate([rows_of[b][part] for b in images])
        scored = match_logits(network, Encoded(tokens[images]), *texts.rows(rows))
        logits = require_finite(scored, "ITM logits", tokens.dtype).cpu().numpy()
        for i, b in enumerate(images):
            logits_of[b][part] = logits[i * len(part) : (i + 1) * len(part)]
    return logits_of


def match_probabilities(
    network: Matcher, batches: Iterable[tuple[Encoded, list[Integers]]], texts: TokenizedTexts
) -> Floats32:
    """Probability of "match" of each text with its image, float32 `[n]`.

    Args:
        network: with an ITM head.
        batches: encoded images, and for each image the rows of its texts.
        texts: n texts.
    """
    probabilities = np.zeros(len(texts.lengths), dtype=np.float32)
    for image, rows_of in batches:
        for rows, logits in zip(rows_of, match_scores(network, image, texts, rows_of), strict=True):
            probabilities[rows] = torch.from_numpy(logits).softmax(dim=-1)[:, 1].numpy()
    return probabilities


def rank_scores(
    network: Matcher, embedder: Embedder, image: Encoded, texts: TokenizedTexts, k: int
) -> Floats32:
    """Retrieval scores of B images with all n texts, float32 `[B, n]`.

    Args:
        network: with an ITM head.
        embedder: the same, for ITC.
        image: B encoded images.
        texts: n texts.
        k: texts of each image that ITM scores too.

    Returns:
        ITM logit of "match" plus ITC of the k best of each image, `NOT_RANKED` for the others.
    """
    similarity = similarities(embed_images(embedder, image), texts.embed(embedder))  # [B, n]
    best, index = similarity.topk(min(k, similarity.shape[1]), dim=1)
    columns = list(index.cpu().numpy())
    scores = np.full(tuple(similarity.shape), NOT_RANKED, np.float32)
    for b, logits in enumerate(match_scores(network, image, texts, columns)):
        scores[b, columns[b]] = logits[:, 1] + best[b].float().cpu().numpy()
    return scores


def _embedding_scores(
    network: EmbeddingMatcher, image: Encoded, texts: TokenizedTexts, rows_of: Sequence[Integers]
) -> list[Floats32]:
    """`match_scores` of late fusion: each image and each text is embedded once, whatever the number of pairs."""
    embedder, scores = require(network, Embedder), list[Floats32]()
    vectors = texts.embed(embedder)
    with torch.inference_mode():
        for own, rows in zip(embed_images(embedder, image), rows_of, strict=True):
            chosen = vectors[torch.from_numpy(rows).to(vectors.device)]
            logits = network.match_embeddings(own[None], chosen)
            scores.append(require_finite(logits, "ITM logits", vectors.dtype).float().cpu().numpy())
    return scores


def text_batches(
    texts: TokenizedTexts, rows_of: Sequence[Integers], image_tokens: int
) -> Iterator[tuple[list[int], Integers]]:
    """Batches of images and their texts for one pass each.

    An image's texts are query rows against its one memory, those of like length together; images with one text each
    share a pass.

    Args:
        texts: all texts.
        rows_of: for each of B images the rows of its texts, int64 `[n]`.
        image_tokens: tokens of an image.

    Yields:
        Indices of images, and which of their texts: indices into each one's `rows_of`.
    """
    single = [b for b, rows in enumerate(rows_of) if len(rows) == 1]
    own = np.array([rows_of[b][0] for b in single], np.int64)
    for part in _passes(texts.lengths[own], _PASS_COST):
        yield [single[i] for i in part], np.zeros(1, np.int64)
    for b, rows in enumerate(rows_of):
        if len(rows) > 1:
            for part in _passes(texts.lengths[rows], _PASS_COST + image_tokens // _MEMORY_COST):
                yield [b], part


def _passes(lengths: Integers, cost: int) -> Iterator[Integers]:
    """Batches of texts of like length that cost least: padded tokens plus a cost per pass.

    Lengths 4 4 4 9 at a cost of 64: one pass (4 * 9 + 64 = 100) is cheaper than two (3 * 4 + 9 + 128 = 149); at a cost
    of 8 it is two (37 against 44).

    Args:
        lengths: int64 `[n]`.
        cost: of a pass, in tokens.

    Yields:
        Indices into `lengths`.
    """
    order = np.argsort(lengths, kind="stable")
    levels, counts = np.unique(lengths, return_counts=True)
    ends = np.concatenate([[0], np.cumsum(counts)])
    # best[j]: the least cost of the texts of the j shortest lengths, and the length at which their last pass starts.
    best: list[tuple[int, int]] = [(0, 0)]
    for j in range(1, len(ends)):
        best.append(min((best[i][0] + cost + int((ends[j] - ends[i]) * levels[j - 1]), i) for i in range(j)))
    cuts = [len(ends) - 1]
    while cuts[-1]:
        cuts.append(best[cuts[-1]][1])
    for high, low in pairwise(cuts):
        rows = max(1, _TOKENS_AT_ONCE // int(levels[high - 1]))
        texts = order[ends[low] : ends[high]]
        yield from np.split(texts, range(rows, len(texts), rows))
