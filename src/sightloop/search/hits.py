"""Hits of a search: a small table that says why each image was found, as text, JSON, Arrow and a page."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sightloop.data.atomic import atomic_write
from sightloop.data.images.decode import decode
from sightloop.errors import ImageError
from sightloop.reports import html
from sightloop.search.rows import Table
from sightloop.search.sources import read_row
from sightloop.types import JsonDict

_THUMBNAIL = 224  # pixels
_IN_NOTEBOOK = 24  # hits that a notebook shows
_STYLE = (
    ".gallery{grid-template-columns:repeat(auto-fill,minmax(190px,1fr))}figcaption b{font-weight:600}"
    "figcaption span{display:block;overflow-wrap:anywhere}"
)


@dataclass(frozen=True, slots=True)
class Hit:
    """An image that a search found.

    Args:
        rank: from 1.
        id: of its row.
        score: what the hits are ordered by: the ITC cosine, the fused rank score, or the re-ranked score.
        itc: cosine of query and image; None without a vector query.
        itm: ITM probability; None where it was not re-ranked.
        keyword_rank: rank among the keyword hits; None where it is none.
        matched: words of the query that its texts have.
        row: its columns, vectors aside.
    """

    rank: int
    id: str
    score: float
    itc: float | None = None
    itm: float | None = None
    keyword_rank: int | None = None
    matched: tuple[str, ...] = ()
    row: JsonDict = field(default_factory=JsonDict, repr=False)

    @property
    def name(self) -> str:
        """Path of the file; of an image in a dataset, the dataset's path with the key."""
        return os.path.join(self.row["root"] or "", self.row["path"] or "") or self.id

    @property
    def moment(self) -> str:
        """Where in its video a scene is, for people: "1:02.5-1:04.0"; "" for an image."""
        start, end = self.row.get("start"), self.row.get("end")
        return "" if start is None or end is None else f"{clock(start)}-{clock(end)}"

    @property
    def label(self) -> str:
        """Its name, of a scene with its moment."""
        return f"{self.name} {self.moment}".rstrip()

    @property
    def captions(self) -> list[str]:
        """Its captions."""
        return self.row["captions"] or []

    @property
    def why(self) -> str:
        """Why it was found, for people: "ITC 0.312, ITM 0.94, words #2 (red, car)"."""
        parts = [f"ITC {self.itc:.3f}"] if self.itc is not None else []
        parts += [f"ITM {self.itm:.2f}"] if self.itm is not None else []
        if self.keyword_rank is not None:
            parts.append(f"words #{self.keyword_rank} ({', '.join(self.matched)})")
        return ", ".join(parts)

    def as_json(self) -> JsonDict:
        """A JSON object; fields without a value are left out."""
        values: JsonDict = {
            "rank": self.rank,
            "id": self.id,
            "name": self.name,
            "score": round(self.score, 6),
        }
        reasons = {"itc": self.itc, "itm": self.itm, "keyword_rank": self.keyword_rank}
        values |= {name: round(value, 6) for name, value in reasons.items() if value is not None}
        values |= {"matched": list(self.matched)} if self.matched else {}
        own = (
            "root",
            "path",
            "width",
            "height",
            "time",
            "latitude",
            "longitude",
            "start",
            "end",
            "captions",
            "labels",
            "texts",
        )
        return values | {name: self.row[name] for name in own if self.row.get(name) not in (None, [], "")}

    def image(self) -> str | bytes:
        """Path of the file, or the encoded bytes from its dataset; of a scene, the frame in its middle.

        Raises:
            ImageError: it is gone.
        """
        return read_row(self.row)


@dataclass(frozen=True, slots=True)
class Hits(Sequence[Hit]):
    """Hits of one query, best first; prints as a table, and shows thumbnails in a notebook.

    Args:
        query: what was asked, for people.
        hits: best first.
        total: rows that were searched.
        note: what the reader must know, such as that nothing matches; "" for nothing.
    """

    query: str
    hits: tuple[Hit, ...]
    total: int
    note: str = ""

    def __len__(self) -> int:
        return len(self.hits)

    def __getitem__(self, index: int) -> Hit:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.hits[index]

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)

    @property
    def ids(self) -> list[str]:
        """Ids, best first."""
        return [hit.id for hit in self.hits]

    def __str__(self) -> str:
        lines = [f"{self.query}: {len(self)} of {self.total:,} images{f'; {self.note}' if self.note else ''}"]
        return "\n".join(
            [*lines, *(f"{hit.rank:>3}  {hit.score:.4f}  {hit.label}  {hit.why}" for hit in self)]
        )

    def to_arrow(self) -> Table:
        """A table with a row for each hit."""
        import pyarrow as pa

        return pa.Table.from_pylist([hit.as_json() for hit in self])

    def to_html(self) -> str:
        """A whole page with thumbnails inside."""
        return hits_page([self])

    def _repr_html_(self) -> str:
        shown = Hits(self.query, self.hits[:_IN_NOTEBOOK], self.total, self.note)
        style = "display:grid;gap:8px;grid-template-columns:repeat(auto-fill,minmax(150px,1fr))"
        heading = html.element("p", str(self).splitlines()[0])
        return html.join([heading, html.element("div", *map(_figure, shown), style=style)])


def clock(seconds: float) -> str:
    """A time of a video as players show it: 62.53 -> "1:02.5"."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    head = f"{hours}:{minutes:02}" if hours else f"{minutes}"
    return f"{head}:{rest // 10:02}.{rest % 10}"


def hits_page(results: Sequence[Hits], title: str = "") -> str:
    """A page of several queries, one section each."""
    sections = [
        html.section(
            hits.query,
            html.gallery([_figure(hit) for hit in hits]),
            note=f"{len(hits)} of {hits.total:,} images{f'; {hits.note}' if hits.note else ''}",
        )
        for hits in results
    ]
    queries = f"{len(results)} queries" if len(results) > 1 else results[0].query if results else "no query"
    return html.page(title or f"Search: {queries}", "", *sections, style=_STYLE)


def write_page(path: str | os.PathLike[str], results: Sequence[Hits]) -> None:
    """Writes `hits_page` to a file, whole or not at all."""
    atomic_write(path, hits_page(results))


def _figure(hit: Hit) -> html.Html:
    try:
        image = html.inline_image(decode(hit.image()), _THUMBNAIL, hit.name)
    except ImageError as error:
        image = html.note(error.reason)
    caption = hit.captions[0] if hit.captions else ""
    return html.figure(
        image,
        html.element("b", f"{hit.rank}. {Path(hit.name).name}"),
        html.element("span", hit.moment) if hit.moment else "",
        html.element("span", hit.why),
        html.element("span", caption) if caption else "",
        html.element("span", hit.id, class_="note"),
    )
