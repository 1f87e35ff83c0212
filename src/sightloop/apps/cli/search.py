"""The command `sightloop search`: images of an index by text, image, words and filters."""

from __future__ import annotations

import tempfile
import webbrowser
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from sightloop.apps.cli.checks import check_checkpoint, check_texts
from sightloop.apps.cli.common import model_for
from sightloop.apps.cli.options import RuntimeOptions, check_at_least, integer
from sightloop.apps.cli.output import Column, OutputTable, print_message
from sightloop.errors import UsageError

if TYPE_CHECKING:
    from sightloop.search.hits import Hits
    from sightloop.search.index import Query

_RUNTIME = RuntimeOptions()
_QUERY_GROUP = Group("Query", sort_key=5)
_OUTPUT_GROUP = Group("Output", sort_key=10)


@Parameter(name="*", group=_QUERY_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class QueryOptions:
    """What is searched for beside the texts."""

    image: Annotated[Path | None, Parameter(metavar="FILE")] = None
    """An image to find others like it; with a text, both are blended."""

    like: Annotated[str | None, Parameter(metavar="ID")] = None
    """An image of the index, by its id, in place of --image."""

    blend: float = 0.5
    """Share of the text where there is an image too: 0 the image alone, 1 the text alone."""

    words: str | None = None
    """Words that captions, labels or texts of the image hold; with a text, both rankings are fused."""

    without: Annotated[str | None, Parameter(metavar="TEXT")] = None
    """What the images should not show; "a beach without people" says the same."""

    where: Annotated[list[str] | None, Parameter(metavar="FILTER", negative=())] = None
    """Filters, all of which must hold: 'width>1000' 'label=cat' 'time>=2024-05' 'caption~dog' 'not path~holidays'."""

    queries: Annotated[Path | None, Parameter(metavar="FILE")] = None
    """Further texts, one a line, each searched on its own."""

    k: Annotated[int, Parameter(name=["-k", "--top"], converter=integer)] = 20
    """Greatest number of hits of each query."""

    rerank: Annotated[int, Parameter(metavar="K", converter=integer)] = 0
    """Score the best K hits again by image-text matching (ITM). Default: off."""

    cut: Annotated[float | None, Parameter(metavar="RATE")] = None
    """Find nothing where the best hits may be chance: 0.1 promises at most 10 % false finds for queries like the
    background texts. What it refuses wrongly is printed. By ITM with --rerank, else by ITC. Default: off."""

    background: Annotated[Path | None, Parameter(metavar="FILE")] = None
    """Background texts for --cut, one a line, 500 or more. Default: the captions of the index."""


@Parameter(name="*", group=_OUTPUT_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class PageOptions:
    """Where the hits are shown."""

    out: Annotated[Path | None, Parameter(metavar="PAGE.html")] = None
    """Write the hits as a page with thumbnails inside."""

    open: Annotated[bool, Parameter(negative=(), show_default=False)] = False
    """Open the page in the browser."""


_QUERY, _PAGE = QueryOptions(), PageOptions()


def search(
    index: Annotated[str, Parameter(name="INDEX")],
    /,
    *texts: Annotated[str, Parameter(name="TEXTS")],
    query: QueryOptions = _QUERY,
    page: PageOptions = _PAGE,
    runtime: RuntimeOptions = _RUNTIME,
) -> int:
    """Search an index by text, image, blends of both, keywords and filters; every hit says why it was found.

    Args:
        index: Folder of the index, or qdrant://host:port/collection.
        texts: One or more queries, each in quotes.
    """
    from sightloop.search.index import open_index

    searched = _all_texts(texts, query)
    queries = _queries(searched, query, page)
    if runtime.model is not None:
        check_checkpoint(runtime.model)
    runtime.check()
    opened = open_index(index)
    needs_model = any(q.text is not None or q.image is not None or q.without is not None for q in queries)
    space = opened.info.space(runtime.model if len(opened.info.spaces) > 1 else None)
    if needs_model and space.probe:
        opened.use_model(model_for("embed", runtime, runtime.model or space.model))
    opened.on_calibration = _print_calibration
    results = [opened.find(q, space.column) for q in queries]
    _show(results, page, as_json=runtime.json)
    return 0 if any(map(len, results)) else 1


def _print_calibration(done: int, total: int) -> None:
    """Says that the cut is calibrated, which happens once, and again when the index has grown by 10 %."""
    if done == 1:
        print_message(f"calibrating the cut with {total:,} background texts, once for this index ...")
    elif done % 100 == 0:
        print_message(f"  {done:,} of {total:,}")


def _all_texts(texts: tuple[str, ...], query: QueryOptions) -> list[str]:
    check_texts("TEXTS", texts)
    if query.queries is None:
        return list(texts)
    try:
        lines = query.queries.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--queries {query.queries}: cannot be read as UTF-8 text: {error}.") from error
    further = [line.strip() for line in lines if line.strip()]
    if not further:
        raise UsageError(f"--queries {query.queries}: has no query; give one a line.")
    return [*texts, *further]


def _queries(texts: list[str], query: QueryOptions, page: PageOptions) -> list[Query]:
    """The queries, checked before the index and a model are opened."""
    from sightloop.search.index import Query, parse_filters

    check_at_least("-k", query.k, 1)
    check_at_least("--rerank", query.rerank, 0)
    if query.cut is not None and not 0 < query.cut < 1:
        raise UsageError(f"--cut {query.cut:g}: must be between 0 and 1, such as 0.1.")
    if query.background is not None and query.cut is None:
        raise UsageError("--background: needs --cut.")
    if query.background is not None and not query.background.is_file():
        raise UsageError(f"--background {query.background}: no such file.")
    if not 0 <= query.blend <= 1:
        raise UsageError(f"--blend {query.blend:g}: must be from 0 to 1.")
    if query.image is not None and not query.image.is_file():
        raise UsageError(f"--image {query.image}: no such file.")
    if page.out is not None and page.out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {page.out}: the page must end in .html.")
    common = Query(
        image=query.image,
        like=query.like,
        blend=query.blend,
        words=query.words,
        without=query.without,
        where=parse_filters(query.where or ()),
        k=query.k,
        rerank=query.rerank,
        cut=query.cut,
        background=query.background,
    )
    return [replace(common, text=text).checked() for text in texts] or [common.checked()]


def _show(results: list[Hits], page: PageOptions, *, as_json: bool) -> None:
    from sightloop.search.hits import write_page

    columns = [
        Column("rank", 4, True),
        Column("score", 7, True),
        Column("name"),
        Column("why", 34),
        Column("caption"),
    ]
    table = OutputTable(columns, as_json=as_json)
    for hits in results:
        if not as_json:
            print_message(
                f"{hits.query}: {len(hits)} of {hits.total:,} images{f'; {hits.note}' if hits.note else ''}"
            )
        for hit in hits:
            if as_json:
                table.row({"query": hits.query} | hit.as_json())
                continue
            caption = hit.captions[0] if hit.captions else ""
            cells = (hit.rank, hit.score, hit.label, hit.why, caption)
            table.row({column.key: cell for column, cell in zip(columns, cells, strict=True)})
    if page.out is None and not page.open:
        return
    out = page.out or Path(tempfile.mkdtemp(prefix="sightloop-")) / "search.html"
    write_page(out, results)
    print_message(f"{out}: written.")
    if page.open:
        webbrowser.open(out.absolute().as_uri())


COMMANDS = {
    search: (
        "Examples:\n"
        "  sightloop search photos.index 'a red car' -k 12 --out cars.html\n"
        "  sightloop search photos.index 'a beach without people' --where 'width>1000' 'time>=2024-05'\n"
        "  sightloop search photos.index 'at night' --image day.jpg --blend 0.6\n"
        "  sightloop search photos.index --words 'invoice E16' --json"
    )
}
