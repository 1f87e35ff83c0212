"""The one decoding loop: greedy, beam and sampling, over any network that continues rows of token ids.

Greedy and beam follow the reference token for token (`transformers` 5: its beam search with early_stopping=False).
Sampling draws row by row from a generator keyed by (seed, row key), so that a text does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from sightloop.errors import UsageError
from sightloop.types import Encoded

_NEVER = -1.0e9  # the score of what must not be chosen; added to, never compared with, log-probabilities


@dataclass(frozen=True, slots=True)
class Decoding:
    """How text is chosen. Sampling is on when any of `top_p`, `top_k` and `temperature` is given.

    num_beams: hypotheses kept (1: greedy). top_p: the smallest set of tokens with this probability (0..1].
    top_k: the k best tokens. temperature: divides the logits (> 0). min_new_tokens, max_new_tokens: counted without
    the prompt; the end token counts. repetition_penalty: CTRL's (Keskar et al. 2019), > 1 discourages.
    length_penalty: a beam's score is its log-probability / length ** penalty. num_return: texts an image.
    seed: of sampling. no_repeat_ngram: no n tokens in a row stand twice in a text, prompt included (0: they may).
    early_stopping: beam search ends when `num_beams` texts have ended, though another might still be likelier; "never":
    not before the longest text could no longer be, where `length_penalty` favours long ones.
    forced_bos_id: what the first new token must be. force_eos: what reaches `max_new_tokens` is given its end as the
    last.
    end_ids: what ends a text in place of the network's own token. suppress_tokens, begin_suppress_tokens: what no
    token, or not the
    first, may be.
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
        """Whether tokens are drawn at random."""
        return not (self.top_p is None and self.top_k is None and self.temperature is None)


class DecodeRows(Protocol):
    """What the loop needs of a network: rows of text that go on, bound to their memory and their cache."""

    def next_logits(self, ids: Tensor) -> Tensor:
        """Append ids `[R, L]`; scores of the token after them `[R, V]`."""
        ...

    def select(self, rows: Tensor) -> None:
        """Row i goes on from row `rows[i]`."""
        ...


def generate(
    rows: DecodeRows, prompt: Tensor, options: Decoding, *, end_id: int, keys: Sequence[int] | None = None
) -> list[list[int]]:
    """Continue prompts of one length, int64 `[B, L]`, one per memory: B * num_return lists of ids, prompt included.

    The texts of one prompt stand together, best first for beams. The end token is not part of a text.
    keys: one integer per prompt that names it for sampling (a digest of its image), 0 if left out.
    """
    return _run(rows, prompt, options, end_id, keys).texts()


@torch.inference_mode()
def generate_scored(
    rows: DecodeRows, prompt: Tensor, options: Decoding, *, end_id: int, keys: Sequence[int] | None = None
) -> list[tuple[list[int], list[float]]]:
    """`generate`, and for each token after the prompt the logarithm of the probability that the network gave it there,
    before any rule of `options`."""
    search = _run(rows, prompt, options, end_id, keys, scored=True)
    start = prompt.shape[1]
    return [
        (text, row[: len(text) - start])
        for text, row in zip(search.texts(), search.log_p_of_texts().tolist(), strict=True)
    ]


def _run(
    rows: DecodeRows,
    prompt: Tensor,
    options: Decoding,
    end_id: int,
    keys: Sequence[int] | None,
    *,
    scored: bool = False,
) -> DecodeSearch:
    (*_, search) = decode_steps(rows, prompt, options, end_id=end_id, keys=keys, scored=scored)
    return search


@torch.inference_mode()
def decode_steps(
    rows: DecodeRows,
    prompt: Tensor,
    options: Decoding,
    *,
    end_id: int,
    keys: Sequence[int] | None = None,
    scored: bool = False,
) -> Iterator[DecodeSearch]:
    """The loop itself: `generate`, stopping after every token to show how far the search is."""
    ends = torch.tensor([*options.end_ids] or [end_id], device=prompt.device)
    if options.num_beams > 1:
        search: DecodeSearch = _BeamSearch(prompt, options, ends)
    else:
        search = _SingleSearch(prompt, options, ends, keys or [0] * prompt.shape[0], scored=scored)
    logits = rows.next_logits(prompt)
    if search.width > 1:
        spread = torch.arange(prompt.shape[0], device=prompt.device).repeat_interleave(search.width)
        rows.select(spread)
        logits = logits[spread]
    while True:
        parents = search.advance(logits.float())
        yield search
        if search.done:
            return
        if parents is not None:
            rows.select(parents)
        logits = rows.next_logits(search.ids[:, search.length - 1 : search.length])


