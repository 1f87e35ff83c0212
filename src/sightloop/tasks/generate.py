"""Text generation: the one decoding loop, for greedy search, beam search and sampling.

Greedy and beam search follow the reference token for token (`transformers` 5, `early_stopping=False` by default).
Sampling draws each text from a generator keyed by (seed, key of the prompt), so that a text does not depend on its
batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from sightloop.protocols import DecoderState, TextDecoder
from sightloop.tasks.decoding import constrain, sample, sampling_probs, uniform_draws
from sightloop.tasks.decoding_options import Decoding
from sightloop.tasks.finite import require_finite_logits
from sightloop.types import Encoded

_NEVER = -1.0e9  # the score of a hypothesis that must not win; log-probabilities are added to it

S = TypeVar("S", bound=DecoderState)


class Generation(NamedTuple):
    """A generated text.

    Attributes:
        ids: token ids, prompt included, EOS not.
        log_probs: log-probability of each id after the prompt under the network, before any rule of `Decoding`; empty
            unless asked for.
    """

    ids: list[int]
    log_probs: list[float]


@torch.inference_mode()
def generate(
    decoder: TextDecoder[S],
    memory: Encoded,
    prompt: Tensor,
    options: Decoding,
    *,
    end_id: int,
    keys: Sequence[int] | None = None,
    prefix_length: int = 0,
    scored: bool = False,
) -> list[Generation]:
    """Texts for B memories, from prompts of one length.

    Args:
        decoder: the network's text decoder.
        memory: what the decoder reads: tokens `[B, N, D]`, by cross-attention or as the prefix of the text.
        prompt: int64 `[B, L]`, the ids that the texts start with.
        options: how tokens are chosen, and how many texts each prompt gets.
        end_id: id of EOS.
        keys: B integers that name the prompts for sampling (a digest of the image); 0 if left out.
        prefix_length: how many of the L ids are in `memory` already, as vectors; the decoder does not read them again,
            and penalties still see them.
        scored: whether log-probabilities are wanted.

    Returns:
        B * num_return texts, those of one prompt together, best first for beams.

    Raises:
        CheckpointError: logits that are NaN or infinite.
    """
    steps = _decode(decoder, memory, prompt, options, end_id, keys, prefix_length, scored=scored)
    (*_, search) = steps
    return search.texts()


@torch.inference_mode()
def stream(
    decoder: TextDecoder[S],
    memory: Encoded,
    prompt: Tensor,
    options: Decoding,
    *,
    end_id: int,
    key: int,
    prefix_length: int = 0,
) -> Iterator[list[int]]:
    """The ids of one text after every new token; see `generate`.

    Args:
        memory: tokens `[1, N, D]`.
        prompt: int64 `[1, L]`.

    Yields:
        The text so far, prompt included; with beams the finished text alone.
    """
    for search in _decode(decoder, memory, prompt, options, end_id, [key], prefix_length):
        if search.done or options.num_beams == 1:
            yield search.texts()[0].ids


def _decode(
    decoder: TextDecoder[S],
    memory: Encoded,
    prompt: Tensor,
    options: Decoding,
    end_id: int,
    keys: Sequence[int] | None,
    prefix_length: int,
    *,
    scored: bool = False,
) -> Iterator[_Search]:
    """The decoding loop: yields the search after every token."""
    ends = torch.tensor([*options.end_ids] or [end_id], device=prompt.device)
    search: _Search
    if options.num_beams > 1:
        search = _BeamSearch(prompt, options, ends)
    else:
        search = _SingleSearch(prompt, options, ends, keys or [0] * len(prompt), scored=scored)
    # 1. Prefill: B prompts, one row each.
    state = decoder.start(memory, prompt.shape[1] - prefix_length + options.max_new_tokens)
    logits = decoder.next_logits(prompt[:, prefix_length:], state)  # [B, V]
    # 2. One row for each hypothesis or sample; all rows of a prompt read its one memory.
    if search.width > 1:
        rows = torch.arange(len(prompt), device=prompt.device).repeat_interleave(search.width)
        state.select(rows)
        logits = logits[rows]  # [B * width, V]
    # 3. Token by token, until every text has ended.
    while True:
        parents = search.advance(require_finite_logits(logits.float(), memory.tokens.dtype))
        yield search
        if search.done:
            return
        if parents is not None:
            state.select(parents)
        logits = decoder.next_logits(search.ids[:, search.length - 1 : search.length], state)


class _Search(Protocol):
    """A search in progress.

    Attributes:
        width: rows per prompt.
        ids: `[B * width, capacity]`, of which the first `length` columns are written.
        length: tokens in every row, prompt included.
        done: whether every text has ended.
    """

    width: int
    ids: Tensor
    length: int
    done: bool

    def advance(self, logits: Tensor) -> Tensor | None:
        """Chooses the next tokens from logits `[B * width, V]`; returns each row's parent row, None for itself."""
        ...

    def texts(self) -> list[Generation]:
        """The texts so far, each cut at its end; those of beams once the search is done."""
        ...


