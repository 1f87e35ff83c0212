"""LM, prefix-LM and MLM against loops over tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightloop.objectives.language import lm_loss, mlm_loss, next_token_targets

TEXTS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 4)), min_size=1, max_size=4)


@given(TEXTS)
@settings(max_examples=40, deadline=None)
def test_next_tokens(texts: list[tuple[int, int]]) -> None:
    width = max(length for length, _ in texts) + 1
    ids = torch.arange(len(texts) * width).view(len(texts), width)
    lengths, prompts = (torch.tensor(values) for values in zip(*texts, strict=True))
    wanted = [
        (r * width + i, r, int(ids[r, i + 1]))
        for r, (length, prompt) in enumerate(texts)
        for i in range(length - 1)
        if i + 1 >= prompt
    ]
    assert list(zip(*(x.tolist() for x in next_token_targets(ids, lengths, prompts)), strict=True)) == wanted
    assert torch.equal(
        next_token_targets(ids, lengths, 2).positions,
        next_token_targets(ids, lengths, lengths * 0 + 2).positions,
    )


@given(
    st.integers(0, 6), st.integers(2, 7), st.sampled_from([0.0, 0.1, 0.5]), st.booleans(), st.integers(0, 9)
)
@settings(max_examples=40, deadline=None)
def test_lm(tokens: int, words: int, smoothing: float, weighted: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, words, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(words, (tokens,), generator=generator)
    weights = torch.rand(tokens, generator=generator, dtype=torch.float64) if weighted else torch.ones(tokens)
    got = lm_loss(logits, targets, 5.0, weights=weights if weighted else None, smoothing=smoothing)
    want = logits.sum() * 0
    for row, target, weight in zip(logits, targets, weights, strict=True):
        hoped = torch.full((words,), smoothing / words, dtype=torch.float64)
        hoped[target] += 1 - smoothing
        want = want - weight * (hoped * row.log_softmax(0)).sum() / 5
    torch.testing.assert_close(got.value, want)
    torch.testing.assert_close(*(torch.autograd.grad(v, logits)[0] for v in (got.value, want)))


def test_lm_is_what_torch_calls_label_smoothing() -> None:
    logits, targets = torch.randn(7, 11), torch.randint(11, (7,))
    want = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)
    got = lm_loss(logits, targets, 7)
    torch.testing.assert_close(got.value, want)
    torch.testing.assert_close(got.facts["nll"], mlm_loss(logits, targets, 7).value)
    assert got.facts["accuracy"].item() == pytest.approx((logits.argmax(1) == targets).float().mean().item())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_chance(smoothing: float) -> None:
    targets = torch.tensor([0, 3, 3])
    got = lm_loss(torch.zeros(3, 100), targets, 3, smoothing=smoothing)
    assert got.value.item() == pytest.approx(got.chance) == pytest.approx(math.log(100))
    # BLIP's VQA: two answers of weight 0.7 and 0.3 with two and one token, one question.
    weights = torch.tensor([0.7, 0.7, 0.3])
    got = lm_loss(torch.zeros(3, 100), targets, 1, weights=weights, mass=1.7, smoothing=smoothing)
    assert got.value.item() == pytest.approx(got.chance) == pytest.approx(1.7 * math.log(100))


def test_each_texts_mean() -> None:
    ids, lengths = torch.randint(9, (3, 6)), torch.tensor([6, 3, 2])
    logits = torch.randn(3, 6, 9)
    kept = next_token_targets(ids, lengths)
    weights = 1 / (lengths - 1)[kept.rows]
    got = lm_loss(logits.flatten(0, 1)[kept.positions], kept.targets, 3, weights=weights, smoothing=0)
    each = [
        torch.nn.functional.cross_entropy(logits[r, : n - 1], ids[r, 1:n])
        for r, n in enumerate(lengths.tolist())
    ]
    torch.testing.assert_close(got.value, torch.stack(each).mean())
    assert got.chance == pytest.approx(math.log(9))


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits, targets = torch.randn(5, 9).bfloat16(), torch.randint(9, (5,))
    got = lm_loss(logits, targets, 5)
    assert got.value.dtype == torch.float32
    torch.testing.assert_close(got.value, lm_loss(logits.float(), targets, 5).value)