class DecodeSearch(Protocol):
    """A search under way: B * width rows of ids `[B * width, capacity]`, `length` of them written."""

    width: int
    ids: Tensor
    length: int
    done: bool

    def advance(self, logits: Tensor) -> Tensor | None:
        """Scores of the next token `[B * width, V]` -> which row each row now goes on from, None for its own."""
        ...

    def texts(self) -> list[list[int]]:
        """The texts so far, each up to its end; those of beams once the search is done."""
        ...

    def log_p_of_texts(self) -> Tensor:
        """Log-probabilities of the tokens after the prompt `[texts, new or more]`."""
        ...


class _SingleSearch:
    """Greedy choice, or a draw: every row for itself."""

    def __init__(
        self, prompt: Tensor, options: Decoding, ends: Tensor, keys: Sequence[int], *, scored: bool
    ) -> None:
        self.options = options
        self.ends = ends
        self.width = options.num_return
        self.done = False
        self.start = self.length = prompt.shape[1]
        self.ids = _allocate(prompt, self.width, options.max_new_tokens, int(ends[0]))
        self.open = torch.ones(self.ids.shape[0], dtype=torch.bool, device=prompt.device)
        self.draws = _uniforms(options, keys) if options.samples else None
        self.log_p: list[Tensor] | None = [] if scored else None

    def advance(self, logits: Tensor) -> None:
        new = self.length - self.start
        scores = _constrain(logits, self.ids[:, : self.length], new, self.options, self.ends)
        if self.draws is None:
            chosen = scores.argmax(dim=-1)
        else:
            chosen = _sample(_sampling_probs(scores, self.options), self.draws[:, new])
        if self.log_p is not None:
            self.log_p.append(logits.gather(1, chosen[:, None]).squeeze(1) - logits.logsumexp(dim=1))
        self.ids[:, self.length] = torch.where(self.open, chosen, self.ends[0])
        self.open &= ~torch.isin(chosen, self.ends)
        self.length += 1
        self.done = self.length == self.ids.shape[1] or not bool(self.open.any())

    def texts(self) -> list[list[int]]:
        return [_truncate_at_eos(row, self.start, self.ends) for row in self.ids[:, : self.length].tolist()]

    def log_p_of_texts(self) -> Tensor:
        assert self.log_p is not None, "not asked for at the start"
        return torch.stack(self.log_p, dim=1)


