"""The command `sightloop duplicates`: identical images, copies and look-alikes of an index or of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from sightloop.apps.cli.checks import check_capability, check_checkpoint
from sightloop.apps.cli.common import model_for
from sightloop.apps.cli.options import RuntimeOptions
from sightloop.apps.cli.output import Column, OutputTable, ProgressReporter, print_message
from sightloop.errors import UsageError
from sightloop.types import Done

if TYPE_CHECKING:
    from sightloop.search.duplicates import DuplicateReport
    from sightloop.search.index import Index

_RUNTIME = RuntimeOptions()


@Parameter(name="*", group=Group("Duplicates", sort_key=5))
@dataclass(frozen=True, slots=True, kw_only=True)
class DuplicateOptions:
    """What is searched, and what is written."""

    kinds: Annotated[str | None, Parameter(metavar="A,B,...")] = None
    """identical, copy, look-alike. Default: all; look-alikes of images that are no index need --model."""

    where: Annotated[list[str] | None, Parameter(metavar="FILTER", negative=())] = None
    """Of an index: filters, all of which must hold, as of `sightloop search`."""

    keep: Literal["best", "oldest", "first"] | None = None
    """Which image of identical ones and copies to keep: best: the most pixels, then the most bytes, then the oldest;
    oldest; first by name. Default: best."""

    extras: Annotated[Path | None, Parameter(name="--list", metavar="FILE")] = None
    """Write the names of the images that are not kept, one a line. Nothing is deleted."""

    out: Annotated[Path | None, Parameter(metavar="PAGE.html")] = None
    """Write a page with the images of each cluster side by side."""


_OPTIONS = DuplicateOptions()


def duplicates(
    *images: Annotated[
        str,
        Parameter(
            name="INDEX|IMAGES",
            required=True,
            help="An index; or folders (searched recursively), image files, globs and datasets.",
        ),
    ],
    options: DuplicateOptions = _OPTIONS,
    runtime: RuntimeOptions = _RUNTIME,
) -> int:
    """Find duplicates: identical images, copies (re-encoded, resized, cropped, mirrored, turned), look-alikes.

    Identical images have the same bytes or the same pixels. Copies have perceptual hashes (pHash) within 8 of 64 bits
    in one of 8 orientations, and the same frequencies through a fitted crop. Look-alikes are other images whose vectors
    are closer than unrelated ones come once in a million pairs.
    """
    from sightloop.search.duplicates import check_kinds
    from sightloop.search.index import is_index

    kinds = check_kinds([kind.strip() for kind in (options.kinds or "identical,copy,look-alike").split(",")])
    _check(images, options, runtime, is_index=any(map(is_index, images)))
    if is_index(images[0]):
        from sightloop.search.index import open_index

        opened: Index = open_index(images[0])
        report = opened.duplicates(kinds, where=options.where or (), model=runtime.model)
        status = 0
    else:
        if runtime.model is None and options.kinds is None:
            kinds = tuple(kind for kind in kinds if kind != "look-alike")
        report, status = _of_images(images, kinds, runtime)
    _show(report, options, as_json=runtime.json)
    return status


def _check(
    images: tuple[str, ...], options: DuplicateOptions, runtime: RuntimeOptions, *, is_index: bool
) -> None:
    runtime.check()
    if is_index and len(images) > 1:
        raise UsageError("INDEX: name one index alone, or images that are no index.")
    if options.where and not is_index:
        raise UsageError("--where: needs an index; make one with `sightloop index`.")
    if "look-alike" in (options.kinds or "") and not is_index and runtime.model is None:
        raise UsageError(
            "--kinds look-alike: needs the vectors of a model: name one with --model, or an index."
        )
    if runtime.model is not None and not is_index:
        check_checkpoint(runtime.model)
        check_capability(runtime.model, "embed")
    if options.out is not None and options.out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {options.out}: the page must end in .html.")


def _of_images(
    images: tuple[str, ...], kinds: tuple[str, ...], runtime: RuntimeOptions
) -> tuple[DuplicateReport, int]:
    """The duplicates of images that are no index, and the exit status."""
    from sightloop.search.duplicates import check_kinds, embed_places, read_facts, report_duplicates
    from sightloop.search.sources import list_entries

    model = model_for("embed", runtime) if "look-alike" in kinds else None
    with ProgressReporter("reading", OutputTable([])) as progress:
        progress.count_ahead(lambda: sum(1 for _ in list_entries(images)))
        facts, places = [], []
        for event in read_facts(list_entries(images), runtime.workers):
            progress.event(event)
            if isinstance(event, Done):
                facts.append(event.value[0])
                places.append(event.value[1])
    vectors = None
    if model is not None and facts:
        print_message(f"embedding {len(facts):,} images ...")
        vectors = embed_places(model, places)
    report = report_duplicates(facts, places, kinds=check_kinds(kinds), vectors=vectors)
    return report, progress.status


def _show(report: DuplicateReport, options: DuplicateOptions, *, as_json: bool) -> None:
    from sightloop.search.duplicates import write_extras, write_report

    keep = options.keep or "best"
    columns = [
        Column("cluster", 7, True),
        Column("keep", 4),
        Column("size", 11),
        Column("name"),
        Column("why"),
    ]
    table = OutputTable(columns, as_json=as_json)
    for cluster in report.as_json(keep):
        if as_json:
            table.row(cluster)
            continue
        why = {edge["second"]: f"{edge['kind']}: {edge['evidence']}" for edge in reversed(cluster["edges"])}
        for image in cluster["images"]:
            table.row(
                {
                    "cluster": cluster["cluster"],
                    "keep": "yes" if image["keep"] else "no",
                    "size": f"{image['width']}x{image['height']}",
                    "name": image["name"],
                    "why": why.get(image["name"], ""),
                }
            )
    print_message(report.summary)
    if options.extras is not None:
        count = write_extras(options.extras, report, keep)
        print_message(f"{options.extras}: {count:,} images that are not kept ({keep}); nothing was deleted.")
    if options.out is not None:
        write_report(options.out, report, keep)
        print_message(f"{options.out}: written.")


COMMANDS = {
    duplicates: (
        "Examples:\n"
        "  sightloop duplicates photos --out duplicates.html\n"
        "  sightloop duplicates photos --keep best --list extras.txt\n"
        "  sightloop duplicates photos.index --kinds copy,look-alike --json"
    )
}
