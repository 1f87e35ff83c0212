"""Batch sizes: every item once and in order, halves where memory runs out, growth by what was measured."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightloop.data.batch_size import BatchSizer, ProcessMemory
from sightloop.errors import UsageError


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
    """Memory of a machine whose batches take `each` bytes an item beside what is there already."""

    default_size = 8
    largest_size = 64

    def __init__(self, free: int | None, each: int) -> None:
        self.available, self.each, self.highest = free, each, 0

    def call(self, items: Sequence[int]) -> list[int]:
        self.highest = 1000 + self.each * len(items)
        return list(items)

    def free(self) -> int | None:
        return self.available

    def used(self) -> int | None:
        return 1000

    def peak(self) -> int | None:
        return self.highest

    def forget_peak(self) -> None:
        self.highest = 1000

    def release(self) -> None:
        """Nothing is kept."""


@pytest.mark.parametrize(("free", "largest"), [(10**9, 64), (3200, 16), (400, 2), (199, 1)])
def test_auto_grows_to_half_of_what_is_free(free: int, largest: int) -> None:
    machine = Machine(free, 100)
    sizer = BatchSizer("auto", machine)
    sizes = [len(sizer.run(machine.call, range(sizer.size))) for _ in range(12)]
    assert sizes[0] == 1
    assert sizes == sorted(sizes)
    assert sizes[-1] == largest


def test_a_run_within_a_run_does_not_grow_twice() -> None:
    machine = Machine(10**9, 1)
    sizer = BatchSizer("auto", machine)
    sizer.run(lambda items: sizer.run(machine.call, items), [1])
    assert sizer.size == 2


def test_a_last_batch_that_is_not_full_says_nothing() -> None:
    machine = Machine(10**9, 1)
    sizer = BatchSizer("auto", machine)
    for count in (1, 2, 3):
        sizer.run(machine.call, range(count))
    assert sizer.size == 4


def test_auto_without_measures_is_the_default() -> None:
    assert BatchSizer("auto", Machine(None, 1)).size == 8


def test_this_machine_is_measured() -> None:
    memory = ProcessMemory()
    if memory.free() is None or memory.used() is None:
        pytest.skip("this system does not tell its memory")
    memory.forget_peak()
    peak, used = memory.peak(), memory.used()
    assert peak is not None
    assert used is not None
    assert peak >= used - (16 << 20)


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        BatchSizer(0)