class _BeamSearch:
    """Beam search. Running hypotheses `[B, K]`, finished ones `[B, K]`, both best first, scores in float32.

    Finished hypotheses compete by score / length ** penalty; a prompt is settled when its best running hypothesis,
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
        self.running = torch.full((batch, self.width), _NEVER, device=device)
        self.running[:, 0] = 0.0
        self.finished = torch.full((batch, self.width), _NEVER, device=device)
        self.finished_ids = self.ids.view(batch, self.width, -1).clone()
        self.log_p = torch.zeros(batch, self.width, options.max_new_tokens, device=device)
        self.finished_log_p = self.log_p.clone()
        self.is_finished = torch.zeros(batch, self.width, dtype=torch.bool, device=device)
        self.open = torch.ones(batch, 1, dtype=torch.bool, device=device)

    def advance(self, logits: Tensor) -> Tensor:
        batch, width = self.running.shape
        new = self.length - self.start
        plain = torch.log_softmax(logits, dim=-1)
        scores = _constrain(plain, self.ids[:, : self.length], new, self.options, self.ends)
        total = (scores.view(batch, width, -1) + self.running[:, :, None]).view(batch, -1)
        # Should all the best end here, in any of the ways to end, as many remain to go on.
        best, index = total.topk((1 + len(self.ends)) * width, dim=1)
        vocab = scores.shape[-1]
        parents, tokens = index // vocab, index % vocab
        ids, log_p = _gather_rows(self.ids.view(batch, width, -1), parents), _gather_rows(self.log_p, parents)
        ids[:, :, self.length] = tokens
        log_p[:, :, new] = plain.view(batch, -1).gather(1, index)
        last = self.length + 1 == self.ids.shape[1]
        ends = torch.ones_like(tokens, dtype=torch.bool) if last else torch.isin(tokens, self.ends)

        goes_on = best + ends.float() * _NEVER
        order = goes_on.topk(width, dim=1).indices
        self._finish(ids, log_p, best, ends, new + 1)
        self.running = goes_on.gather(1, order)
        self.ids, self.log_p = _gather_rows(ids, order).flatten(0, 1), _gather_rows(log_p, order)
        self.length += 1
        penalty = self.options.length_penalty
        longest = self.options.early_stopping == "never" and penalty > 0
        hope = self.running[:, :1] / (self.options.max_new_tokens if longest else new + 1) ** penalty
        worst = torch.where(self.is_finished, self.finished.min(dim=1, keepdim=True).values, _NEVER)
        self.open &= (hope > worst).any(dim=1, keepdim=True)
        self.done = bool(ends.all()) or not bool(self.open.any())
        self.done |= self.options.early_stopping is True and bool(self.is_finished.all())
        return (parents.gather(1, order) + self.offset).flatten()

    def _finish(self, ids: Tensor, log_p: Tensor, best: Tensor, ends: Tensor, length: int) -> None:
        """Let hypotheses that ended among the first `width` compete with the finished ones."""
        width = self.width
        ended = ends.clone()
        ended[:, width:] = False
        scores = best / length**self.options.length_penalty
        closed = ~self.open
        if self.options.early_stopping is True:
            closed = closed | self.is_finished.all(dim=1, keepdim=True)
        scores = scores + closed.float() * _NEVER + (~ended).float() * _NEVER
        merged = torch.cat([self.finished, scores], dim=1)
        self.finished, keep = merged.topk(width, dim=1)
        self.finished_ids = _gather_rows(torch.cat([self.finished_ids, ids], dim=1), keep)
        self.finished_log_p = _gather_rows(torch.cat([self.finished_log_p, log_p], dim=1), keep)
        self.is_finished = torch.cat([self.is_finished, ended], dim=1).gather(1, keep)

    def texts(self) -> list[list[int]]:
        chosen = self.finished_ids[:, : self.options.num_return].flatten(0, 1)
        return [_truncate_at_eos(row, self.start, self.ends) for row in chosen.tolist()]

    def log_p_of_texts(self) -> Tensor:
        return self.finished_log_p[:, : self.options.num_return].flatten(0, 1)


def _gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows of each prompt: values `[B, K, N]`, index `[B, k]` -> `[B, k, N]`."""
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))


def _allocate(prompt: Tensor, width: int, new: int, fill: int) -> Tensor:
    """The prompts, each `width` times, with room for `new` tokens: `[B * width, L + new]`."""
    tail = torch.full((prompt.shape[0], new), fill, dtype=prompt.dtype, device=prompt.device)
    return torch.cat([prompt, tail], dim=1).repeat_interleave(width, dim=0)


def _truncate_at_eos(row: list[int], start: int, ends: Tensor) -> list[int]:
    """A row up to its first end token after the prompt."""
    stops = set(ends.tolist())
    return row[: next((i for i in range(start, len(row)) if row[i] in stops), len(row))]


def _constrain(scores: Tensor, ids: Tensor, new: int, options: Decoding, ends: Tensor) -> Tensor:
    """Scores `[R, V]` after the rules of `options`; ids `[R, L]`: all so far, of which `new` are after the prompt."""
    if options.repetition_penalty != 1.0:
        seen = scores.gather(1, ids)
        factor = options.repetition_penalty
        scores = scores.scatter(1, ids, torch.where(seen < 0, seen * factor, seen / factor))
    size = options.no_repeat_ngram
    if size and ids.shape[1] >= size:
        runs = ids.unfold(1, size, 1)  # [R, L - size + 1, size]
        row, place = (
            (runs[..., :-1] == ids[:, None, ids.shape[1] - size + 1 :]).all(dim=-1).nonzero(as_tuple=True)
        )
        scores = scores.index_put((row, runs[row, place, -1]), scores.new_tensor(-torch.inf))
    forced = options.forced_bos_id if new == 0 else None
    if new < options.min_new_tokens:
        scores = scores.index_fill(1, ends, -torch.inf)
    if options.force_eos and new == options.max_new_tokens - 1:
        forced = int(ends[0])
    if forced is not None:
        scores = torch.full_like(scores, -torch.inf)
        scores[:, forced] = 0.0
    banned = [*options.suppress_tokens]
    if new == (options.forced_bos_id is not None):
        banned += options.begin_suppress_tokens
    if banned:
        scores = scores.index_fill(1, torch.tensor(banned, device=scores.device), -torch.inf)
    return scores


