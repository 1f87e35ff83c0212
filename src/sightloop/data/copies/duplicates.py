"""Duplicates in a set of images: three kinds, each with its evidence, and clusters of them.

* identical: the same bytes (SHA-256), or the same pixels in another file.
* copy: re-encoded, resized, recolored, cropped, mirrored or turned (see `copies`).
* look-alike: another image that a model cannot tell apart: a cosine that unrelated pairs reach once in a million.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sightloop.data.copies import image_hash
from sightloop.data.copies.clusters import Clusters
from sightloop.data.copies.colors import CELLS, CHANNELS
from sightloop.data.copies.copies import COPY_THRESHOLD, Copies, CopySet
from sightloop.data.copies.look_alikes import look_alike_pairs, look_alike_threshold
from sightloop.data.images.decode import upright_size
from sightloop.types import Floats32, Integers

DuplicateKind: TypeAlias = Literal["identical", "copy", "look-alike"]
KINDS: tuple[DuplicateKind, ...] = ("identical", "copy", "look-alike")
KeepDuplicate: TypeAlias = Literal["best", "oldest", "first"]
# Rows -> digests of their pixels (`image_hash.pixels_digest`), without those that cannot be read.
PixelDigests: TypeAlias = "Callable[[Sequence[int]], Mapping[int, bytes]]"

# Of a pair that may have equal pixels: no bit apart, and alike but for the rounding of a draft.
_SAME_PIXELS_SIMILARITY = 0.999


@dataclass(frozen=True, slots=True, eq=False)
class ImageFacts:
    """What duplicates are found by, of one image.

    Args:
        name: for people.
        sha256: of the encoded bytes, 64 hex digits.
        width: in pixels, upright.
        height: in pixels, upright.
        file_bytes: size of the encoded image.
        time: when the file was last written, in seconds since 1970; None where unknown.
        spectrum: int8 `[16, 16]`, see `image_hash.spectrum`.
        colors: int8 `[4, 4, 2]`, see `colors.color_cells`; all 0 agrees with every color.
    """

    name: str
    sha256: str
    width: int
    height: int
    file_bytes: int
    time: float | None
    spectrum: NDArray[np.int8] = field(repr=False)
    colors: NDArray[np.int8] = field(
        repr=False, default_factory=lambda: np.zeros((CELLS, CELLS, CHANNELS), np.int8)
    )

    @classmethod
    def of(cls, name: str, data: bytes, time: float | None = None) -> ImageFacts:
        """The facts of an encoded image. Raises ImageError if it cannot be read."""
        spectrum, colors = image_hash.draft_hashes(data)
        height, width = upright_size(data, name)
        return cls(name, sha256(data).hexdigest(), width, height, len(data), time, spectrum, colors)


@dataclass(frozen=True, slots=True)
class DuplicateEdge:
    """Two images, and why they are duplicates.

    Args:
        first: row of one image.
        second: row of the other.
        kind: of duplicate.
        evidence: for people: "the same bytes (SHA-256)".
        bits: difference of the pHashes, of 64 bits; None for the same bytes and for look-alikes.
        similarity: of the frequencies for copies, cosine of the vectors for look-alikes; 1 if identical.
    """

    first: int
    second: int
    kind: DuplicateKind
    evidence: str
    bits: int | None = None
    similarity: float = 1.0


@dataclass(frozen=True, slots=True)
class DuplicateCluster:
    """Images that edges connect.

    Args:
        images: rows, ascending.
        edges: that connect them; not every pair has one.
        copies: the parts of the cluster that identical images and copies connect, look-alikes apart.
    """

    images: tuple[int, ...]
    edges: tuple[DuplicateEdge, ...]
    copies: tuple[tuple[int, ...], ...]

    @property
    def kinds(self) -> tuple[DuplicateKind, ...]:
        """The kinds of its edges, in the order of `KINDS`."""
        own = {edge.kind for edge in self.edges}
        return tuple(kind for kind in KINDS if kind in own)


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Duplicates among images.

    Args:
        images: all that were compared; rows are their indices.
        clusters: of two or more, in the order of their first images.
        threshold: cosine from which images are look-alikes; None where they were not searched.
        notes: what was not searched, and why.
    """

    images: Sequence[ImageFacts] = field(repr=False)
    clusters: tuple[DuplicateCluster, ...]
    threshold: float | None = None
    notes: tuple[str, ...] = ()

    def extras(self, keep: KeepDuplicate = "best") -> dict[int, int]:
        """Images to leave out, and the one kept in place of each: row -> row.

        Of the images of a cluster that are identical or copies one is kept. Look-alikes are other images: all stay.

        Args:
            keep: "best": the most pixels, then the most bytes (the least compression), then the oldest file;
                "oldest": the oldest file, then as for "best"; "first": the first row. Ties go to the first row.
        """
        extras: dict[int, int] = {}
        for cluster in self.clusters:
            for rows in cluster.copies:
                kept = min(rows, key=lambda row: (*self._order(row, keep), row))
                extras |= {row: kept for row in rows if row != kept}
        return extras

    def _order(self, row: int, keep: KeepDuplicate) -> tuple[float, ...]:
        image = self.images[row]
        age = float("inf") if image.time is None else image.time
        best = (-image.width * image.height, -image.file_bytes, age)
        return {"best": best, "oldest": (age, *best), "first": ()}[keep]