class _SingleSearch:
    """Greedy search and sampling: every row for itself."""

    def __init__(
        self, prompt: Tensor, options: Decoding, ends: Tensor, keys: Sequence[int], *, scored: bool
    ) -> None:
        self.options = options
        self.ends = ends
        self.width = options.num_return
        self.done = False
        self.start = self.length = prompt.shape[1]
        self.ids = _allocate(prompt, self.width, options.max_new_tokens, int(ends[0]))
        self.open = torch.ones(len(self.ids), dtype=torch.bool, device=prompt.device)
        self.draws = uniform_draws(options, keys) if options.samples else None
        self.log_probs: list[Tensor] | None = [] if scored else None

    def advance(self, logits: Tensor) -> None:
        new = self.length - self.start
        scores = constrain(logits, self.ids[:, : self.length], new, self.options, self.ends)
        if self.draws is None:
            chosen = scores.argmax(dim=-1)  # [R]
        else:
            chosen = sample(sampling_probs(scores, self.options), self.draws[:, new])
        if self.log_probs is not None:
            self.log_probs.append(logits.gather(1, chosen[:, None]).squeeze(1) - logits.logsumexp(dim=1))
        self.ids[:, self.length] = torch.where(self.open, chosen, self.ends[0])
        self.open &= ~torch.isin(chosen, self.ends)
        self.length += 1
        self.done = self.length == self.ids.shape[1] or not bool(self.open.any())

    def texts(self) -> list[Generation]:
        log_probs = None if self.log_probs is None else torch.stack(self.log_probs, dim=1)
        return _texts(self.ids[:, : self.length], log_probs, self.start, self.ends)


