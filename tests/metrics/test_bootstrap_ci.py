"""Bootstrap: intervals as wide as theory says, the same for the same seed, paired where models share samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sightloop import UsageError
from sightloop.metrics import bootstrap_ci as module
from sightloop.metrics.bootstrap_ci import bootstrap_interval, paired_bootstrap
from sightloop.metrics.captions import bleu, score_captions

VALUES = np.random.default_rng(0).normal(3, 2, 1500)


def test_the_interval_of_a_mean_is_that_of_theory() -> None:
    interval = bootstrap_interval(VALUES)
    half = 1.96 * VALUES.std() / len(VALUES) ** 0.5
    assert interval.value == pytest.approx(VALUES.mean())
    assert interval.low == pytest.approx(interval.value - half, abs=0.1 * half)
    assert interval.high == pytest.approx(interval.value + half, abs=0.1 * half)
    narrow = bootstrap_interval(VALUES, level=0.5)
    assert interval.low < narrow.low < narrow.high < interval.high


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        interval = bootstrap_interval(random.normal(0, 1, 60), resamples=300)
        held += interval.low <= 0 <= interval.high
    assert 0.88 < held / 200 < 0.99


def test_the_seed_decides_and_blocks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    values = VALUES[:80]
    first = bootstrap_interval(values, seed=5)
    assert bootstrap_interval(values, seed=5) == first
    assert bootstrap_interval(values, seed=6) != first
    monkeypatch.setattr(module, "_CHUNK", 1000)
    again = bootstrap_interval(values, seed=5)
    assert (again.low, again.high) == pytest.approx((first.low, first.high))


def test_a_pair_sees_what_single_intervals_hide() -> None:
    first = VALUES[:300]
    second = first - 0.1 + np.random.default_rng(2).normal(0, 0.2, 300)
    difference = paired_bootstrap(first, second)
    assert difference.value == pytest.approx((first - second).mean())
    assert 0.05 < difference.low < difference.value < difference.high < 0.15
    assert 0 < difference.p < 0.01
    assert bootstrap_interval(first).low < second.mean() < bootstrap_interval(first).high
    same = paired_bootstrap(first, first)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_corpus_bleu_has_an_interval() -> None:
    texts = [f"a dog number {i % 7} runs over the grass" for i in range(40)]
    references = [[f"a dog number {i % 5} runs on the green grass"] for i in range(40)]
    scored = score_captions(texts, references)

    def fourth(means: Any) -> Any:
        return bleu(means * len(texts))[:, 3]

    interval = bootstrap_interval(scored.bleu_counts, fourth, resamples=200)
    assert interval.value == pytest.approx(scored.corpus["BLEU-4"])
    assert interval.low < interval.value < interval.high
    assert paired_bootstrap(scored.bleu_counts, scored.bleu_counts, fourth, resamples=50).value == 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: bootstrap_interval([]), "at least one"),
        (lambda: bootstrap_interval([1.0, np.nan]), "finite"),
        (lambda: bootstrap_interval(np.zeros((3, 2))), "statistic"),
        (lambda: bootstrap_interval([1.0], level=95), "level=95"),
        (lambda: paired_bootstrap([1.0], [1.0, 2.0]), "same samples"),
    ],
)
def test_what_does_not_fit_is_said(call: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        call()
