"""The rules that the options of text generation put on next-token scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sightloop.tasks.decoding_options import Decoding


def constrain(scores: Tensor, ids: Tensor, new: int, options: Decoding, end_ids: Tensor) -> Tensor:
    """Next-token scores after the penalties and bans of `options`.

    Args:
        scores: `[R, V]`, logits or log-probabilities.
        ids: `[R, L]`, the text so far, prompt included.
        new: how many of the L tokens come after the prompt.
        options: what is penalized, banned and forced.
        end_ids: `[E]`, ids that end a text.

    Returns:
        `[R, V]`; -inf for banned tokens.
    """
    if options.repetition_penalty != 1.0:
        present = scores.gather(1, ids)  # [R, L]
        factor = options.repetition_penalty
        scores = scores.scatter(1, ids, torch.where(present < 0, present * factor, present / factor))
    size = options.no_repeat_ngram
    if size and ids.shape[1] >= size:
        # size 3, ids 5 6 7 5 6: the last two tokens (5 6) also begin the 3-gram 5 6 7, so 7 is banned.
        ngrams = ids.unfold(1, size, 1)  # [R, L - size + 1, size]
        last = ids[:, None, ids.shape[1] - size + 1 :]  # [R, 1, size - 1]
        row, place = (ngrams[..., :-1] == last).all(dim=-1).nonzero(as_tuple=True)
        scores = scores.index_put((row, ngrams[row, place, -1]), scores.new_tensor(-torch.inf))
    forced = options.forced_bos_id if new == 0 else None
    if new < options.min_new_tokens:
        scores = scores.index_fill(1, end_ids, -torch.inf)
    if options.force_eos and new == options.max_new_tokens - 1:
        forced = int(end_ids[0])
    if forced is not None:
        scores = torch.full_like(scores, -torch.inf)
        scores[:, forced] = 0.0
    banned = [*options.suppress_tokens]
    if new == (options.forced_bos_id is not None):
        banned += options.begin_suppress_tokens
    if banned:
        scores = scores.index_fill(1, torch.tensor(banned, device=scores.device), -torch.inf)
    return scores


def sampling_probs(scores: Tensor, options: Decoding) -> Tensor:
    """Probabilities to sample from: temperature, then top-k, then top-p.

    Args:
        scores: logits `[R, V]`.
        options: `temperature`, `top_k`, `top_p`.

    Returns:
        `[R, V]`, float64; 0 for tokens that are cut off. They do not sum to 1 after top-p.
    """
    scores = scores.double() / (options.temperature or 1.0)
    if options.top_k is not None and options.top_k < scores.shape[1]:
        least = scores.topk(options.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    probabilities = scores.softmax(dim=-1)
    if options.top_p is not None and options.top_p < 1:
        # A token stays while the tokens before it hold less than top_p, so the first always stays. With top_p = 0.7:
        #   sorted        0.5   0.3   0.15  0.05
        #   before it     0     0.5   0.8   0.95
        #   kept          yes   yes   no    no
        ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
        drop = ordered.cumsum(dim=-1) - ordered >= options.top_p
        probabilities = probabilities.masked_fill(drop.scatter(1, index, drop), 0.0)
    return probabilities


def sample(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """One token a row by inverse transform sampling: where the cumulative sum passes the row's uniform number.

    Probabilities (0.2, 0.5, 0.3) have the cumulative sums (0.2, 0.7, 1.0): 0.65 gives token 1, 0.7 gives token 2.

    Args:
        probabilities: `[R, V]`, at least 0, not all 0 in a row.
        uniforms: `[R]`, in [0, 1).

    Returns:
        Token ids `[R]`.
    """
    sums = probabilities.cumsum(dim=-1)
    chosen = torch.searchsorted(sums, uniforms[:, None].to(sums) * sums[:, -1:], right=True).squeeze(1)
    return chosen.clamp(max=sums.shape[1] - 1)


def uniform_draws(options: Decoding, keys: Sequence[int]) -> Tensor:
    """Uniform numbers for every text and step, a function of (seed, key) alone, so that a batch changes no text.

    Args:
        options: `seed`, `num_return`, `max_new_tokens`.
        keys: B integers, one a prompt (a digest of its image).

    Returns:
        float64 `[B * num_return, max_new_tokens]`, in [0, 1).
    """
    seed = options.seed % 2**53  # NumPy makes float64 of a pair that int64 cannot hold
    draws = [
        np.random.Generator(np.random.Philox(key=[seed, key % 2**64])).random(
            (options.num_return, options.max_new_tokens)
        )
        for key in keys
    ]
    return torch.from_numpy(np.concatenate(draws))
