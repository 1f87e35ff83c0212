from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from sightloop.annotation import runner
from sightloop.errors import ImageError
from sightloop.types import Done, Failed, Pixels, Skipped


class Shelf:
    """Reads "good…" and refuses the rest; looks `ahead` sources ahead, as workers do."""

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
                    yield self.one(window.pop(0))
            for source in window:
                yield self.one(source)
        finally:
            self.closed += 1

    def one(self, name: str) -> Pixels | ImageError:
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


def names(pictures: list[Pixels]) -> list[str]:
    return [picture.name.upper() for picture in pictures]


@pytest.mark.parametrize("ahead", [0, 1, 3, 100])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 50])
def test_one_event_for_each_input_in_order(ahead: int, batch_size: int) -> None:
    sizes: list[int] = []

    def verb(pictures: list[Pixels]) -> list[str]:
        sizes.append(len(pictures))
        return names(pictures)

    events = list(runner.run([Shelf(ahead)], INPUTS, verb, runner.LoaderConfig(batch_size)))
    wanted = [
        item
        if not isinstance(item, str)
        else Done(item, item.upper())
        if item.startswith("good")
        else Failed(item, "torn")
        for item in INPUTS
    ]
    assert events == wanted
    assert sum(sizes) == 4
    assert max(sizes) <= batch_size


def test_nothing_is_read_where_nothing_is_wanted() -> None:
    shelf = Shelf()
    inputs = [Skipped(str(i), "") for i in range(100)]
    assert list(runner.run([shelf], inputs, names, runner.LoaderConfig())) == inputs
    assert shelf.sessions == 0


def test_long_runs_of_skips_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_MOST_WAITING", 10)
    shelf = Shelf(ahead=100)
    taken = 0

    def inputs() -> Iterator[str | Skipped]:
        nonlocal taken
        for i in range(1000):
            taken = i
            yield "good" if i % 500 == 0 else Skipped(str(i), "")

    first = next(runner.run([shelf], inputs(), names, runner.LoaderConfig()))
    assert first == Done("good", "GOOD")
    assert taken == 10
    events = list(runner.run([shelf], inputs(), names, runner.LoaderConfig()))
    assert len(events) == 1000
    assert [i for i, event in enumerate(events) if isinstance(event, Done)] == [0, 500]


def test_two_readers_stay_side_by_side() -> None:
    class Picky(Shelf):
        def one(self, name: str) -> Pixels | ImageError:
            return ImageError(name, "not for me") if name == "good4" else super().one(name)

    seen: list[tuple[list[str], list[str]]] = []

    def verb(mine: list[Pixels], theirs: list[Pixels]) -> list[str]:
        seen.append((names(mine), names(theirs)))
        return names(mine)

    events = list(runner.run([Shelf(2), Picky(7)], INPUTS, verb, runner.LoaderConfig(2)))
    assert [event.name for event in events] == [i if isinstance(i, str) else i.name for i in INPUTS]
    assert events[4] == Failed("good4", "not for me")
    assert all(mine == theirs for mine, theirs in seen)


def test_errors_of_the_verb_come_through_and_end_the_reading() -> None:
    def verb(pictures: list[Pixels]) -> list[str]:
        raise MemoryError("too large")

    shelf = Shelf()
    with pytest.raises(MemoryError):
        list(runner.run([shelf], INPUTS, verb, runner.LoaderConfig(2)))
    assert shelf.closed == 1


def test_closing_ends_the_reading() -> None:
    shelf = Shelf()
    events = runner.run([shelf], INPUTS, names, runner.LoaderConfig(1))
    next(events)
    next(events)
    events.close()
    assert shelf.closed == 1


def test_a_verb_must_give_one_value_a_picture() -> None:
    with pytest.raises(RuntimeError, match="1 values for 2"):
        list(runner.run([Shelf()], ["good1", "good2"], lambda pictures: ["x"], runner.LoaderConfig()))