def find_duplicates(
    images: Sequence[ImageFacts],
    *,
    kinds: Sequence[DuplicateKind] = KINDS,
    vectors: Floats32 | None = None,
    pixels: PixelDigests | None = None,
) -> Duplicates:
    """Duplicates among images.

    Args:
        images: n images.
        kinds: to search.
        vectors: unit vectors of a model `[n, d]`, for look-alikes.
        pixels: called once with the rows that may have the pixels of another row; None leaves these pairs copies.
    """
    search = _DuplicateSearch(images)
    if "identical" in kinds or "copy" in kinds:
        search.find_equal_bytes()
    if images and ("copy" in kinds or ("identical" in kinds and pixels is not None)):
        maybe = search.find_copies(with_copies="copy" in kinds)
        if pixels is not None:
            search.note_equal_pixels(maybe, pixels)
    threshold, notes = None, []
    if "look-alike" in kinds:
        if vectors is None:
            notes.append("look-alikes were not searched: they need the vectors of a model")
        else:
            threshold = look_alike_threshold(vectors, search.clusters)
            if threshold is None:
                notes.append(
                    "look-alikes were not searched: too few images to know what unrelated ones reach"
                )
            else:
                search.find_look_alikes(vectors, threshold)
    edges = [edge for edge in search.edges if edge.kind in kinds]
    return Duplicates(images, _clusters(len(images), edges), threshold, tuple(notes))


