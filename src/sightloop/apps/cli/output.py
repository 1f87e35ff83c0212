"""Output of the command line: rows on standard output; progress, failures, notes and counts on standard error."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sightloop.apps.cli.streams import discard_stderr, discard_stdout
from sightloop.checkpoints import catalog
from sightloop.types import Done, Event, JsonMapping, Skipped

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.table import Table
    from rich.text import Text

RESUME_HINT = "Run the same command again to resume."


def one_line(text: str) -> str:
    """`text` as one printable line: line ends, control characters and bytes that are not UTF-8 are escaped."""
    return "".join(c if c.isprintable() or c == "\u200d" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    # Python decodes byte 0xff of a file name that is not UTF-8 to U+DCFF (PEP 383); show it as \xff.
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


@dataclass(slots=True)
class _Verbosity:
    """How much is printed on standard error: `level` -1 with --quiet, 0, or 1 with --verbose."""

    level: int = 0


_verbosity = _Verbosity()


def set_verbosity(level: int) -> None:
    """Sets how much is printed on standard error.

    Args:
        level: -1: errors, failures and warnings alone; 0: also progress, notes and counts; 1: also details.
    """
    _verbosity.level = level


def is_quiet() -> bool:
    """Whether progress, notes and counts are left out (--quiet)."""
    return _verbosity.level < 0


def is_interactive() -> bool:
    """Whether standard error is a terminal and progress and notes are printed on it."""
    return sys.stderr.isatty() and not is_quiet()


def is_verbose() -> bool:
    """Whether details are printed (--verbose)."""
    return _verbosity.level > 0


def print_message(text: str) -> None:
    """Prints one line on standard error; nothing with --quiet."""
    if not is_quiet():
        _print_line(text)


def print_detail(text: str) -> None:
    """Prints one line on standard error with --verbose."""
    if is_verbose():
        _print_line(text)


def print_warning(text: str) -> None:
    """Prints one line on standard error, also with --quiet."""
    _print_line(f"warning: {text}")


def print_warnings_as_messages() -> None:
    """Prints one warning of each kind, as one line without file and line number.

    Warnings that differ only in numbers and quoted texts are of one kind: texts that are cut in each batch are
    reported once.
    """
    printed: set[str] = set()

    def show(message: Warning | str, *_args: object, **_kwargs: object) -> None:
        text = " ".join(str(message).split())
        kind = re.sub(r"\d+|(['\"]).*\1", "", text)
        if kind not in printed:
            printed.add(kind)
            print_warning(text)

    warnings.showwarning = show


def print_failure(text: str) -> None:
    """Prints what could not be processed on standard error, also with --quiet."""
    _print_line(text)


def print_error(program: str, error: object) -> None:
    """Prints why the program ends on standard error, each line of the message after the program's name."""
    for line in str(error).splitlines() or [""]:
        _print_line(f"{program}: {line}")


def _print_line(text: str) -> None:
    try:
        print(one_line(text), file=sys.stderr, flush=True)
    except (OSError, ValueError):  # its reader has closed it, or its disk is full: the work continues
        discard_stderr()


