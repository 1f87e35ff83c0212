"""Text from images: captions and answers, written freely or chosen among candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from sightloop.tasks.generate import TextDecoder
from sightloop.types import Encoded


@torch.inference_mode()
def rank_answers(
    writer: TextDecoder, memory: Encoded, candidates: Tensor, lengths: Tensor, *, top: int, chunk: int = 256
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


def _log_likelihood(writer: TextDecoder, memory: Encoded, ids: Tensor, lengths: Tensor) -> Tensor:
    """Sum of the log-probabilities of each text's tokens after the first, `[R]`; all rows read one memory."""
    ids = ids[:, : int(lengths.max())]
    state = writer.start(memory, ids.shape[1] - 1)
    state.select(torch.zeros(ids.shape[0], dtype=torch.long, device=ids.device))
    logits = writer.all_logits(ids[:, :-1], state).float()
    tokens = ids[:, 1:]
    log_p = logits.gather(2, tokens[:, :, None]).squeeze(2) - logits.logsumexp(dim=-1)
    real = torch.arange(1, ids.shape[1], device=ids.device) < lengths[:, None]
    return (log_p * real).sum(dim=1)
