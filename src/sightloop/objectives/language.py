"""Writing: the next token (LM, prefix-LM) and the hidden token (MLM).

Logits are wanted only where they count, `[T, V]`: a loop picks those positions from the hidden states first
(`next_tokens`) and spares the vocabulary-wide product on prompts and padding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sightloop.types import Loss


class TargetTokens(NamedTuple):
    """The positions that predict something: int64 `[T]` each, row by row.

    where: index into the flattened `[R * L]`. rows: the text, 0..R-1. targets: the token that follows.
    """

    positions: Tensor
    rows: Tensor
    targets: Tensor


def next_token_targets(ids: Tensor, lengths: Tensor, prompt: Tensor | int = 0) -> TargetTokens:
    """Which position of ids `[R, L]` predicts which token.

    lengths `[R]`: tokens without padding. prompt: the first tokens of each text that are given, not learned (`[R]` or
    one number). The first token is never predicted.
    """
    position = torch.arange(1, ids.shape[1], device=ids.device)
    first = prompt[:, None] if isinstance(prompt, Tensor) else prompt
    learned = (position >= first) & (position < lengths[:, None])
    rows, before = learned.nonzero(as_tuple=True)
    return TargetTokens(rows * ids.shape[1] + before, rows, ids[rows, before + 1])


def lm_loss(
    logits: Tensor,
    targets: Tensor,
    total: float,
    *,
    weights: Tensor | None = None,
    mass: float | None = None,
    smoothing: float = 0.1,
) -> Loss:
    """Cross-entropy of logits `[T, V]` on targets int64 `[T]`, label smoothing over the whole vocabulary, / total.

    total: of the global batch, what to average over. weights `[T]`: of each token, else 1; mass: their sum over the
    global batch, where it is not total. So:

    * the mean over tokens: total = tokens;
    * each text's mean, then the mean over texts: weights = 1 / (tokens of the text), total = texts;
    * BLIP's VQA (each answer's sum, times its weight, per question): weights = weight of the answer, total = questions,
      mass = sum of weights.

    Chance: ln V for a mean; ln V * mass / total in general; smoothing does not change it.
    Facts: accuracy, weighted as the loss is; nll, the loss without smoothing.
    """
    logits32 = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = logits32.log_softmax(1)
    nll = -log_probs.gather(1, targets[:, None])[:, 0]
    loss = nll if smoothing == 0 else (1 - smoothing) * nll - smoothing * log_probs.mean(1)
    weight = torch.ones_like(nll) if weights is None else weights.to(nll.dtype)
    mass = total if mass is None else mass
    with torch.no_grad():
        is_correct = (logits32.argmax(1) == targets).to(nll.dtype)
        facts = {"accuracy": (weight * is_correct).sum() / mass, "nll": (weight * nll).sum() / total}
    return Loss((weight * loss).sum() / total, math.log(logits.shape[1]) * mass / total, facts)


def mlm_loss(logits: Tensor, targets: Tensor, total: float) -> Loss:
    """Cross-entropy at the hidden positions (Devlin et al. 2019, section 3.1): logits `[T, V]`, targets int64 `[T]`.

    total: hidden positions of the global batch. Chance: ln V. Facts: accuracy, nll.
    """
    return lm_loss(logits, targets, total, smoothing=0)
