from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightloop.data.shuffle import rank_slice, shuffled_index
from sightloop.errors import UsageError

SEEDS = st.integers(0, 2**40)


@given(st.integers(1, 3000), SEEDS, st.integers(0, 1000))
def test_every_epoch_is_a_bijection(count: int, seed: int, epoch: int) -> None:
    order = shuffled_index(np.arange(count), count=count, seed=seed, epoch=epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(count))


@given(st.integers(1, 10**12), SEEDS, st.lists(st.integers(0, 10**12 - 1), min_size=1, max_size=50))
def test_large_counts_stay_inside_and_apart(count: int, seed: int, raw: list[int]) -> None:
    index = np.unique(np.array(raw, np.int64) % count)
    order = shuffled_index(index, count=count, seed=seed, epoch=3)
    assert order.min() >= 0
    assert order.max() < count
    assert len(np.unique(order)) == len(index)


def test_a_part_is_what_the_whole_says_there() -> None:
    whole = shuffled_index(np.arange(1000), count=1000, seed=1, epoch=2)
    places = np.array([[999, 0], [17, 512]])
    np.testing.assert_array_equal(shuffled_index(places, count=1000, seed=1, epoch=2), whole[places])
    assert shuffled_index(np.array([], np.int64), count=5, seed=0, epoch=0).size == 0


def test_epochs_and_seeds_differ() -> None:
    orders = {
        shuffled_index(np.arange(100), count=100, seed=seed, epoch=epoch).tobytes()
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


@pytest.mark.parametrize("count", [2, 3, 5, 10, 33])
def test_it_is_roughly_uniform(count: int) -> None:
    epochs = 1500
    orders = np.stack(
        [shuffled_index(np.arange(count), count=count, seed=7, epoch=epoch) for epoch in range(epochs)]
    )
    expected = epochs / count
    for place in range(count):  # who stands at each place, over the epochs: chi-squared, 5 sigma
        seen = np.bincount(orders[:, place], minlength=count)
        chi = ((seen - expected) ** 2 / expected).sum()
        assert chi < count - 1 + 5 * np.sqrt(2 * count) + 5
    if count > 2:  # neighbours do not stay together
        together = (np.abs(np.diff(orders, axis=1)) == 1).mean()
        assert abs(together - 2 / count) < 0.05


def test_a_large_order_looks_like_noise() -> None:
    order = shuffled_index(np.arange(20_000), count=10**9, seed=3, epoch=0) / 10**9
    assert abs(order.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.03
    assert abs(np.corrcoef(order, np.arange(20_000))[0, 1]) < 0.03


@given(st.integers(0, 40), st.integers(1, 9))
def test_the_ranks_make_up_the_batch(size: int, world: int) -> None:
    indices = np.arange(size)
    parts = [rank_slice(indices, rank, world) for rank in range(world)]
    np.testing.assert_array_equal(np.concatenate(parts), indices)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_is_out_of_range_is_refused() -> None:
    for index, count in (([5], 5), ([-1], 5), ([0], 0)):
        with pytest.raises(UsageError):
            shuffled_index(np.array(index), count=count, seed=0, epoch=0)
    with pytest.raises(UsageError):
        rank_slice(np.arange(3), 2, 2)
