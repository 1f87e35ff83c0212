"""Text from pictures: captions and answers, written freely or chosen among candidates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sightread.tasks.generate import Decoding, generate, generate_scored, steps
from sightread.types import Encoded


class Writer(Protocol):
    """A text decoder over memories."""

    def start(self, memory: Encoded, capacity: int) -> Any: ...

    def next_logits(self, ids: Tensor, state: Any) -> Tensor: ...

    def all_logits(self, ids: Tensor, state: Any) -> Tensor: ...


class _WriterRows:
    """A decoder and its state as the rows that the decoding loop continues. held: how many of a prompt's ids the memory
    holds already, as the vectors that a prefix is."""

    def __init__(self, writer: Writer, memory: Encoded, prompt: Tensor, options: Decoding, held: int) -> None:
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
    writer: Writer,
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
    rows = _WriterRows(writer, memory, prompt, options, held)
    return generate(rows, prompt, options, end_id=end_id, keys=keys)


@torch.inference_mode()
def write_scored(
    writer: Writer,
    memory: Encoded,
    prompt: Tensor,
    options: Decoding,
    *,
    end_id: int,
    keys: Sequence[int] | None = None,
    held: int = 0,
) -> list[tuple[list[int], list[float]]]:
    """`write`, and the log-probability of each token after the prompt (`generate_scored`)."""
    rows = _WriterRows(writer, memory, prompt, options, held)
    return generate_scored(rows, prompt, options, end_id=end_id, keys=keys)


@torch.inference_mode()
def stream(
    writer: Writer,
    memory: Encoded,
    prompt: Tensor,
    options: Decoding,
    *,
    end_id: int,
    keys: Sequence[int],
    held: int = 0,
) -> Iterator[list[int]]:
    """`write` for one memory and prompt `[1, L]`: its first text after every token; with beams the last one alone."""
    rows = _WriterRows(writer, memory, prompt, options, held)
    for search in steps(rows, prompt, options, end_id=end_id, keys=keys):
        if search.done or options.num_beams == 1:
            yield search.texts()[0]


@torch.inference_mode()
def choose(
    writer: Writer, memory: Encoded, candidates: Tensor, lengths: Tensor, *, top: int, chunk: int = 256
) -> list[int]:
    """The likeliest candidate for each of B memories: BLIP's answer ranking (Li et al. 2022, section 5.3).

    candidates `[C, L]`: start token, words, end token, padding; lengths `[C]`. The `top` candidates by the probability
    of their first word go on; the one whose whole text has the highest log-likelihood is chosen. Returns B indices.
    """
    start = candidates[:1, :1].expand(memory.tokens.shape[0], 1)
    first = writer.next_logits(start, writer.start(memory, 1)).float().log_softmax(dim=-1)
    best = first[:, candidates[:, 1]].topk(min(top, candidates.shape[0]), dim=1).indices  # [B, top]
    chosen: list[int] = []
    for b, picks in enumerate(best):
        one = Encoded(memory.tokens[b : b + 1], mask=None if memory.mask is None else memory.mask[b : b + 1])
        scores = torch.cat(
            [_log_likelihood(writer, one, candidates[part], lengths[part]) for part in picks.split(chunk)]
        )
        chosen.append(int(picks[scores.argmax()]))
    return chosen


def _log_likelihood(writer: Writer, memory: Encoded, ids: Tensor, lengths: Tensor) -> Tensor:
    """Sum of the log-probabilities of each text's tokens after the first, `[R]`; all rows read one memory."""
    ids = ids[:, : int(lengths.max())]
    state = writer.start(memory, ids.shape[1] - 1)
    state.select(torch.zeros(ids.shape[0], dtype=torch.long, device=ids.device))
    logits = writer.all_logits(ids[:, :-1], state).float()
    tokens = ids[:, 1:]
    log_p = logits.gather(2, tokens[:, :, None]).squeeze(2) - logits.logsumexp(dim=-1)
    real = torch.arange(1, ids.shape[1], device=ids.device) < lengths[:, None]
    return (log_p * real).sum(dim=1)
