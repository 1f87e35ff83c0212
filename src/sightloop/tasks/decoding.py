"""Options of text generation, and the rules that they put on next-token scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sightloop.errors import UsageError


@dataclass(frozen=True, slots=True)
class Decoding:
    """Options of text generation. Sampling is on when any of `top_p`, `top_k` and `temperature` is set.

    Args:
        num_beams: hypotheses of beam search; 1 is greedy decoding.
        top_p: nucleus sampling (Holtzman et al. 2020): sample from the smallest set of tokens with this probability,
            in (0, 1].
        top_k: sample from this many of the likeliest tokens.
        temperature: divides the logits before sampling, above 0.
        min_new_tokens: least length of a text, in tokens after the prompt; EOS counts.
        max_new_tokens: greatest length of a text, in tokens after the prompt; EOS counts.
        repetition_penalty: divides (or, below 0, multiplies) the logits of tokens already in the text; above 1
            discourages repetition (CTRL, Keskar et al. 2019).
        length_penalty: a beam's score is its log-probability / length ** length_penalty.
        num_return: texts per prompt.
        seed: seed of sampling.
        no_repeat_ngram: no n-gram of this size occurs twice in a text, prompt included; 0 allows all.
        early_stopping: when beam search ends. True: as soon as `num_beams` hypotheses have ended. False: when the best
            running hypothesis, scored at its present length, can no longer win. "never": when it could not win at
            `max_new_tokens` either.
        forced_bos_id: id of the first new token, None for a free choice.
        force_eos: whether the token at `max_new_tokens` is EOS.
        end_ids: ids that end a text, in place of the network's own EOS.
        suppress_tokens: ids that are never generated.
        begin_suppress_tokens: ids that are not generated as the first new token (after `forced_bos_id`, if set).

    Raises:
        UsageError: an option is out of range, or beams and sampling are combined.
    """

    num_beams: int = 1
    top_p: float | None = None
    top_k: int | None = None
    temperature: float | None = None
    min_new_tokens: int = 0
    max_new_tokens: int = 20
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    num_return: int = 1
    seed: int = 0
    no_repeat_ngram: int = 0
    early_stopping: bool | Literal["never"] = False
    forced_bos_id: int | None = None
    force_eos: bool = False
    end_ids: Sequence[int] = ()
    suppress_tokens: Sequence[int] = ()
    begin_suppress_tokens: Sequence[int] = ()

    def __post_init__(self) -> None:
        rules = {
            "num_beams": (self.num_beams >= 1, "at least 1"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "temperature": (self.temperature is None or self.temperature > 0, "above 0"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, "0 to max_new_tokens"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
            "num_return": (self.num_return >= 1, "at least 1"),
            "no_repeat_ngram": (self.no_repeat_ngram >= 0, "at least 0"),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise UsageError(f"{name}={getattr(self, name)}: must be {allowed}")
        if self.num_beams > 1 and self.samples:
            raise UsageError(
                "num_beams goes without sampling: leave out top_p, top_k and temperature, or num_beams"
            )
        if not self.samples and self.num_return > self.num_beams:
            raise UsageError(
                f"num_return={self.num_return}: greedy search gives one text and beam search at most num_beams; "
                "raise num_beams, or sample (top_p=0.9)"
            )

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled."""
        return not (self.top_p is None and self.top_k is None and self.temperature is None)


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
