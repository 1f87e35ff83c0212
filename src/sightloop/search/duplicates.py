"""Duplicates in an index or among images: their facts, and a report as text, JSON and a page side by side."""

from __future__ import annotations

import base64
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sightloop.data.atomic import atomic_write
from sightloop.data.copies.colors import CELLS, CHANNELS, SIZE
from sightloop.data.copies.duplicates import (
    KINDS,
    DuplicateCluster,
    DuplicateKind,
    Duplicates,
    ImageFacts,
    KeepDuplicate,
    find_duplicates,
)
from sightloop.data.copies.image_hash import SPECTRUM, draft_hashes, phash, pixels_digest
from sightloop.data.datasets.dataset import open_dataset
from sightloop.data.images.decode import decode
from sightloop.errors import ImageError, UsageError
from sightloop.reports import html
from sightloop.search.filters import Filter
from sightloop.search.rows import vectors_of
from sightloop.search.sources import Entry
from sightloop.search.store import Store, VectorSpace
from sightloop.types import Done, Event, Failed, Floats32, JsonDict

if TYPE_CHECKING:
    from sightloop.inference.model import Model

_THUMBNAIL = 240  # pixels
_SHOWN = 200  # clusters with images on the page
_SHOWN_IMAGES = 12  # of a cluster
_PLURALS = ("identical images", "copies", "look-alikes")  # of `KINDS`
_IN_NOTEBOOK = 8  # clusters
_EMBEDDED_AT_ONCE = 4096
_STYLE = (
    ".cluster{display:flex;flex-wrap:wrap;gap:14px;margin:8px 0 4px}.cluster figure{width:240px}"
    ".cluster img{width:240px;height:180px;object-fit:contain;background:var(--card)}"
    ".cluster .kept img{outline:3px solid var(--good)}figcaption span{display:block}"
)