@contextmanager
def say_if_slow(text: str, seconds: float = 2.0) -> Generator[None]:
    """Prints `text` if the block takes longer than this, so that a slow start is not silent."""
    timer = threading.Timer(seconds, print_message, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def print_bundled_notice(capability: str) -> None:
    """Prints that the bundled model is used because none was named, and a better one for the capability."""
    entry = catalog.CATALOG[0]
    print_message(
        f"using the bundled model {entry.name} ({entry.parameters:.0f} M weights, small and often wrong); "
        f"-m {catalog.recommended_for(capability).name} is much better"
    )


@dataclass(frozen=True, slots=True)
class Column:
    """A column of an `OutputTable`.

    Args:
        key: Heading, and key of the cell in a row.
        width: Width in characters on a terminal; None shares what the other columns leave.
        number: Align right.
    """

    key: str
    width: int | None = None
    number: bool = False


class OutputTable:
    """Rows on standard output: a table on a terminal, tab-separated lines elsewhere, JSON lines with `as_json`.

    Args:
        columns: The columns; JSON lines need none.
        as_json: Print each row as a JSON object.
        ignore_closed_pipe: If the reader of standard output closes it early, drop further rows instead of raising
            `BrokenPipeError`: for commands whose result is not the rows.
    """

    def __init__(
        self, columns: Sequence[Column], *, as_json: bool = False, ignore_closed_pipe: bool = False
    ) -> None:
        self._columns = columns
        self._json = as_json
        self._ignore_closed_pipe = ignore_closed_pipe
        self._closed = False
        self._heading_printed = False
        self.console: Console | None = None  # set by ProgressReporter while its bar is on the same terminal

    def row(self, cells: JsonMapping) -> None:
        """Prints one row. Except as JSON, `cells` has a value for every column."""
        if self._closed:
            return
        try:
            if self._json:
                self._print(_json_text(cells))
            elif sys.stdout.isatty():
                self._print_table_row(cells)
            else:
                self._print("\t".join(_cell(cells[column.key]) for column in self._columns))
        except BrokenPipeError:
            if not self._ignore_closed_pipe:
                raise
            self._closed = True
            discard_stdout()

    def _print(self, line: str) -> None:
        encoding = sys.stdout.encoding or "utf-8"
        try:
            print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
        except OSError as error:
            error.filename = error.filename or "standard output"
            raise

    def _print_table_row(self, cells: JsonMapping) -> None:
        from rich.console import Console
        from rich.text import Text

        if self.console is None:
            self.console = Console()
        width = self.console.width
        if not self._heading_printed:
            headings = [Text(column.key, style="bold") for column in self._columns]
            self.console.print(_grid(self._columns, headings, width))
            self._heading_printed = True
        texts = [Text(_cell(cells[column.key])) for column in self._columns]
        self.console.print(_grid(self._columns, texts, width))


class ProgressReporter:
    """Progress bar, failures and final counts of one command, on standard error.

    A context manager: the counts are printed on leaving it, also after an error.

    Args:
        activity: What is done, as the label of the progress bar: "captioning".
        rows: The table that shares the terminal.
        resume_hint: Printed after Ctrl-C; empty for none.
    """

    def __init__(self, activity: str, rows: OutputTable, resume_hint: str = "") -> None:
        self.counts: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()  # by reason
        self._skipped_example: dict[str, str] = {}
        self.row = rows.row
        self._rows = rows
        self._activity = activity
        self._resume_hint = resume_hint
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._total: int | None = None
        self.start_clock()

    def __enter__(self) -> ProgressReporter:
        if is_interactive():
            self._progress, self._task = _progress_bar(self._activity, redirect_stdout=sys.stdout.isatty())
            self._rows.console = self._progress.console
            self._progress.start()
        self.start_clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._rows.console = None
        if kind is None or self.counts.total():
            self._print_counts(stopped=kind is not None)
        if kind is KeyboardInterrupt and self._resume_hint:
            self.message(self._resume_hint)

    def start_clock(self) -> None:
        """Starts the clock of the rate and of the total time again, after a model is loaded."""
        self._start = self._rate_start = time.monotonic()

    @property
    def status(self) -> int:
        """Exit status: 1 if an input failed, else 0."""
        return 1 if self.counts["failed"] else 0

    def count_ahead(self, count: Callable[[], int]) -> None:
        """Counts the inputs in a thread, for the remaining time; only if a progress bar is shown."""
        if self._progress is None:
            return

        def work() -> None:
            self._total = count()

        threading.Thread(target=work, daemon=True).start()

    def drop(self, name: str, kind: str, why: str) -> None:
        """Reports an image that is done but whose result is not kept.

        Args:
            name: The image.
            kind: The count that it adds to: "empty", "looping".
            why: The reason, for the message.
        """
        self.dropped[kind] += 1
        self._report("dropped", name, why)

    def event(self, event: Event[Any]) -> None:
        """Counts one input, and reports it if it failed."""
        if isinstance(event, Done):
            self.counts["done"] += 1
        elif isinstance(event, Skipped):
            self.counts["skipped"] += 1
            self._skipped[event.reason] += 1
            self._skipped_example.setdefault(event.reason, event.name)
            if is_verbose():
                self._report("skipped", event.name, event.reason)
            # The rate is that of the images that are processed: its clock starts after the skipped ones.
            if not self.counts["done"] and not self.counts["failed"]:
                self._rate_start = time.monotonic()
        else:
            self.counts["failed"] += 1
            self._report("failed", event.name, event.reason)
        if self._progress is not None and self._task is not None:
            processed = self.counts["done"] + self.counts["failed"]
            rate = processed / max(time.monotonic() - self._rate_start, 1e-3)  # images per second
            remaining = None
            if self._total is not None and processed:
                remaining = (self._total - self.counts.total()) / rate  # seconds
            self._progress.update(
                self._task, completed=self.counts.total(), total=self._total, rate=rate, left=remaining
            )

    def message(self, text: str) -> None:
        """Prints one line on standard error, above the progress bar; nothing with --quiet."""
        if not is_quiet():
            self._print_above(text)

    def _print_above(self, text: str) -> None:
        if self._progress is None:
            print_failure(text)
        else:
            self._progress.console.print(
                one_line(text), soft_wrap=True, markup=False, highlight=False, emoji=False
            )

    def _report(self, what: str, name: str, reason: str) -> None:
        self._print_above(f"{what}: {name or repr(name)}: {reason}")

    def _print_counts(self, *, stopped: bool) -> None:
        total, counts = self.counts.total(), self.counts
        dropped = self.dropped.total()
        details = f" ({dropped:,} dropped: {', '.join(f'{n:,} {kind}' for kind, n in self.dropped.items())})"
        seconds = time.monotonic() - self._start
        if not total:
            self.message("No images found.")
            return
        for reason, count in self._skipped.items():
            if not reason.endswith("already"):  # what is done already is what a second run expects
                self.message(f"skipped: {count:,}, such as {self._skipped_example[reason]}: {reason}")
        write = self._print_above if counts["failed"] else self.message
        write(
            f"{'Stopped early. ' if stopped else ''}{total:,} {'image' if total == 1 else 'images'}: "
            f"{counts['done']:,} done{details if dropped else ''}, {counts['skipped']:,} skipped, "
            f"{counts['failed']:,} failed, in {_duration(seconds)}."
        )


def _json_text(cells: JsonMapping) -> str:
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    text = json.dumps(cells, ensure_ascii=not is_utf8)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a file name that is not UTF-8: JSON escapes its bytes as \udcff
        return json.dumps(cells)
    return text


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else one_line(str(value))


def _duration(seconds: float) -> str:
    """12.3 -> "12.3 s", 200 -> "3 min 20 s", 8000 -> "2 h 13 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _grid(columns: Sequence[Column], texts: Sequence[Text], width: int) -> Table:
    """One row with fixed column widths, so that rows can be printed one by one and still align.

    Args:
        columns: The columns.
        texts: The cell of each.
        width: Width of the terminal in characters.
    """
    from rich.table import Table

    left = width - sum(column.width + 2 for column in columns if column.width)
    flexible = [column for column in columns if not column.width]
    grid = Table.grid(padding=(0, 2, 0, 0), expand=any(column.key != "name" for column in flexible))
    for column, text in zip(columns, texts, strict=True):
        share = column.width
        # The first of several flexible columns, usually the name, takes at most a third; the texts get the rest.
        if share is None and column is flexible[0] and len(flexible) > 1:
            share = max(8, min(40, left // 3))
        # Long names lose their start: the end of a path says most ("...lidays/2024/beach.jpg").
        if column.key == "name" and share is not None and text.cell_len > share:
            while text.cell_len > share - 1:
                text.plain = text.plain[1:]
            text.plain = f"\u2026{text.plain}"
        justify = "right" if column.number else "left"
        grid.add_column(width=share, ratio=None if share else 1, justify=justify, overflow="fold")
    grid.add_row(*texts)
    return grid


def _progress_bar(activity: str, *, redirect_stdout: bool) -> tuple[Progress, TaskID]:
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
        """Images per second, and the remaining time."""

        def render(self, task: Task) -> Text:
            rate, left = task.fields.get("rate"), task.fields.get("left")
            text = (
                "" if rate is None else f"{rate:.1f}/s" if rate >= 1 else f"{1 / max(rate, 1e-6):.1f} s each"
            )
            return Text(text if left is None else f"{text}, {_duration(max(left, 0))} left")

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
    return progress, progress.add_task(activity, total=None)
