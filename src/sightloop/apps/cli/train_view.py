"""A training run on the terminal: loss curves with their chance level, metrics, generated captions, warnings.

If standard output is not a terminal: one line for every hundredth of the run, and one for each other event.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from sightloop.apps.cli.output import Column, OutputTable, one_line, print_message
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
_REFRESH_SECONDS = 0.25  # between two frames on a terminal
_QUIET_SECONDS = 60.0  # at most, between two lines elsewhere
_MAX_SKIPPED_LINES = 20
_CHANCE_MARGIN = 0.005  # relative; a loss this close to chance counts as at chance


def show_training(events: Iterable[RunEvent], *, json: bool = False) -> int:
    """Shows a run until it ends.

    A reader that closes standard output early does not stop the training. After Ctrl-C the step at which the run is
    resumed is printed, and `KeyboardInterrupt` is raised again. Errors of the run pass through.

    Args:
        events: The events of a run, as `sightloop.train` yields them.
        json: Print each event as one JSON object per line instead.

    Returns:
        The exit status, 0.
    """
    view: _View = _JsonView() if json else _TerminalView() if sys.stdout.isatty() else _PlainView()
    state = _ViewState()
    try:
        with view:
            for event in events:
                state.update(event)
                view.show(event, state)
    except KeyboardInterrupt:
        print_message(state.interrupt_message())
        raise
    finally:
        if isinstance(events, Generator):  # close the files of the run now, not when it is garbage collected
            events.close()
    return 0


class History:
    """A curve in bounded memory: means of equally long stretches of all values.

    With `size` 4, the values 1 2 3 4 5 6 are kept as 1 2 3 4 -> (1.5 3.5) -> 1.5 3.5 5.5.

    Args:
        size: Number of means at which neighbors are merged.
    """

    def __init__(self, size: int = 512) -> None:
        self._size = size
        self._values_per_mean = 1
        self._means: list[float] = []
        self._sum, self._count = 0.0, 0  # of the values that do not make a whole mean yet

    def add(self, value: float) -> None:
        """Adds the next value. NaN and infinity are ignored."""
        if value - value != 0:
            return
        self._sum += value
        self._count += 1
        if self._count < self._values_per_mean:
            return
        self._means.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._means) == self._size:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means = [(a + b) / 2 for a, b in pairs]
            self._values_per_mean *= 2

    def means(self, count: int) -> list[float]:
        """The whole curve in at most `count` means; a shorter one is not stretched."""
        means = [*self._means, *([self._sum / self._count] if self._count else [])]
        if len(means) <= count:
            return means
        cuts = [round(i * len(means) / count) for i in range(count + 1)]
        return [sum(means[a:b]) / (b - a) for a, b in pairwise(cuts)]


class _ViewState:
    """What the views know of the run so far."""

    def __init__(self) -> None:
        self.started: RunStarted | None = None
        self.last_step: StepDone | None = None
        self.evaluated: Evaluated | None = None
        self.saved_step: int | None = None
        self.skipped = 0
        self.curves: dict[str, History] = {}  # loss term -> its values
        self.chances: dict[str, float] = {}  # loss term -> its latest chance level; a batch may lack a term
        self._latest: dict[str, list[float]] = {}  # loss term -> its last 20 values
        self._start = time.monotonic()
        self._recent: list[StepDone] = []  # at most 50

    def update(self, event: RunEvent) -> None:
        match event:
            case RunStarted():
                self.started, self._start = event, time.monotonic()
                self.saved_step = event.first_step or None
            case StepDone():
                self.last_step = event
                self._recent = [*self._recent[-49:], event]
                self.chances |= event.chances
                for term in event.chances:
                    if term in event.values:
                        self._latest[term] = [*self._latest.get(term, [])[-19:], event.values[term]]
                        self.curves.setdefault(term, History()).add(event.values[term])
            case Evaluated():
                self.evaluated = event
            case CheckpointSaved():
                self.saved_step = event.step
            case SampleSkipped():
                self.skipped += 1
            case Calibrated() | WarningRaised() | RunEnded():
                pass

    def mean(self, name: str) -> float:
        """Mean of a value over the last 20 steps that have it, because single steps are noisy."""
        values = self._latest.get(name, [])
        return sum(values) / len(values) if values else float("nan")

    def throughput(self) -> str:
        seconds = sum(event.seconds for event in self._recent)
        return f"{sum(event.samples for event in self._recent) / seconds:,.0f} samples/s" if seconds else ""

    def remaining(self) -> str:
        """Remaining time by the clock, so that evaluations and checkpoints count."""
        if self.started is None or self.last_step is None:
            return ""
        done = self.last_step.step - self.started.first_step
        seconds = (time.monotonic() - self._start) / max(1, done) * (self.started.steps - self.last_step.step)
        return f"{_duration(seconds)} left" if done > 0 and seconds > 0 else ""

    def headline(self) -> str:
        """The line above the curves: recipe, step, epoch, throughput, remaining time."""
        if self.started is None:
            return "starting"
        step = self.last_step.step if self.last_step else self.started.first_step
        parts = [f"{self.started.recipe}", f"step {step:,}/{self.started.steps:,}"]
        if self.last_step is not None:
            parts += [f"epoch {self.last_step.epoch:.2f}", self.throughput(), self.remaining()]
        return " \u00b7 ".join(part for part in parts if part)

    def interrupt_message(self) -> str:
        step = self.last_step.step if self.last_step else 0
        checkpoint = (
            "from the start"
            if self.saved_step is None
            else f"after step {self.saved_step:,}, its last checkpoint"
        )
        return f"Stopped in step {step:,}. The same command resumes {checkpoint}."


class _View(Protocol):
    """A context manager that shows the events of a run."""

    def __enter__(self) -> object: ...

    def __exit__(self, *error: object) -> None: ...

    def show(self, event: RunEvent, state: _ViewState) -> None: ...


class _JsonView:
    """One JSON object per line, as in metrics.jsonl."""

    def __init__(self) -> None:
        self._rows = OutputTable((), as_json=True, ignore_closed_pipe=True)

    def __enter__(self) -> _JsonView:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, event: RunEvent, state: _ViewState) -> None:
        self._rows.row(to_json(event))


class _PlainView:
    """Lines on standard output; warnings and skipped samples on standard error."""

    def __init__(self) -> None:
        self._rows = OutputTable([Column("line")], ignore_closed_pipe=True)
        self._next_step = 0
        self._last_print = time.monotonic()

    def __enter__(self) -> _PlainView:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, event: RunEvent, state: _ViewState) -> None:
        if isinstance(event, StepDone):
            steps = state.started.steps if state.started else 100
            if self._is_due(event.step, steps):
                self._print(_step_line(event, state))
                self._next_step = event.step + max(1, steps // 100)
                self._last_print = time.monotonic()
        elif isinstance(event, WarningRaised):
            print_message(_warning_line(event))
        elif isinstance(event, SampleSkipped):
            if line := _skipped_line(event, state):
                print_message(line)
        else:
            for line in _event_lines(event):
                self._print(line)

    def _is_due(self, step: int, steps: int) -> bool:
        """At every hundredth of the run, at the last step, and after a minute without a line."""
        return step >= min(self._next_step, steps) or time.monotonic() - self._last_print > _QUIET_SECONDS

    def _print(self, text: str) -> None:
        self._rows.row({"line": text})


class _TerminalView:
    """A frame with curves and metrics that is redrawn in place; other events scroll above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console: Console = Console(highlight=False)
        self._levels = _BLOCKS if self._console.encoding.startswith("utf") else _ASCII
        self._live: Live = Live(console=self._console, auto_refresh=False)
        self._last_draw = 0.0

    def __enter__(self) -> _TerminalView:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def show(self, event: RunEvent, state: _ViewState) -> None:
        if isinstance(event, WarningRaised):
            self._print_above(_warning_line(event), "green" if event.over else "bold red")
        elif isinstance(event, SampleSkipped):
            if line := _skipped_line(event, state):
                self._print_above(line, "yellow")
        elif isinstance(event, Evaluated):
            self._print_above(_metrics_line(event), "green")  # its captions are part of the frame
        elif not isinstance(event, StepDone | CheckpointSaved):
            for line in _event_lines(event):
                self._print_above(line, "")
        # Fast runs make hundreds of steps per second: redraw four times per second.
        if not isinstance(event, StepDone) or time.monotonic() - self._last_draw > _REFRESH_SECONDS:
            self._live.update(self._frame(state), refresh=True)
            self._last_draw = time.monotonic()

    def _print_above(self, text: str, style: str) -> None:
        from rich.text import Text

        self._console.print(Text(one_line(text), style=style))

    def _frame(self, state: _ViewState) -> Group:
        from rich.console import Group
        from rich.text import Text

        lines = [Text(one_line(state.headline()), style="bold", overflow="ellipsis", no_wrap=True)]
        if state.last_step is not None:
            width = max(10, min(100, self._console.width - 40))
            for term, curve in state.curves.items():
                chance = state.chances.get(term, 0.0)
                line = Text(f"{one_line(term):>8.8} {state.mean(term):9.4g}  ", no_wrap=True)
                line.append_text(_sparkline(curve.means(width), chance, self._levels))
                lines.append(line.append(f"  chance {chance:.4g}", style="dim"))
            details = one_line(_details(state.last_step))
            lines.append(Text(details, style="dim", overflow="ellipsis", no_wrap=True))
        for key, text in state.evaluated.texts if state.evaluated else ():
            line = Text(f"  {one_line(key)}  ", style="dim", overflow="ellipsis", no_wrap=True)
            lines.append(line.append(one_line(text), style="not dim"))
        return Group(*lines)


