"""A training run on the terminal: every term's curve against its chance, figures, captions, and warnings above all.

Where standard output is no terminal: a line every hundredth of the run, and one for each thing that happens.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from sightloop.apps.cli.output import Column, OutputTable, one_line, say
from sightloop.training.events import (
    Calibrated,
    CheckpointSaved,
    Evaluated,
    RunEnded,
    RunEvent,
    RunStarted,
    SampleSkipped,
    StepDone,
    WarningRaised,
    to_json,
)

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

_BLOCKS, _ASCII = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588", "_.,-=+*#"
_REFRESH_SECONDS = 0.25
_QUIET_SECONDS = 60.0
_MOST_SKIPPED = 20
_AT_CHANCE = 0.005  # of chance: so near counts as there


def show_training(events: Iterable[RunEvent], *, json: bool = False) -> int:
    """Shows a run until it ends and returns the exit status, 0. json: each event as a line on standard output.

    What `events` raises passes through; who interrupts is told where the run goes on. A reader that closes standard
    output early does not stop the training.
    """
    view: _View = _Json() if json else _Terminal() if sys.stdout.isatty() else _Plain()
    state = _State()
    try:
        with view:
            for event in events:
                state.see(event)
                view.show(event, state)
    except KeyboardInterrupt:
        say(state.stopped())
        raise
    finally:
        if isinstance(events, Generator):  # its files are closed now and not at some later collection
            events.close()
    return 0


class History:
    """The course of a value in at most `size` means, however many values there are: when full, neighbours merge."""

    def __init__(self, size: int = 512) -> None:
        self._size = size
        self._each = 1
        self._means: list[float] = []
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        """Adds the next value; what is no number leaves no trace."""
        if value - value != 0:  # nan and infinity
            return
        self._sum += value
        self._count += 1
        if self._count < self._each:
            return
        self._means.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._means) == self._size:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means = [(a + b) / 2 for a, b in pairs]
            self._each *= 2

    def means(self, count: int) -> list[float]:
        """The whole course in at most `count` means; few values are not stretched."""
        known = [*self._means, *([self._sum / self._count] if self._count else [])]
        if len(known) <= count:
            return known
        cuts = [round(i * len(known) / count) for i in range(count + 1)]
        return [sum(known[a:b]) / (b - a) for a, b in pairwise(cuts)]


class _State:
    """What is known of the run so far."""

    def __init__(self) -> None:
        self.began: RunStarted | None = None
        self.last: StepDone | None = None
        self.evaluated: Evaluated | None = None
        self.saved: int | None = None
        self.skipped = 0
        self.curves: dict[str, History] = {}
        self._start = time.monotonic()
        self._recent: list[StepDone] = []

    def see(self, event: RunEvent) -> None:
        match event:
            case RunStarted():
                self.began, self._start = event, time.monotonic()
                self.saved = event.first_step or None
            case StepDone():
                self.last = event
                self._recent = [*self._recent[-49:], event]
                for term in event.chances:
                    if term in event.values:
                        self.curves.setdefault(term, History()).add(event.values[term])
            case Evaluated():
                self.evaluated = event
            case CheckpointSaved():
                self.saved = event.step
            case SampleSkipped():
                self.skipped += 1
            case Calibrated() | WarningRaised() | RunEnded():
                pass

    def mean(self, name: str) -> float:
        """Of the last steps: single ones jump."""
        values = [event.values[name] for event in self._recent[-20:] if name in event.values]
        return sum(values) / len(values)

    def speed(self) -> str:
        seconds = sum(event.seconds for event in self._recent)
        return f"{sum(event.samples for event in self._recent) / seconds:,.0f} samples/s" if seconds else ""

    def left(self) -> str:
        """By the clock, so that evaluations and checkpoints count."""
        if self.began is None or self.last is None:
            return ""
        done = self.last.step - self.began.first_step
        seconds = (time.monotonic() - self._start) / max(1, done) * (self.began.steps - self.last.step)
        return f"{_clock(seconds)} left" if done > 0 and seconds > 0 else ""

    def progress(self) -> str:
        """The line above the curves."""
        if self.began is None:
            return "starting"
        step = self.last.step if self.last else self.began.first_step
        words = [f"{self.began.recipe}", f"step {step:,}/{self.began.steps:,}"]
        if self.last is not None:
            words += [f"epoch {self.last.epoch:.2f}", self.speed(), self.left()]
        return " \u00b7 ".join(word for word in words if word)

    def stopped(self) -> str:
        """What to tell who interrupts."""
        step = self.last.step if self.last else 0
        where = "from the start" if self.saved is None else f"after step {self.saved:,}, its last checkpoint"
        return f"Stopped in step {step:,}. The same command again goes on {where}."


class _View(Protocol):
    def __enter__(self) -> object: ...

    def __exit__(self, *error: object) -> None: ...

    def show(self, event: RunEvent, state: _State) -> None: ...


class _Json:
    """One JSON object a line, as in metrics.jsonl."""

    def __init__(self) -> None:
        self._rows = OutputTable((), as_json=True, go_on=True)

    def __enter__(self) -> _Json:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, event: RunEvent, state: _State) -> None:
        self._rows.row(to_json(event))


class _Plain:
    """Lines on standard output; warnings and skipped samples on standard error."""

    def __init__(self) -> None:
        self._rows = OutputTable([Column("line")], go_on=True)
        self._next = 0
        self._said = time.monotonic()

    def __enter__(self) -> _Plain:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, event: RunEvent, state: _State) -> None:
        if isinstance(event, StepDone):
            steps = state.began.steps if state.began else 100
            if self._due(event.step, steps):
                self._line(_step_line(event, state))
                self._next = event.step + max(1, steps // 100)
                self._said = time.monotonic()
        elif isinstance(event, WarningRaised):
            say(_warning(event))
        elif isinstance(event, SampleSkipped):
            if said := _skipped(event, state):
                say(said)
        else:
            for line in _happened(event):
                self._line(line)

    def _due(self, step: int, steps: int) -> bool:
        return step >= min(self._next, steps) or time.monotonic() - self._said > _QUIET_SECONDS

    def _line(self, text: str) -> None:
        self._rows.row({"line": text})


class _Terminal:
    """An image of the run that stays in its place; what happens scrolls by above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console: Console = Console(highlight=False)
        self._levels = _BLOCKS if self._console.encoding.startswith("utf") else _ASCII
        self._live: Live = Live(console=self._console, auto_refresh=False)
        self._drawn = 0.0

    def __enter__(self) -> _Terminal:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def show(self, event: RunEvent, state: _State) -> None:
        if isinstance(event, WarningRaised):
            self._above(_warning(event), "green" if event.over else "bold red")
        elif isinstance(event, SampleSkipped):
            if said := _skipped(event, state):
                self._above(said, "yellow")
        elif isinstance(event, Evaluated):
            self._above(_figures(event), "green")  # the captions are in the image
        elif not isinstance(event, StepDone | CheckpointSaved):
            for line in _happened(event):
                self._above(line, "")
        # Not at every step: fast runs take hundreds in a second.
        if not isinstance(event, StepDone) or time.monotonic() - self._drawn > _REFRESH_SECONDS:
            self._live.update(self._picture(state), refresh=True)
            self._drawn = time.monotonic()

    def _above(self, text: str, style: str) -> None:
        from rich.text import Text

        self._console.print(Text(one_line(text), style=style))

    def _picture(self, state: _State) -> Group:
        from rich.console import Group
        from rich.text import Text

        lines = [Text(one_line(state.progress()), style="bold", overflow="ellipsis", no_wrap=True)]
        if state.last is not None:
            width = max(10, min(100, self._console.width - 40))
            for term, curve in state.curves.items():
                chance = state.last.chances.get(term, 0.0)
                line = Text(f"{one_line(term):>8.8} {state.mean(term):9.4g}  ", no_wrap=True)
                line.append_text(_sparkline(curve.means(width), chance, self._levels))
                lines.append(line.append(f"  chance {chance:.4g}", style="dim"))
            lines.append(Text(one_line(_facts(state.last)), style="dim", overflow="ellipsis", no_wrap=True))
        for key, text in state.evaluated.texts if state.evaluated else ():
            line = Text(f"  {one_line(key)}  ", style="dim", overflow="ellipsis", no_wrap=True)
            lines.append(line.append(one_line(text), style="not dim"))
        return Group(*lines)