class _DuplicateSearch:
    """Edges found so far, and the clusters that they form: pairs in one cluster are not compared again."""

    def __init__(self, images: Sequence[ImageFacts]) -> None:
        self.images = images
        self.edges: list[DuplicateEdge] = []
        self.clusters = Clusters(len(images))

    def find_equal_bytes(self) -> None:
        first: dict[str, int] = {}
        for row, image in enumerate(self.images):
            before = first.setdefault(image.sha256, row)
            if before != row:
                self._add(DuplicateEdge(before, row, "identical", "the same bytes (SHA-256)"))

    def find_copies(self, with_copies: bool) -> list[DuplicateEdge]:
        """Finds copies.

        Args:
            with_copies: note them as edges, and compare no pair that edges connect already.

        Returns:
            The edges of which both images may have the same pixels.
        """
        images = self.images
        copy_set = CopySet(
            np.stack([image.spectrum for image in images]), np.stack([image.colors for image in images])
        )

        def apart(first: Integers, second: Integers) -> NDArray[np.bool_]:
            return ~self.clusters.joined(first, second)

        maybe: list[DuplicateEdge] = []
        for edge in self._copy_edges(copy_set, apart if with_copies else None):
            image, other = self.images[edge.first], self.images[edge.second]
            is_candidate = edge.bits == 0 and edge.similarity >= _SAME_PIXELS_SIMILARITY
            if with_copies and not self._add(edge):
                continue
            if is_candidate and (image.width, image.height) == (other.width, other.height):
                maybe.append(edge)
        return maybe

    def note_equal_pixels(self, maybe: Sequence[DuplicateEdge], pixels: PixelDigests) -> None:
        """Turns the edges whose images have the same pixels into edges of identical images."""
        rows = sorted({row for edge in maybe for row in (edge.first, edge.second)})
        digests = pixels(rows) if rows else {}
        same = {
            (edge.first, edge.second)
            for edge in maybe
            if edge.first in digests and digests[edge.first] == digests.get(edge.second)
        }
        known = {(edge.first, edge.second) for edge in self.edges}
        for edge in maybe:
            if (edge.first, edge.second) in same - known:
                self._add(edge)
        self.edges = [
            replace(edge, kind="identical", evidence="the same pixels (SHA-256)", similarity=1.0)
            if edge.kind == "copy" and (edge.first, edge.second) in same
            else edge
            for edge in self.edges
        ]

    def find_look_alikes(self, vectors: Floats32, threshold: float) -> None:
        """Pairs that a model cannot tell apart, of images that are not in one cluster yet."""
        for first, second, cosine in look_alike_pairs(vectors, threshold, self.clusters):
            evidence = f"cosine {cosine:.3f}, {threshold:.3f} is once in a million"
            self._add(DuplicateEdge(first, second, "look-alike", evidence, None, cosine))

    def _copy_edges(
        self, copy_set: CopySet, wanted: Callable[[Integers, Integers], NDArray[np.bool_]] | None
    ) -> Iterator[DuplicateEdge]:
        for rows in copy_set.same:
            for row in rows[1:].tolist():
                yield _copy_edge(int(rows[0]), row, 0, 1.0, "")
        for copies in copy_set.copies(COPY_THRESHOLD, wanted=wanted):
            for first, second, bits, similarity, how in _described(copies):
                yield _copy_edge(first, second, bits, similarity, how)

    def _add(self, edge: DuplicateEdge) -> bool:
        """Notes an edge, unless its images are in one cluster already; whether it did."""
        is_new = self.clusters.join(edge.first, edge.second)
        if is_new:
            self.edges.append(edge)
        return is_new


def _copy_edge(first: int, second: int, bits: int, similarity: float, how: str) -> DuplicateEdge:
    evidence = f"pHash {bits} of 64 bits apart{how}, similarity {similarity:.3f}"
    return DuplicateEdge(first, second, "copy", evidence, bits, similarity)


def _described(copies: Copies) -> Iterator[tuple[int, int, int, float, str]]:
    """Rows, bits, similarity, and how the images differ: ", mirrored, cropped"; the surest pairs first."""
    order = np.lexsort((-copies.similarity, copies.bits))
    for i in order.tolist():
        first, second = sorted((int(copies.first[i]), int(copies.second[i])))
        turned, window = _TURNS[int(copies.orientation[i])], int(copies.window[i])
        how = f"{turned}{', cropped' if window else ''}"
        yield first, second, int(copies.bits[i]), float(copies.similarity[i]), how


_TURNS: Mapping[int, str] = {
    0: "",
    1: ", mirrored",
    2: ", upside down mirrored",
    3: ", turned 180°",
    4: ", mirrored along a diagonal",
    5: ", turned 90°",
    6: ", turned 90°",
    7: ", mirrored along a diagonal",
}


def _clusters(count: int, edges: Sequence[DuplicateEdge]) -> tuple[DuplicateCluster, ...]:
    whole, copies = Clusters(count), Clusters(count)
    for edge in edges:
        whole.join(edge.first, edge.second)
        if edge.kind != "look-alike":
            copies.join(edge.first, edge.second)
    groups = whole.groups()
    cluster_of = {row: number for number, rows in enumerate(groups) for row in rows}
    own_edges: list[list[DuplicateEdge]] = [[] for _ in groups]
    own_copies: list[list[tuple[int, ...]]] = [[] for _ in groups]
    for edge in edges:
        own_edges[cluster_of[edge.first]].append(edge)
    for rows in copies.groups():
        own_copies[cluster_of[rows[0]]].append(tuple(rows))
    return tuple(
        DuplicateCluster(tuple(rows), tuple(own), tuple(parts))
        for rows, own, parts in zip(groups, own_edges, own_copies, strict=True)
    )