def _sparkline(values: list[float], chance: float, levels: str) -> Text:
    """A curve as one character per value, red where the loss is at or above chance.

    Args:
        values: The curve.
        chance: Value of the loss if nothing was learned; within the range of the bars.
        levels: Characters from the lowest to the highest value.
    """
    from rich.text import Text

    line = Text()
    low, high = min([*values, chance]), max([*values, chance])
    for value in values:
        level = round((value - low) / (high - low) * (len(levels) - 1)) if high > low else len(levels) - 1
        at_chance = value >= chance - _CHANCE_MARGIN * abs(chance)
        line.append(levels[level], style="red" if at_chance else "cyan")
    return line


def _details(event: StepDone) -> str:
    """Learning rate, and the values that are not loss terms."""
    values = [f"{name} {value:.3g}" for name, value in event.values.items() if name not in event.chances]
    return " \u00b7 ".join([f"learning rate {event.lr:.3g}", *values])


def _step_line(event: StepDone, state: _ViewState) -> str:
    steps = f"/{state.started.steps:,}" if state.started else ""
    terms = [f"{term} {state.mean(term):.4g} (chance {state.chances[term]:.4g})" for term in state.curves]
    parts = [
        f"step {event.step:,}{steps}",
        *terms,
        f"lr {event.lr:.3g}",
        state.throughput(),
        state.remaining(),
    ]
    return "  ".join(part for part in parts if part)