def _sparkline(values: list[float], chance: float, levels: str) -> Text:
    """Bars between the lowest value and chance or the highest; red where nothing was learned."""
    from rich.text import Text

    drawn = Text()
    low, high = min([*values, chance]), max([*values, chance])
    for value in values:
        level = round((value - low) / (high - low) * (len(levels) - 1)) if high > low else len(levels) - 1
        there = value >= chance - _AT_CHANCE * abs(chance)
        drawn.append(levels[level], style="red" if there else "cyan")
    return drawn


def _facts(event: StepDone) -> str:
    facts = [f"{name} {value:.3g}" for name, value in event.values.items() if name not in event.chances]
    return " \u00b7 ".join([f"learning rate {event.lr:.3g}", *facts])


def _step_line(event: StepDone, state: _State) -> str:
    steps = f"/{state.began.steps:,}" if state.began else ""
    terms = [f"{term} {state.mean(term):.4g} (chance {event.chances[term]:.4g})" for term in state.curves]
    words = [f"step {event.step:,}{steps}", *terms, f"lr {event.lr:.3g}", state.speed(), state.left()]
    return "  ".join(word for word in words if word)


def _happened(event: RunEvent) -> list[str]:
    """Lines for what is neither a step nor a warning."""
    match event:
        case RunStarted():
            frozen = event.parameters - event.trainable
            weights = f"{event.parameters:,} weights" + (f" ({frozen:,} frozen)" if frozen else "")
            goes_on = f", going on after step {event.first_step:,}" if event.first_step else ""
            sizes = f"{event.samples:,} samples, batch {event.batch:,}, {event.steps:,} steps"
            return [f"{event.recipe}: {sizes}, {weights}{goes_on}"]
        case Evaluated():
            return [_figures(event), *(f"  {key}: {text}" for key, text in event.texts)]
        case Calibrated():
            return [event.summary()]
        case CheckpointSaved():
            return [f"saved {event.folder}"]
        case RunEnded():
            model = "" if event.folder is None else f" The model: {event.folder}"
            return [f"Finished {event.step:,} steps in {_clock(event.seconds)}.{model}"]
        case _:
            return []


def _warning(event: WarningRaised) -> str:
    return f"{'' if event.over else 'WARNING, '}step {event.step:,}: {event.text}"


def _figures(event: Evaluated) -> str:
    figures = ", ".join(f"{name} {value:.4g}" for name, value in event.values.items())
    return f"evaluation, step {event.step:,}: {figures}"


def _skipped(event: SampleSkipped, state: _State) -> str:
    if state.skipped > _MOST_SKIPPED:
        return ""
    more = " (further ones are in metrics.jsonl)" if state.skipped == _MOST_SKIPPED else ""
    return f"skipped: {event.key}: {event.reason}{more}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    )
