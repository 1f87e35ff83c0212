"""Batch sizes: every item once and in order, halves where memory runs out, growth by what was measured."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightloop.errors import UsageError
from sightloop.tasks import batch_size
from sightloop.tasks.batch_size import BatchSizer


@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 40))
def test_halves_give_the_same_in_order(count: int, size: int, fits: int) -> None:
    sizes: list[int] = []

    def call(items: Sequence[int]) -> list[int]:
        sizes.append(len(items))
        if len(items) > fits:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return [2 * item for item in items]

    sizer, done = BatchSizer(size), list[int]()
    while len(done) < count:
        done += sizer.run(call, range(len(done), min(count, len(done) + sizer.size)))
    assert done == [2 * item for item in range(count)]
    # What did not fit is tried once per halving, not at every batch.
    assert sum(tried > fits for tried in sizes) <= max(1, size).bit_length()


def test_one_item_that_does_not_fit_and_other_errors_are_raised() -> None:
    def call(_: Sequence[int]) -> list[int]:
        raise MemoryError

    with pytest.raises(MemoryError):
        BatchSizer(4).run(call, [1, 2, 3])

    def broken(_: Sequence[int]) -> list[int]:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        BatchSizer(4).run(broken, [1, 2, 3])


class Machine:
    """A machine whose batches take `each` bytes an item beside what is there already."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int, each: int) -> None:
        self.free, self.each, self.peak = free, each, 0
        monkeypatch.setattr(batch_size, "free_memory", lambda device: self.free)
        monkeypatch.setattr(batch_size, "used_memory", lambda device: 1000)
        monkeypatch.setattr(batch_size, "peak_memory", lambda device: self.peak)
        monkeypatch.setattr(batch_size, "forget_peak", lambda device: setattr(self, "peak", 1000))

    def call(self, items: Sequence[int]) -> list[int]:
        self.peak = 1000 + self.each * len(items)
        return list(items)


@pytest.mark.parametrize(("free", "largest"), [(10**9, 64), (3200, 16), (400, 2), (199, 1)])
def test_auto_grows_to_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch, free: int, largest: int) -> None:
    machine = Machine(monkeypatch, free, 100)
    sizer = BatchSizer("auto")
    sizes = [len(sizer.run(machine.call, range(sizer.size))) for _ in range(12)]
    assert sizes[0] == 1
    assert sizes == sorted(sizes)
    assert sizes[-1] == largest


def test_a_run_within_a_run_does_not_grow_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 10**9, 1)
    sizer = BatchSizer("auto")
    sizer.run(lambda items: sizer.run(machine.call, items), [1])
    assert sizer.size == 2


def test_a_last_batch_that_is_not_full_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 10**9, 1)
    sizer = BatchSizer("auto")
    for count in (1, 2, 3):
        sizer.run(machine.call, range(count))
    assert sizer.size == 4


def test_auto_without_measures_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "free_memory", lambda device: None)
    assert BatchSizer("auto").size == 8


def test_this_machine_is_measured() -> None:
    free, used = batch_size.free_memory(None), batch_size.used_memory(None)
    if free is None or used is None:
        pytest.skip("this system does not tell its memory")
    batch_size.forget_peak(None)
    held = bytearray(32 << 20)
    del held
    peak = batch_size.peak_memory(None)
    assert peak is not None
    assert peak >= batch_size.used_memory(None) - (1 << 20)  # type: ignore[operator]


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        BatchSizer(0)
