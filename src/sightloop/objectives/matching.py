"""Image-text matching: which wrong pairs to judge, and the judge's loss (ALBEF, section 3.2; BLIP, section 3.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sightloop.types import Loss

IGNORED = -1
"""A label that `itm` skips, and what `hard_negatives` says for a row that has no negative in the batch."""


def binary_entropy(p: float) -> float:
    """-p ln p - (1 - p) ln (1 - p), in nats: what the best constant answer costs where a share p of answers is yes."""
    return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)


def hard_negatives(
    similarity: Tensor,
    *,
    offset: int,
    seed: int,
    step: int,
    ids: Tensor | None = None,
    positive: Tensor | None = None,
    stream: int = 0,
    share: float = 1.0,
) -> Tensor:
    """One wrong partner for each row, drawn in proportion to softmax(similarity) + 1e-4: int64 `[b]` -> column 0..B-1.

    similarity `[b, B]`: my rows against the columns to draw from, already divided by the temperature; the own pair of
    row i is column offset + i. ids: int64 `[B]`; no column of the row's own id is drawn. positive: bool `[b, B]`,
    further columns that match the row, which are not drawn either. A row for which nothing is left gets `IGNORED`.
    The draw depends on (seed, step, stream, offset + i, column) alone: the same for every number of processes.
    stream: one number for images looking for texts, another for the other direction. share: the chance of a row to be
    drawn so; the others are drawn evenly from the same columns.
    """
    columns = torch.arange(similarity.shape[1], device=similarity.device)
    own = offset + torch.arange(similarity.shape[0], device=similarity.device)
    negatives: list[Tensor] = []
    # By blocks of rows: the noise of all pairs takes more memory than their similarities.
    blocks = [None] * len(own.split(512)) if positive is None else positive.split(512)
    for scores, rows, matches in zip(similarity.detach().split(512), own.split(512), blocks, strict=True):
        scores32 = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = scores32.softmax(1) + 1e-4
        if share < 1:
            coin = _uniform_noise(_hash_key(seed, step, stream, 1), rows, columns.new_zeros(1))
            weights = torch.where(coin < share, weights, 1.0)
        column_ids = columns if ids is None else ids
        weights = weights.masked_fill(column_ids[rows][:, None] == column_ids, 0)
        if matches is not None:
            weights = weights.masked_fill(matches, 0)
        # Of exponential waiting times with rates w, the first comes from j with probability w_j / sum(w).
        waiting_times = (
            -_uniform_noise(_hash_key(seed, step, stream), rows, columns).log().to(weights.dtype) / weights
        )
        earliest, column = waiting_times.min(1) if len(columns) else (waiting_times.new_empty(0), rows)
        negatives.append(torch.where(earliest.isinf(), IGNORED, column))
    return torch.cat(negatives)


def itm_loss(
    logits: Tensor, labels: Tensor, total: int, *, matching: float = 1 / 3, match_weight: float = 1.0
) -> Loss:
    """Cross-entropy of the judge's logits `[n, 2]` (index 1: the pair matches) on labels int64 `[n]`, 0 or 1.

    Rows labelled `IGNORED` weigh nothing. total: rows of the global batch. matching: the share of matching pairs among
    them, 1 : 2 in BLIP. match_weight: how much more a matching pair counts: at 1 : 2, 2 makes both verdicts equally
    dear, so that a probability of 0.5 is the fair threshold. The loss is the mean with these weights.
    Chance: the entropy of the weighted share, 0.6365 at 1 : 2.
    Facts: accuracy; matched, the share that was called matching (a judge that says one thing only sits at 0 or 1).
    """
    logits32 = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weights = logits32.new_tensor([1.0, match_weight])
    mass = total * (1 - matching + match_weight * matching)
    value = F.cross_entropy(logits32, labels, weights, ignore_index=IGNORED, reduction="sum") / mass
    with torch.no_grad():
        predicted_match, counted = logits32[:, 1] > logits32[:, 0], labels != IGNORED
        facts = {
            "accuracy": ((predicted_match == (labels == 1)) & counted).sum() / total,
            "matched": (predicted_match & counted).sum() / total,
        }
    return Loss(value, binary_entropy(total * match_weight * matching / mass), facts)


def _hash_key(*numbers: int) -> Tensor:
    state = torch.zeros((), dtype=torch.int64)
    for word in numbers:
        state = _mix_bits(state + _GOLDEN + (word & (2**63 - 1)))
    return state


def _uniform_noise(key: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Even noise in (0, 1), float32 `[b, B]`, a function of (key, row, column) alone."""
    # The key's upper half moves the start of each row's own sequence, and rows are mixed before columns are added.
    start = _mix_bits(rows * _GOLDEN + int(key))
    bits = _mix_bits(start[:, None] + columns * _GOLDEN)
    # The upper 23 bits, in the middle of their interval: never 0 nor 1 in float32.
    return (_shift_right(bits, 41).to(torch.float32) + 0.5) * 2**-23


# SplitMix64 (Steele, Lea and Flood 2014) in wrapping int64: no state, so each pair can be asked for by itself.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def _mix_bits(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shift_right(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """A shift to the right that brings in zeros; int64's own brings in the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
