"""Scores of given texts for an image: the ITM head, the likeliest answer under a decoder (Li et al. 2022), evidence.

Evidence is Grad-CAM of attention (Selvaraju et al. 2017; on cross-attention ALBEF, Li et al. 2021): for attention
weights A of a layer and a score s, that of an image token is A * max(0, ds/dA), averaged over heads and over the rows
that ask (words of the text, or the class token).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from sightloop.protocols import DecoderState, Matcher, TextDecoder, WatchedAttention
from sightloop.tasks.finite import require_finite, require_finite_logits
from sightloop.types import Encoded

S = TypeVar("S", bound=DecoderState)


@torch.inference_mode()
def rank_answers(
    decoder: TextDecoder[S],
    memory: Encoded,
    candidates: Tensor,
    lengths: Tensor,
    *,
    top: int,
    chunk: int = 256,
) -> list[int]:
    """The likeliest candidate for each of B memories.

    The `top` candidates by the probability of their first word are scored whole; the highest log-likelihood wins.

    Args:
        decoder: the network's text decoder.
        memory: the questions' states, tokens `[B, N, D]`.
        candidates: `[C, L]`: start token, words, EOS, padding.
        lengths: `[C]`, tokens without padding.
        top: candidates that are scored whole.
        chunk: candidates at a time.

    Returns:
        B indices into the candidates.

    Raises:
        CheckpointError: logits that are NaN or infinite.
    """
    start = candidates[:1, :1].expand(memory.tokens.shape[0], 1)
    dtype = memory.tokens.dtype
    logits = require_finite_logits(decoder.next_logits(start, decoder.start(memory, 1)).float(), dtype)
    first = logits.log_softmax(dim=-1)  # [B, V]
    best = first[:, candidates[:, 1]].topk(min(top, candidates.shape[0]), dim=1).indices  # [B, top]
    chosen: list[int] = []
    for b, picks in enumerate(best):
        mask = None if memory.mask is None else memory.mask[b : b + 1]
        question = Encoded(memory.tokens[b : b + 1], mask=mask)
        parts = [
            _log_likelihood(decoder, question, candidates[part], lengths[part]) for part in picks.split(chunk)
        ]
        scores = require_finite(torch.cat(parts), "scores of answers", dtype)
        chosen.append(int(picks[scores.argmax()]))
    return chosen


@torch.inference_mode()
def text_log_likelihoods(
    decoder: TextDecoder[S],
    memory: Encoded,
    ids: Tensor,
    lengths: Tensor,
    *,
    after_prefix: bool = False,
    chunk: int = 128,
) -> Tensor:
    """Log-likelihoods of R texts over one memory.

    Args:
        decoder: the network's text decoder.
        memory: what it reads, tokens `[1, N, D]`.
        ids: int64 `[R, L]`: the token that a text starts from, words, EOS, padding.
        lengths: int64 `[R]`, tokens without padding, at least 2.
        after_prefix: the memory is the prefix that the texts continue, so that their first token counts too.
        chunk: texts at a time.

    Returns:
        float32 `[R]`: sums over all tokens that count.

    Raises:
        CheckpointError: logits that are NaN or infinite.
    """
    parts = [
        _log_likelihood(decoder, memory, ids[rows], lengths[rows], after_prefix=after_prefix)
        for rows in torch.arange(len(ids), device=ids.device).split(chunk)
    ]
    return require_finite(torch.cat(parts), "scores of answers", memory.tokens.dtype)


def _log_likelihood(
    decoder: TextDecoder[S], memory: Encoded, ids: Tensor, lengths: Tensor, *, after_prefix: bool = False
) -> Tensor:
    """Sum of the log-probabilities of each text's tokens after the first: ids `[R, L]` over one memory -> `[R]`.

    `after_prefix`: of all its tokens; the memory is the prefix before them.
    """
    ids = ids[:, : int(lengths.max())]
    state = decoder.start(memory, ids.shape[1] - 1)
    before = [decoder.next_logits(ids[:1, :0], state)] if after_prefix else []  # [1, V]
    state.select(torch.zeros(ids.shape[0], dtype=torch.long, device=ids.device))
    logits = decoder.all_logits(ids[:, :-1], state).float()  # [R, L - 1, V]
    first = 0 if after_prefix else 1
    for row in before:
        logits = torch.cat([row.float().expand(len(ids), 1, -1), logits], dim=1)  # [R, L, V]
    tokens = ids[:, first:]
    log_p = logits.gather(2, tokens[:, :, None]).squeeze(2) - logits.logsumexp(dim=-1)
    valid_mask = torch.arange(first, ids.shape[1], device=ids.device) < lengths[:, None]
    return (log_p * valid_mask).sum(dim=1)


@torch.inference_mode()
def match_logits(network: Matcher, image: Encoded, ids: Tensor, lengths: Tensor) -> Tensor:
    """ITM logits of K texts for each of B images.

    Args:
        network: with an ITM head.
        image: B encoded images.
        ids: `[B * K, L]`, the texts of one image together.
        lengths: `[B * K]`, tokens without padding.

    Returns:
        float32 `[B * K, 2]`: (no match, match).
    """
    return network.match_logits(image, ids, lengths).float()


def grad_cam(layers: Sequence[WatchedAttention], score: Callable[[], Tensor]) -> list[Tensor]:
    """Evidence of every attention weight.

    Needs gradients of the attention weights alone: weights of the network may be packed, and stay as they are.

    Args:
        layers: Attention layers that `score` runs, in the order of the forward pass.
        score: Runs the network; returns the scores `[R]` to explain, each of which depends on its own rows alone.

    Returns:
        For each layer float32 `[B, H, Q, N]`: weight times positive part of its gradient; zero where none reaches it.
    """
    with torch.inference_mode(False), torch.enable_grad(), watch(layers) as weights:
        total = score().float().sum()
        gradients = torch.autograd.grad(total, weights, allow_unused=True, materialize_grads=True)
    return [
        (weight.detach() * gradient.clamp(min=0)).float()
        for weight, gradient in zip(weights, gradients, strict=True)
    ]


@contextmanager
def watch(layers: Sequence[WatchedAttention]) -> Generator[list[Tensor]]:
    """Collects the attention weights `[B, H, Q, N]` that this thread computes in the layers, with gradients."""
    thread, seen = threading.get_ident(), list[Tensor]()

    def watcher(weights: Tensor) -> Tensor:
        if threading.get_ident() != thread:  # another request on the same network
            return weights
        if not weights.requires_grad:
            weights = weights.detach().requires_grad_()
        seen.append(weights)
        return weights

    before = [layer.watcher for layer in layers]
    try:
        for layer in layers:
            layer.watcher = watcher
        yield seen
    finally:
        for layer, former in zip(layers, before, strict=True):
            layer.watcher = former
