"""What people and programs see: rows on standard output; progress, causes of failure and counts on standard error."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sightloop.checkpoints import catalog
from sightloop.types import Done, Event, JsonMapping, Skipped

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.table import Table
    from rich.text import Text


def one_line(text: str) -> str:
    """Any text as one harmless line: what does not print (line ends, controls, bytes that are not UTF-8) is escaped."""
    return "".join(c if c.isprintable() or c == "\u200d" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python carries a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def say(text: str) -> None:
    """One message line on standard error."""
    print(one_line(text), file=sys.stderr, flush=True)


def say_bundled(job: str) -> None:
    """Says that the bundled model works, as no other was named, and which one does a job of `catalog.JOBS` better."""
    entry = catalog.CATALOG[0]
    say(
        f"using the bundled model {entry.name} ({entry.parameters:.0f} M weights, small and often wrong); "
        f"-m {catalog.recommended_for(job).name} is much better"
    )


def complain(program: str, error: object) -> None:
    """Why the program ends, on standard error; each line of the message is one line."""
    for line in str(error).splitlines() or [""]:
        say(f"{program}: {line}")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table for people. `width` in characters; None takes a share of what the others leave."""

    key: str
    width: int | None = None
    number: bool = False


class OutputTable:
    """Rows on standard output: a table where it is a terminal, tab-separated lines where it is not, JSON lines with
    `as_json`. A reader that closes standard output early raises `BrokenPipeError`, unless `go_on`: then rows end."""

    def __init__(self, columns: Sequence[Column], *, as_json: bool = False, go_on: bool = False) -> None:
        self._columns = columns
        self._json = as_json
        self._go_on = go_on
        self._closed = False
        self._headed = False
        self.console: Console | None = None  # what shows a progress on the same terminal, while it does

    def row(self, cells: JsonMapping) -> None:
        """Puts out one row. Except for JSON it has a value for each of the columns."""
        if self._closed:
            return
        try:
            if self._json:
                self._print(_json_text(cells))
            elif sys.stdout.isatty():
                self._table_row(cells)
            else:
                self._print("\t".join(_cell(cells[column.key]) for column in self._columns))
        except BrokenPipeError:
            if not self._go_on:
                raise
            self._closed = True
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)

    def _print(self, line: str) -> None:
        encoding = sys.stdout.encoding or "utf-8"
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)

    def _table_row(self, cells: JsonMapping) -> None:
        from rich.console import Console
        from rich.text import Text

        if self.console is None:
            self.console = Console()
        width = self.console.width
        if not self._headed:
            headings = [Text(column.key, style="bold") for column in self._columns]
            self.console.print(_grid(self._columns, headings, width))
            self._headed = True
        texts = [Text(_cell(cells[column.key])) for column in self._columns]
        self.console.print(_grid(self._columns, texts, width))