def check_kinds(kinds: Sequence[str]) -> tuple[DuplicateKind, ...]:
    """The kinds in the order of `KINDS`. Raises UsageError if one is unknown, or there is none."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise UsageError(f"kinds: {', '.join(unknown) or 'none is given'}; there are {', '.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in kinds)


def hash_columns(data: bytes) -> JsonDict:
    """Columns `spectrum` (with the colors behind it) and `phash` of an index, from encoded bytes. Raises ImageError."""
    spectrum, colors = draft_hashes(data)
    return {
        "spectrum": base64.b64encode(spectrum.tobytes() + colors.tobytes()).decode(),
        "phash": int(phash(spectrum[None]).astype(np.int64)[0]),
    }


@dataclass(frozen=True, slots=True, eq=False)
class DuplicateReport:
    """Duplicates of an index or of images; prints as a table, and shows pairs in a notebook.

    Args:
        duplicates: clusters with the evidence of each pair.
        places: (root, path) of each image, by which it is read again.
        ids: of the rows of an index; () for images outside of one.
    """

    duplicates: Duplicates
    places: Sequence[tuple[str, str]] = field(repr=False)
    ids: Sequence[str] = ()

    def __len__(self) -> int:
        """Number of clusters."""
        return len(self.duplicates.clusters)

    @property
    def clusters(self) -> tuple[DuplicateCluster, ...]:
        """The clusters."""
        return self.duplicates.clusters

    @property
    def summary(self) -> str:
        """One line: how many images in how many clusters, by kind, and what was not searched."""
        counts = [sum(kind in cluster.kinds for cluster in self.clusters) for kind in KINDS]
        plurals = zip(counts, _PLURALS, strict=True)
        kinds = ", ".join(f"{count:,} with {plural}" for count, plural in plurals if count)
        inside = sum(len(cluster.images) for cluster in self.clusters)
        text = f"{len(self.duplicates.images):,} images: "
        text += f"{inside:,} in {len(self):,} clusters ({kinds})" if self.clusters else "no duplicates"
        return "; ".join([text, *self.duplicates.notes])

    def extras(self, keep: KeepDuplicate = "best") -> list[str]:
        """Names of the images to leave out, in order; see `Duplicates.extras`."""
        return [self.duplicates.images[row].name for row in sorted(self.duplicates.extras(keep))]

    def as_json(self, keep: KeepDuplicate = "best") -> Iterator[JsonDict]:
        """An object for each cluster: its images, which of them is kept, and its edges."""
        extras = self.duplicates.extras(keep)
        for number, cluster in enumerate(self.clusters, 1):
            images = [self._image_json(row, extras) for row in cluster.images]
            edges = [
                {
                    "first": self.duplicates.images[edge.first].name,
                    "second": self.duplicates.images[edge.second].name,
                    "kind": edge.kind,
                    "evidence": edge.evidence,
                    "bits": edge.bits,
                    "similarity": round(edge.similarity, 6),
                }
                for edge in cluster.edges
            ]
            yield {"cluster": number, "kinds": list(cluster.kinds), "images": images, "edges": edges}

    def _image_json(self, row: int, extras: Mapping[int, int]) -> JsonDict:
        image = self.duplicates.images[row]
        identity: JsonDict = {"id": self.ids[row]} if self.ids else {}
        size = {"width": image.width, "height": image.height, "bytes": image.file_bytes}
        return {"name": image.name} | identity | size | {"keep": row not in extras}

    def __str__(self) -> str:
        lines = [self.summary]
        for number, cluster in enumerate(self.clusters, 1):
            lines.append(f"{number}. {', '.join(cluster.kinds)}")
            lines += [f"   {self.duplicates.images[row].name}" for row in cluster.images]
        return "\n".join(lines)

    def to_html(self, keep: KeepDuplicate = "best", shown: int = _SHOWN) -> str:
        """A whole page: the clusters with their images side by side and the evidence of each pair."""
        sections = self._sections(keep, shown)
        tiles = [
            html.Tile("images", f"{len(self.duplicates.images):,}"),
            html.Tile("clusters", f"{len(self):,}"),
            html.Tile("extra images", f"{len(self.duplicates.extras(keep)):,}", f'keep "{keep}"'),
        ]
        rule = html.note(
            "Kept images have a green frame. Of identical images and copies one is kept; look-alikes are other "
            "images, and all stay. Nothing was deleted."
        )
        more = (
            html.note(f"{len(self) - shown:,} further clusters are not shown.") if len(self) > shown else ""
        )
        return html.page("Duplicates", self.summary, html.tiles(tiles), rule, *sections, more, style=_STYLE)

    def _repr_html_(self) -> str:
        style = html.Html(f"<style>{_STYLE}</style>")
        return html.join([style, html.paragraph(self.summary), *self._sections("best", _IN_NOTEBOOK)])

    def _sections(self, keep: KeepDuplicate, shown: int) -> list[html.Html]:
        clusters = self.clusters[:shown]
        rows = [row for cluster in clusters for row in cluster.images[:_SHOWN_IMAGES]]
        images = read_places([self.places[row] for row in rows])
        extras = self.duplicates.extras(keep)
        return [self._section(number, cluster, images, extras) for number, cluster in enumerate(clusters, 1)]

    def _section(
        self,
        number: int,
        cluster: DuplicateCluster,
        images: Mapping[tuple[str, str], str | bytes],
        extras: Mapping[int, int],
    ) -> html.Html:
        figures = [
            self._figure(row, images, is_kept=row not in extras) for row in cluster.images[:_SHOWN_IMAGES]
        ]
        evidence = [
            f"{self._short(edge.first)} and {self._short(edge.second)}: {edge.kind}, {edge.evidence}"
            for edge in cluster.edges
        ]
        hidden = len(cluster.images) - _SHOWN_IMAGES
        return html.section(
            f"{number}. {', '.join(cluster.kinds)}",
            html.element("div", *figures, class_="cluster"),
            html.items(evidence, 24),
            note=f"{len(cluster.images)} images{f', {hidden} not shown' if hidden > 0 else ''}",
        )

    def _figure(self, row: int, images: Mapping[tuple[str, str], str | bytes], is_kept: bool) -> html.Html:
        image, place = self.duplicates.images[row], self.places[row]
        try:
            if place not in images:
                raise ImageError(image.name, "it is gone")
            shown = html.inline_image(decode(images[place]), _THUMBNAIL * 2, image.name)
        except ImageError as error:
            shown = html.note(error.reason)
        size = f"{image.width} x {image.height}, {image.file_bytes / 1000:,.0f} kB"
        caption = (html.element("b", self._short(row)), html.element("span", size), _note_of(image.name))
        return html.element(
            "figure", shown, html.element("figcaption", *caption), class_="kept" if is_kept else ""
        )

    def _short(self, row: int) -> str:
        return Path(self.duplicates.images[row].name).name


def _note_of(name: str) -> html.Html:
    return html.element("span", os.path.dirname(name), class_="note")


def read_facts(
    entries: Iterable[Entry | Failed], workers: int = 2
) -> Iterator[Event[tuple[ImageFacts, tuple[str, str]]]]:
    """Facts and place of each image, in order, as events; images are decoded by threads at reduced size."""

    def read(entry: Entry) -> Event[tuple[ImageFacts, tuple[str, str]]]:
        try:
            facts = ImageFacts.of(
                entry.name, entry.data(), entry.mtime / 1e9 if entry.size is not None else None
            )
        except ImageError as error:
            return Failed(entry.name, error.reason)
        return Done(entry.name, (facts, (entry.root, entry.path)))

    waiting: deque[Future[Event[tuple[ImageFacts, tuple[str, str]]]] | Failed] = deque()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for entry in entries:
            waiting.append(entry if isinstance(entry, Failed) else pool.submit(read, entry))
            if len(waiting) >= 4 * max(1, workers):
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())


def _result(
    item: Future[Event[tuple[ImageFacts, tuple[str, str]]]] | Failed,
) -> Event[tuple[ImageFacts, tuple[str, str]]]:
    return item if isinstance(item, Failed) else item.result()


def report_duplicates(
    facts: Sequence[ImageFacts],
    places: Sequence[tuple[str, str]],
    *,
    kinds: Sequence[DuplicateKind] = KINDS,
    vectors: Floats32 | None = None,
    ids: Sequence[str] = (),
) -> DuplicateReport:
    """Duplicates among images.

    Args:
        facts: of n images.
        places: (root, path) of each, by which it is read again.
        kinds: to search.
        vectors: unit vectors `[n, d]`, for look-alikes.
        ids: of the rows of an index.
    """

    def digests(rows: Sequence[int]) -> dict[int, bytes]:
        images = read_places([places[row] for row in rows])
        by_row: dict[int, bytes] = {}
        for row in rows:
            try:
                by_row[row] = pixels_digest(decode(images[places[row]]))
            except (ImageError, KeyError):  # gone since: the pair stays a copy
                continue
        return by_row

    duplicates = find_duplicates(facts, kinds=kinds, vectors=vectors, pixels=digests)
    return DuplicateReport(duplicates, places, ids)


def embed_places(model: Model, places: Sequence[tuple[str, str]]) -> Floats32:
    """Unit vectors `[n, d]` of images, of several vectors an image the first; NaN for one that is gone meanwhile."""
    vectors: list[Floats32 | None] = []
    for start in range(0, len(places), _EMBEDDED_AT_ONCE):
        part = places[start : start + _EMBEDDED_AT_ONCE]
        images = read_places(part)
        sources = [images.get(place, b"") for place in part]
        pixels = list(model.read(sources))
        readable = [item for item in pixels if not isinstance(item, ImageError)]
        rows = iter(model.embed_images(readable)) if readable else iter(())
        vectors += [None if isinstance(item, ImageError) else next(rows) for item in pixels]
    width = next((vector.shape[-1] for vector in vectors if vector is not None), 1)
    gone = np.full(width, np.nan, np.float32)
    return np.stack([gone if vector is None else vector.reshape(-1, width)[0] for vector in vectors])


def duplicates_in_index(
    store: Store, space: VectorSpace | None, where: Filter, kinds: Sequence[DuplicateKind]
) -> DuplicateReport:
    """Duplicates among the rows of an index that a filter takes.

    Rows without a spectrum, whose images were not indexed from files, are compared by content and vectors alone. Scenes
    of videos are left out.
    """
    columns = ["id", "root", "path", "sha256", "size", "mtime", "width", "height", "spectrum"]
    own = [space.column] if space is not None and "look-alike" in kinds else []
    facts: list[ImageFacts] = []
    places: list[tuple[str, str]] = []
    ids: list[str] = []
    vectors: list[Floats32] = []
    for part in store.scan([*columns, "start", *own], where):
        part = part.filter(part["start"].is_null())
        if own and space is not None:
            vectors.append(vectors_of(part[space.column], space.width)[:, : space.dim])
        for row in part.select(columns).to_pylist():
            facts.append(_facts_of_row(row))
            places.append((row["root"] or "", row["path"] or ""))
            ids.append(row["id"])
    if not facts:
        return DuplicateReport(Duplicates((), ()), ())
    order = sorted(range(len(facts)), key=lambda i: (facts[i].name, ids[i]))
    return report_duplicates(
        [facts[i] for i in order],
        [places[i] for i in order],
        kinds=kinds,
        vectors=np.concatenate(vectors)[order] if vectors else None,
        ids=[ids[i] for i in order],
    )


def _facts_of_row(row: JsonDict) -> ImageFacts:
    # Rows without hashes, and those without colors, have zeros, which resemble nothing and agree with every color.
    hashes = np.zeros(SPECTRUM * SPECTRUM + SIZE, np.int8)
    if row["spectrum"]:
        stored = np.frombuffer(base64.b64decode(row["spectrum"]), np.int8)[: len(hashes)]
        hashes[: len(stored)] = stored
    spectrum = hashes[:-SIZE].reshape(SPECTRUM, SPECTRUM)
    colors = hashes[-SIZE:].reshape(CELLS, CELLS, CHANNELS)
    name = os.path.join(row["root"] or "", row["path"] or "") or row["id"]
    time = row["mtime"] / 1e9 if row["mtime"] else None
    size = (row["width"] or 0, row["height"] or 0, row["size"] or 0)
    return ImageFacts(name, row["sha256"] or row["id"], *size, time, spectrum, colors)


def read_places(places: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str | bytes]:
    """Images again: paths of files, bytes from archives; each archive is read once. Those that are gone are left out.

    Args:
        places: (root, path) of each.
    """
    images: dict[tuple[str, str], str | bytes] = {}
    archives: dict[str, set[str]] = {}
    for root, path in places:
        if os.path.isfile(name := os.path.join(root, path)):
            images[root, path] = name
        elif os.path.isfile(root):
            archives.setdefault(root, set()).add(path)
    for root, wanted in archives.items():
        try:
            for sample in open_dataset(root).stream(lambda key, reason: None):
                if sample.key in wanted:
                    images[root, sample.key] = (
                        sample.image if isinstance(sample.image, bytes) else str(sample.image)
                    )
        except UsageError:
            continue
    return images


def write_report(path: Path, report: DuplicateReport, keep: KeepDuplicate) -> None:
    """Writes the page of a report, whole or not at all."""
    atomic_write(path, report.to_html(keep))


def write_extras(path: Path, report: DuplicateReport, keep: KeepDuplicate) -> int:
    """Writes the names of the images that are not kept, one a line; how many there are."""
    names = report.extras(keep)
    atomic_write(path, "".join(f"{name}\n" for name in names).encode("utf-8", "surrogateescape"))
    return len(names)
