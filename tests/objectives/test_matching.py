"""Hard negatives are drawn as said, and the same for every division of the batch; ITM is cross-entropy."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightloop.objectives.matching import IGNORED, binary_entropy, hard_negatives, itm_loss


@given(st.integers(1, 9), st.integers(0, 5), st.integers(0, 2**40), st.integers(0, 99), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_negative_is_a_negative(rows: int, more: int, seed: int, step: int, grouped: bool) -> None:
    similarity = torch.randn(rows, rows + more)
    ids = torch.arange(rows + more) // 2 if grouped else None
    drawn = hard_negatives(similarity, offset=more, seed=seed, step=step, ids=ids)
    assert drawn.shape == (rows,)
    assert drawn.dtype == torch.int64
    kinds = torch.arange(rows + more) if ids is None else ids
    for row, column in enumerate(drawn.tolist()):
        others = [c for c in range(rows + more) if kinds[c] != kinds[more + row]]
        assert column in others if others else column == IGNORED


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_any_division_of_the_batch_draws_the_same(parts: list[int], step: int) -> None:
    total = sum(parts)
    similarity = 5 * torch.randn(total, total)
    whole = hard_negatives(similarity, offset=0, seed=3, step=step)
    start, pieces = 0, []
    for part in parts:
        rows = similarity[start : start + part]
        pieces.append(hard_negatives(rows, offset=start, seed=3, step=step))
        start += part
    assert torch.equal(torch.cat(pieces), whole)


def test_draws_follow_the_weights() -> None:
    """4,000 steps: each column as often as softmax + 1e-4 without the own pair says (chi-square, 3 degrees)."""
    similarity = torch.tensor(
        [[3.0, 1.0, 0.0, 2.0, -1.0], [0.0, 9.0, 0.5, 0.5, -2.0], [1.0, 1.0, 5.0, 1.0, -9.0]]
    )
    weights = similarity.softmax(1) + 1e-4
    weights.diagonal().zero_()
    expected = 4000 * weights / weights.sum(1, keepdim=True)
    counts = torch.zeros(3, 5)
    for step in range(4000):
        counts[torch.arange(3), hard_negatives(similarity, offset=0, seed=1, step=step)] += 1
    assert counts.diagonal().sum() == 0
    chi = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum(1)
    assert (chi < 16).all()


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_is_hard_and_the_others_even(share: float) -> None:
    """4,000 rows that all look for column 1 alone: it is drawn by share + (1 - share) / 7."""
    similarity = torch.full((8, 8), -30.0)
    similarity[:, 1] = 30.0
    draws = [hard_negatives(similarity, offset=0, seed=2, step=step, share=share) for step in range(500)]
    counts = torch.stack(draws)[:, torch.arange(8) != 1].flatten().bincount(minlength=8) / 3500
    assert counts[1].item() == pytest.approx(share + (1 - share) / 7, abs=0.025)
    halves = [hard_negatives(similarity[a : a + 4], offset=a, seed=2, step=9, share=share) for a in (0, 4)]
    assert torch.equal(torch.cat(halves), draws[9])


def test_noise_is_different_for_steps_streams_rows_and_columns() -> None:
    flat = torch.zeros(64, 64)
    draws = [
        hard_negatives(flat, offset=0, seed=seed, step=step, stream=stream)
        for seed, step, stream in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]
    ]
    for i, one in enumerate(draws):
        assert len(one.unique()) > 30
        for other in draws[:i]:
            assert (one == other).float().mean() < 0.15


def test_itm() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, 1, 1, 0, 0, 0, 0, IGNORED, 0])
    got = itm_loss(logits, labels, 9)
    want = sum(-logits[i].log_softmax(0)[int(y)] for i, y in enumerate(labels) if y >= 0) / 9
    torch.testing.assert_close(got.value, want)
    torch.testing.assert_close(*(torch.autograd.grad(v, logits)[0] for v in (got.value, want)))
    said = logits.argmax(1)
    assert got.facts["accuracy"].item() == pytest.approx((said == labels).sum().item() / 9)
    assert got.facts["matched"].item() == pytest.approx((said[labels >= 0] == 1).sum().item() / 9)
    parts = [itm_loss(logits[a:b], labels[a:b], 9).value for a, b in ((0, 4), (4, 4), (4, 9))]
    torch.testing.assert_close(torch.stack(parts).sum(), got.value)


def test_chance_of_itm() -> None:
    assert itm_loss(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), 3).chance == pytest.approx(
        0.6365, abs=1e-4
    )
    assert binary_entropy(0.5) == pytest.approx(math.log(2))
    assert binary_entropy(1.0) == binary_entropy(0.0) == 0
    constant = torch.tensor([[math.log(2), 0.0]]).expand(6, 2)
    got = itm_loss(constant, torch.tensor([1, 0, 0, 0, 1, 0]), 6)
    assert got.value.item() == pytest.approx(got.chance)
