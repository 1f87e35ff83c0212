from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from sightloop.annotation import runner
from sightloop.errors import ImageError
from sightloop.types import Done, Failed, Pixels, Skipped


class FakeReader:
    """Reads names that start with "good" and fails on others; pulls `ahead` sources ahead, as workers do."""

    def __init__(self, ahead: int = 3) -> None:
        self.ahead = ahead
        self.sessions = 0
        self.closed = 0

    def read(self, sources, *, workers=2, isolate=True, limits=None) -> Iterator[Pixels | ImageError]:
        self.sessions += 1
        window: list[str] = []
        try:
            for source in sources:
                window.append(source)
                if len(window) > self.ahead:
                    yield self.read_one(window.pop(0))
            for source in window:
                yield self.read_one(source)
        finally:
            self.closed += 1

    def read_one(self, name: str) -> Pixels | ImageError:
        good = name.startswith("good")
        return Pixels(name, np.zeros((3, 1, 1), np.uint8), (1, 1)) if good else ImageError(name, "torn")


INPUTS = [
    Skipped("s0", "has one"),
    "good1",
    "bad2",
    Failed("f3", "not there"),
    "good4",
    Skipped("s5", "has one"),
    "good6",
    "good7",
    "bad8",
    Skipped("s9", "has one"),
]


def names(images: list[Pixels]) -> list[str]:
    return [image.name.upper() for image in images]


@pytest.mark.parametrize("ahead", [0, 1, 3, 100])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 50])
def test_one_event_for_each_input_in_order(ahead: int, batch_size: int) -> None:
    sizes: list[int] = []

    def verb(images: list[Pixels]) -> list[str]:
        sizes.append(len(images))
        return names(images)

    events = list(runner.run([FakeReader(ahead)], INPUTS, verb, runner.LoaderConfig(batch_size)))
    expected = [
        item
        if not isinstance(item, str)
        else Done(item, item.upper())
        if item.startswith("good")
        else Failed(item, "torn")
        for item in INPUTS
    ]
    assert events == expected
    assert sum(sizes) == 4
    assert max(sizes) <= batch_size


def test_skipped_inputs_start_no_reader() -> None:
    reader = FakeReader()
    inputs = [Skipped(str(i), "") for i in range(100)]
    assert list(runner.run([reader], inputs, names, runner.LoaderConfig())) == inputs
    assert reader.sessions == 0


def test_long_runs_of_skipped_inputs_do_not_fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_MAX_WAITING", 10)
    reader = FakeReader(ahead=100)
    pulled = 0

    def inputs() -> Iterator[str | Skipped]:
        nonlocal pulled
        for i in range(1000):
            pulled = i
            yield "good" if i % 500 == 0 else Skipped(str(i), "")

    first = next(runner.run([reader], inputs(), names, runner.LoaderConfig()))
    assert first == Done("good", "GOOD")
    assert pulled == 10
    events = list(runner.run([reader], inputs(), names, runner.LoaderConfig()))
    assert len(events) == 1000
    assert [i for i, event in enumerate(events) if isinstance(event, Done)] == [0, 500]


def test_two_readers_stay_in_step() -> None:
    class SelectiveReader(FakeReader):
        def read_one(self, name: str) -> Pixels | ImageError:
            return ImageError(name, "not for me") if name == "good4" else super().read_one(name)

    batches: list[tuple[list[str], list[str]]] = []

    def verb(first: list[Pixels], second: list[Pixels]) -> list[str]:
        batches.append((names(first), names(second)))
        return names(first)

    events = list(runner.run([FakeReader(2), SelectiveReader(7)], INPUTS, verb, runner.LoaderConfig(2)))
    assert [event.name for event in events] == [i if isinstance(i, str) else i.name for i in INPUTS]
    assert events[4] == Failed("good4", "not for me")
    assert all(first == second for first, second in batches)


def test_errors_of_the_verb_are_raised_and_end_the_reading() -> None:
    def verb(images: list[Pixels]) -> list[str]:
        raise MemoryError("too large")

    reader = FakeReader()
    with pytest.raises(MemoryError):
        list(runner.run([reader], INPUTS, verb, runner.LoaderConfig(2)))
    assert reader.closed == 1


def test_closing_ends_the_reading() -> None:
    reader = FakeReader()
    events = runner.run([reader], INPUTS, names, runner.LoaderConfig(1))
    next(events)
    next(events)
    events.close()
    assert reader.closed == 1


def test_a_verb_must_return_one_value_for_each_image() -> None:
    with pytest.raises(RuntimeError, match="1 values for 2"):
        list(runner.run([FakeReader()], ["good1", "good2"], lambda images: ["x"], runner.LoaderConfig()))
