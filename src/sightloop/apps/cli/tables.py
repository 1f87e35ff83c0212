"""Tables of `--out`: results of a command over many images that are written whole and resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, TypeVar

from cyclopts import Parameter

from sightloop.apps.cli.checks import ImageInputs
from sightloop.apps.cli.common import list_images, model_for, run_verb, start_reading
from sightloop.apps.cli.options import WRITE_GROUP, RuntimeOptions
from sightloop.apps.cli.output import RESUME_HINT, OutputTable, ProgressReporter
from sightloop.checkpoints.hub import weights_identity
from sightloop.types import Failed, JsonDict, JsonMapping, Pixels, Skipped

if TYPE_CHECKING:
    from sightloop.annotation.result_table import ResultTable
    from sightloop.annotation.runner import ImageReader
    from sightloop.inference.model import Model

T = TypeVar("T")

_COMMIT_EVERY = 8  # images between two commits of the journal


@Parameter(name="*", group=WRITE_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class TableOptions:
    """Where a table of results is written."""

    out: Annotated[Path | None, Parameter(metavar="FILE")] = None
    """Write a table, FILE.csv, FILE.jsonl or FILE.parquet; the same command resumes it, and adds new images. Default:
    none."""

    write: Literal["skip", "overwrite"] = "skip"
    """Of a FILE that exists: skip its images, or overwrite it."""


class ResultSink(Protocol):
    """Table of results that resumes: `annotation.result_table.ResultTable`, or one of regions.

    Attributes:
        path: Where it is written.
    """

    path: Path

    def __contains__(self, image: str) -> bool: ...
    def entry(self, image: str) -> JsonDict: ...
    def add(self, image: str, rows: Iterable[JsonMapping]) -> None: ...
    def note_skipped(self, image: str) -> None: ...
    def commit(self) -> None: ...
    def finish(self) -> object: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class TableRun:
    """A command over images with `--out`.

    Args:
        capability: Of the model.
        activity: For the progress bar: "answering".
        columns: First columns of the table.
        settings: Settings that decide the results, without the model.
        done: Whether the rows of an image that FILE has are all that is wanted; by default they are.
        videos: Whether videos are taken too.
        reader: Of a model, what preprocesses its inputs; None for the model itself.
    """

    capability: str
    activity: str
    columns: Sequence[str]
    settings: JsonMapping
    done: Callable[[list[JsonDict]], bool] = bool
    videos: bool = False
    reader: Callable[[Model], ImageReader] | None = None

    def run(
        self,
        paths: Sequence[str],
        output: TableOptions,
        runtime: RuntimeOptions,
        rows: OutputTable,
        process: Callable[[Model], tuple[Verb[T], RowMaker[T]]],
    ) -> int:
        """Applies the command to every image that FILE lacks; the exit status.

        Args:
            paths: Files, folders and globs.
            output: Where the table goes.
            runtime: Model and loading.
            rows: Standard output.
            process: Called with the loaded model, if any image needs it; returns the verb, and what makes of a result
                the rows of the table and those to print.
        """
        opener = None if output.out is None else lambda: self._open(output, runtime)
        return self.run_into(opener, paths, runtime, rows, process)

    def run_into(
        self,
        opener: Callable[[], ResultSink] | None,
        paths: Sequence[str],
        runtime: RuntimeOptions,
        rows: OutputTable,
        process: Callable[[Model], tuple[Verb[T], RowMaker[T]]],
    ) -> int:
        """`run` for another kind of table than `ResultTable`, which `opener` opens; None: rows are printed alone."""
        with ExitStack() as stack:
            table = None if opener is None else stack.enter_context(closing(opener()))
            progress = stack.enter_context(
                ProgressReporter(self.activity, rows, "" if table is None else RESUME_HINT)
            )
            inputs = self._inputs(paths, table)
            first = next((item for item in _reported(inputs, progress, table) if isinstance(item, str)), None)
            if first is None:
                if table is not None:
                    table.finish()
                return progress.status if progress.counts.total() and not progress.counts["failed"] else 1
            start_reading()
            model = model_for(self.capability, runtime)
            verb, shown = process(model)
            progress.start_clock()
            remaining = ImageInputs(paths, (), chain([first], inputs), self.videos)
            uncommitted = 0
            reader = None if self.reader is None else self.reader(model)
            note_skipped = None if table is None else table.note_skipped
            for event in run_verb(progress, runtime, model, remaining, verb, note_skipped, reader):
                written, printed = shown(event.name, event.value)
                if table is not None:
                    table.add(event.name, written)
                    uncommitted += 1
                    if uncommitted >= _COMMIT_EVERY:
                        table.commit()
                        uncommitted = 0
                for row in printed:
                    progress.row({"name": event.name, **row})
            if table is not None:
                table.finish()
                progress.message(f"{table.path}: written.")
        return progress.status

    def _open(self, output: TableOptions, runtime: RuntimeOptions) -> ResultTable:
        from sightloop.annotation.result_table import ResultTable

        assert output.out is not None
        settings = {**self.settings, "model": weights_identity(runtime.source, runtime.lora)}
        return ResultTable(output.out, output.write, settings, self.columns)

    def _inputs(self, paths: Sequence[str], table: ResultSink | None) -> Iterator[str | Skipped | Failed]:
        for item in list_images(paths, videos=self.videos):
            if table is not None and isinstance(item, str) and self._is_done(table, item):
                yield Skipped(item, "it has rows already")
            else:
                yield item

    def _is_done(self, table: ResultSink, image: str) -> bool:
        return image in table and self.done(table.entry(image)["rows"])


Verb = Callable[[list[Pixels]], Sequence[T]]
RowMaker = Callable[[str, T], tuple[Sequence[JsonMapping], Sequence[JsonMapping]]]


def _reported(
    inputs: Iterator[str | Skipped | Failed], progress: ProgressReporter, table: ResultSink | None
) -> Iterator[str | Skipped | Failed]:
    """The inputs, each event reported; a file that does not start like an image is one that failed."""
    from sightloop.annotation.inputs import not_an_image

    for item in inputs:
        if isinstance(item, str) and (reason := not_an_image(item)):
            item = Failed(item, reason)
        if not isinstance(item, str):
            progress.event(item)
            if table is not None and isinstance(item, Skipped):
                table.note_skipped(item.name)
        yield item