class _BeamSearch:
    """Beam search: K running and K finished hypotheses a prompt, both best first, scores in float32.

    Finished hypotheses compete by score / length ** penalty. A prompt is settled when its best running hypothesis,
    scored at its present length, can no longer enter (the reference's early_stopping=False).
    """

    def __init__(self, prompt: Tensor, options: Decoding, ends: Tensor) -> None:
        self.options = options
        self.ends = ends
        self.width = options.num_beams
        self.done = False
        self.start = self.length = prompt.shape[1]
        self.ids = _allocate(prompt, self.width, options.max_new_tokens, int(ends[0]))
        batch, device = prompt.shape[0], prompt.device
        self.offset = torch.arange(batch, device=device)[:, None] * self.width
        # All hypotheses start equal: only the first may be continued, or all would stay equal.
        self.running = torch.full((batch, self.width), _NEVER, device=device)  # [B, K]
        self.running[:, 0] = 0.0
        self.finished = torch.full((batch, self.width), _NEVER, device=device)  # [B, K]
        self.finished_ids = self.ids.view(batch, self.width, -1).clone()  # [B, K, capacity]
        self.log_probs = torch.zeros(batch, self.width, options.max_new_tokens, device=device)
        self.finished_log_probs = self.log_probs.clone()
        self.is_finished = torch.zeros(batch, self.width, dtype=torch.bool, device=device)
        self.open = torch.ones(batch, 1, dtype=torch.bool, device=device)

    def advance(self, logits: Tensor) -> Tensor:
        batch, width = self.running.shape
        new = self.length - self.start
        log_p = torch.log_softmax(logits, dim=-1)  # [B * K, V]
        scores = constrain(log_p, self.ids[:, : self.length], new, self.options, self.ends)
        total = (scores.view(batch, width, -1) + self.running[:, :, None]).view(batch, -1)  # [B, K * V]
        # Should all the best end here, in any of the ways to end, as many remain to be continued.
        best, index = total.topk((1 + len(self.ends)) * width, dim=1)  # [B, C]
        vocab = scores.shape[-1]
        parents, tokens = index // vocab, index % vocab
        ids = _gather_rows(self.ids.view(batch, width, -1), parents)  # [B, C, capacity]
        log_probs = _gather_rows(self.log_probs, parents)
        ids[:, :, self.length] = tokens
        log_probs[:, :, new] = log_p.view(batch, -1).gather(1, index)
        last = self.length + 1 == self.ids.shape[1]
        ended = torch.ones_like(tokens, dtype=torch.bool) if last else torch.isin(tokens, self.ends)

        continued = best + ended.float() * _NEVER
        order = continued.topk(width, dim=1).indices  # [B, K]
        self._finish(ids, log_probs, best, ended, new + 1)
        self.running = continued.gather(1, order)
        self.ids, self.log_probs = _gather_rows(ids, order).flatten(0, 1), _gather_rows(log_probs, order)
        self.length += 1
        penalty = self.options.length_penalty
        at_most = self.options.early_stopping == "never" and penalty > 0
        bound = self.running[:, :1] / (self.options.max_new_tokens if at_most else new + 1) ** penalty
        worst = torch.where(self.is_finished, self.finished.min(dim=1, keepdim=True).values, _NEVER)
        self.open &= (bound > worst).any(dim=1, keepdim=True)
        self.done = bool(ended.all()) or not bool(self.open.any())
        self.done |= self.options.early_stopping is True and bool(self.is_finished.all())
        return (parents.gather(1, order) + self.offset).flatten()

    def _finish(self, ids: Tensor, log_probs: Tensor, best: Tensor, ended: Tensor, length: int) -> None:
        """Lets hypotheses that ended among the first K compete with the finished ones."""
        width = self.width
        ended = ended.clone()
        ended[:, width:] = False
        scores = best / length**self.options.length_penalty
        closed = ~self.open
        if self.options.early_stopping is True:
            closed = closed | self.is_finished.all(dim=1, keepdim=True)
        scores = scores + closed.float() * _NEVER + (~ended).float() * _NEVER
        merged = torch.cat([self.finished, scores], dim=1)  # [B, K + C]
        self.finished, keep = merged.topk(width, dim=1)
        self.finished_ids = _gather_rows(torch.cat([self.finished_ids, ids], dim=1), keep)
        self.finished_log_probs = _gather_rows(torch.cat([self.finished_log_probs, log_probs], dim=1), keep)
        self.is_finished = torch.cat([self.is_finished, ended], dim=1).gather(1, keep)

    def texts(self) -> list[Generation]:
        best = slice(self.options.num_return)
        ids, log_probs = (x[:, best].flatten(0, 1) for x in (self.finished_ids, self.finished_log_probs))
        return _texts(ids, log_probs, self.start, self.ends)


def _texts(ids: Tensor, log_probs: Tensor | None, start: int, ends: Tensor) -> list[Generation]:
    """Rows of ids `[R, L]`, and log-probabilities `[R, new or more]`, as texts without what follows their end."""
    texts = [_truncate_at_eos(row, start, ends) for row in ids.tolist()]
    if log_probs is None:
        return [Generation(text, []) for text in texts]
    return [
        Generation(text, row[: len(text) - start])
        for text, row in zip(texts, log_probs.tolist(), strict=True)
    ]


def _gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows of each prompt: values `[B, K, N]`, index `[B, k]` -> `[B, k, N]`."""
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))


def _allocate(prompt: Tensor, width: int, new: int, fill: int) -> Tensor:
    """The prompts `[B, L]`, each `width` times, with room for `new` tokens: `[B * width, L + new]`."""
    tail = torch.full((prompt.shape[0], new), fill, dtype=prompt.dtype, device=prompt.device)
    return torch.cat([prompt, tail], dim=1).repeat_interleave(width, dim=0)


def _truncate_at_eos(row: list[int], start: int, ends: Tensor) -> list[int]:
    """A row up to its first EOS after the prompt."""
    stops = set(ends.tolist())
    return row[: next((i for i in range(start, len(row)) if row[i] in stops), len(row))]