def _event_lines(event: RunEvent) -> list[str]:
    """The lines of an event that is neither a step nor a warning."""
    match event:
        case RunStarted():
            frozen = event.parameters - event.trainable
            weights = f"{event.parameters:,} weights" + (f" ({frozen:,} frozen)" if frozen else "")
            resumed = f", resuming after step {event.first_step:,}" if event.first_step else ""
            sizes = f"{event.samples:,} samples, batch {event.batch:,}, {event.steps:,} steps"
            return [f"{event.recipe}: {sizes}, {weights}{resumed}"]
        case Evaluated():
            return [_metrics_line(event), *(f"  {key}: {text}" for key, text in event.texts)]
        case Calibrated():
            return [event.summary()]
        case CheckpointSaved():
            return [f"saved {event.folder}"]
        case RunEnded():
            model = "" if event.folder is None else f" The model: {event.folder}"
            return [f"Finished {event.step:,} steps in {_duration(event.seconds)}.{model}"]
        case _:
            return []


def _warning_line(event: WarningRaised) -> str:
    return f"{'' if event.over else 'WARNING, '}step {event.step:,}: {event.text}"


def _metrics_line(event: Evaluated) -> str:
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in event.values.items())
    return f"evaluation, step {event.step:,}: {metrics}"


def _skipped_line(event: SampleSkipped, state: _ViewState) -> str:
    """Empty after the first 20 samples, to keep the output readable."""
    if state.skipped > _MAX_SKIPPED_LINES:
        return ""
    more = " (further ones are in metrics.jsonl)" if state.skipped == _MAX_SKIPPED_LINES else ""
    return f"skipped: {event.key}: {event.reason}{more}"


def _duration(seconds: float) -> str:
    """12.3 -> "12 s", 200 -> "3 min 20 s", 8000 -> "2 h 13 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    )