def _sampling_probs(scores: Tensor, options: Decoding) -> Tensor:
    """Temperature, top-k, top-p, in this order: logits `[R, V]` -> probabilities `[R, V]` in float64."""
    scores = scores.double() / (options.temperature or 1.0)
    if options.top_k is not None and options.top_k < scores.shape[1]:
        least = scores.topk(options.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    probabilities = scores.softmax(dim=-1)
    if options.top_p is not None and options.top_p < 1:
        ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token stays while what comes before it has less than top_p: the first always stays.
        drop = ordered.cumsum(dim=-1) - ordered >= options.top_p
        probabilities = probabilities.masked_fill(drop.scatter(1, index, drop), 0.0)
    return probabilities


def _sample(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which each row's running sum passes its uniform number: `[R, V]`, `[R]` -> `[R]`."""
    sums = probabilities.cumsum(dim=-1)
    chosen = torch.searchsorted(sums, uniforms[:, None].to(sums) * sums[:, -1:], right=True).squeeze(1)
    return chosen.clamp(max=sums.shape[1] - 1)


def _uniforms(options: Decoding, keys: Sequence[int]) -> Tensor:
    """Numbers in [0, 1) for every row and step, `[B * num_return, max_new_tokens]`, from (seed, key) alone."""
    seed = options.seed % 2**53  # NumPy makes float64 of a pair that int64 cannot hold
    draws = [
        np.random.Generator(np.random.Philox(key=[seed, key % 2**64])).random(
            (options.num_return, options.max_new_tokens)
        )
        for key in keys
    ]
    return torch.from_numpy(np.concatenate(draws))


class TextDecoder(Protocol):
    """A text decoder over memories."""

    def start(self, memory: Encoded, capacity: int) -> Any: ...

    def next_logits(self, ids: Tensor, state: Any) -> Tensor: ...

    def all_logits(self, ids: Tensor, state: Any) -> Tensor: ...


class _DecoderRows:
    """A decoder and its state as the rows that the decoding loop continues. held: how many of a prompt's ids the memory
    holds already, as the vectors that a prefix is."""

    def __init__(
        self, writer: TextDecoder, memory: Encoded, prompt: Tensor, options: Decoding, held: int
    ) -> None:
        self.writer = writer
        self.held = held
        self.state = writer.start(memory, prompt.shape[1] - held + options.max_new_tokens)

    def next_logits(self, ids: Tensor) -> Tensor:
        held, self.held = self.held, 0
        return self.writer.next_logits(ids[:, held:], self.state)

    def select(self, rows: Tensor) -> None:
        self.state.select(rows)


@torch.inference_mode()
def write(
    writer: TextDecoder,
    memory: Encoded,
    prompt: Tensor,
    options: Decoding,
    *,
    end_id: int,
    keys: Sequence[int] | None = None,
    held: int = 0,
) -> list[list[int]]:
    """Texts for B memories from prompts of one length `[B, L]`: B * num_return lists of ids, prompt included.

    held: see `_WriterRows`."""
    rows = _DecoderRows(writer, memory, prompt, options, held)
    return generate(rows, prompt, options, end_id=end_id, keys=keys)


@torch.inference_mode()
def write_scored(
    writer: TextDecoder,
    memory: Encoded,
    prompt: Tensor,
    options: Decoding,
    *,
    end_id: int,
    keys: Sequence[int] | None = None,
    held: int = 0,
) -> list[tuple[list[int], list[float]]]:
    """`write`, and the log-probability of each token after the prompt (`generate_scored`)."""
    rows = _DecoderRows(writer, memory, prompt, options, held)
    return generate_scored(rows, prompt, options, end_id=end_id, keys=keys)


@torch.inference_mode()
def stream(
    writer: TextDecoder,
    memory: Encoded,
    prompt: Tensor,
    options: Decoding,
    *,
    end_id: int,
    keys: Sequence[int],
    held: int = 0,
) -> Iterator[list[int]]:
    """`write` for one memory and prompt `[1, L]`: its first text after every token; with beams the last one alone."""
    rows = _DecoderRows(writer, memory, prompt, options, held)
    for search in decode_steps(rows, prompt, options, end_id=end_id, keys=keys):
        if search.done or options.num_beams == 1:
            yield search.texts()[0]