class Screen:
    """The output of one job. Used as a context: on leaving it, for whatever cause, the count is printed."""

    def __init__(self, what: str, rows: OutputTable, again: str = "") -> None:
        """`what`: the job, for the progress. `again`: what to tell who interrupts it about running it again."""
        self.counts: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.row = rows.row
        self._rows = rows
        self._what = what
        self._again = again
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._total: int | None = None
        self._start = self._first = time.monotonic()

    def __enter__(self) -> Screen:
        if sys.stderr.isatty():
            self._progress, self._task = _progress(self._what, redirect_stdout=sys.stdout.isatty())
            self._rows.console = self._progress.console
            self._progress.start()
        self._start = self._first = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._rows.console = None
        if kind is None or self.counts.total():
            self._say_counts(stopped=kind is not None)
        if kind is KeyboardInterrupt and self._again:
            self.say(self._again)

    @property
    def status(self) -> int:
        """The exit status: 1 where an input failed, else 0."""
        return 1 if self.counts["failed"] else 0

    def count_ahead(self, count: Callable[[], int]) -> None:
        """Counts the inputs beside the job, for the time left; only where somebody is watching."""
        if self._progress is None:
            return

        def work() -> None:
            self._total = count()

        threading.Thread(target=work, daemon=True).start()

    def drop(self, name: str, kind: str, why: str) -> None:
        """Names an image that is done, but whose result is not kept."""
        self.dropped[kind] += 1
        self._name("dropped", name, why)

    def event(self, event: Event[Any]) -> None:
        """Counts one input, and names it where it failed."""
        if isinstance(event, Done):
            self.counts["done"] += 1
        elif isinstance(event, Skipped):
            self.counts["skipped"] += 1
            if not self.counts["done"] and not self.counts["failed"]:
                self._first = time.monotonic()  # the rate is that of the images that were worked on
        else:
            self.counts["failed"] += 1
            self._name("failed", event.name, event.reason)
        if self._progress is not None and self._task is not None:
            worked = self.counts["done"] + self.counts["failed"]
            rate = worked / max(time.monotonic() - self._first, 1e-3)
            left = None if self._total is None or not worked else (self._total - self.counts.total()) / rate
            self._progress.update(
                self._task, completed=self.counts.total(), total=self._total, rate=rate, left=left
            )

    def say(self, text: str) -> None:
        """One message line on standard error, above the progress."""
        if self._progress is None:
            say(text)
        else:
            self._progress.console.print(
                one_line(text), soft_wrap=True, markup=False, highlight=False, emoji=False
            )

    def _name(self, what: str, name: str, reason: str) -> None:
        self.say(f"{what}: {name or repr(name)}: {reason}")

    def _say_counts(self, *, stopped: bool) -> None:
        total, counts = self.counts.total(), self.counts
        dropped = self.dropped.total()
        details = f" ({dropped:,} dropped: {', '.join(f'{n:,} {kind}' for kind, n in self.dropped.items())})"
        seconds = time.monotonic() - self._start
        if not total:
            self.say("No images found.")
            return
        self.say(
            f"{'Stopped early. ' if stopped else ''}{total:,} {'image' if total == 1 else 'images'}: "
            f"{counts['done']:,} done{details if dropped else ''}, {counts['skipped']:,} skipped, "
            f"{counts['failed']:,} failed, in {_clock(seconds)}."
        )


def _json_text(cells: JsonMapping) -> str:
    plain = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    text = json.dumps(cells, ensure_ascii=not plain)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a file name that is not UTF-8: JSON has an escape for its bytes
        return json.dumps(cells)
    return text


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else one_line(str(value))


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _grid(columns: Sequence[Column], texts: Sequence[Text], width: int) -> Table:
    """One row of fixed widths, so that rows can be shown as they come."""
    from rich.table import Table

    left = width - sum(column.width + 2 for column in columns if column.width)
    free = [column for column in columns if not column.width]
    grid = Table.grid(padding=(0, 2, 0, 0), expand=any(column.key != "name" for column in free))
    for column, text in zip(columns, texts, strict=True):
        share = column.width
        if (
            share is None and column is free[0] and len(free) > 1
        ):  # names take a third at most, the rest goes to texts
            share = max(8, min(40, left // 3))
        if (
            column.key == "name" and share is not None and text.cell_len > share
        ):  # the end of a name tells most
            while text.cell_len > share - 1:
                text.plain = text.plain[1:]
            text.plain = f"\u2026{text.plain}"
        justify = "right" if column.number else "left"
        grid.add_column(width=share, ratio=None if share else 1, justify=justify, overflow="fold")
    grid.add_row(*texts)
    return grid


def _progress(what: str, *, redirect_stdout: bool) -> tuple[Progress, TaskID]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        SpinnerColumn,
        Task,
        TextColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            rate, left = task.fields.get("rate"), task.fields.get("left")
            text = (
                "" if rate is None else f"{rate:.1f}/s" if rate >= 1 else f"{1 / max(rate, 1e-6):.1f} s each"
            )
            return Text(text if left is None else f"{text}, {_clock(max(left, 0))} left")

    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=redirect_stdout,
        redirect_stderr=True,
    )
    return progress, progress.add_task(what, total=None)
