"""Copies: neighbors of hashes against all pairs, clusters against a graph search, copies of images and no others."""

from __future__ import annotations

import io
import tarfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from sightloop.data.copies import hash_neighbors
from sightloop.data.copies.clusters import Clusters
from sightloop.data.copies.copies import COPY_THRESHOLD, CopySet
from sightloop.data.copies.hash_neighbors import HashNeighbors
from sightloop.data.copies.image_hash import draft_hashes, draft_spectrum, spectrum
from sightloop.data.copies.look_alikes import MIN_IMAGES, look_alike_pairs, look_alike_threshold
from tests.data.copies.scenes import COPIES, encoded, scene


@pytest.mark.parametrize("radius", [0, 3, 8])
def test_the_neighbors_are_those_of_comparing_all_pairs(radius: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_neighbors, "_MIN_INDEXED", 0)
    monkeypatch.setattr(hash_neighbors, "_CANDIDATES_AT_ONCE", 64)
    rng = np.random.default_rng(radius)
    stored = rng.integers(0, 2**64, 400, dtype=np.uint64)
    # Queries: some stored hashes with 0 to 12 bits changed.
    changed = [sum(1 << int(b) for b in rng.permutation(64)[: i % 13]) for i in range(300)]
    queries = stored[:300] ^ np.array(changed, np.uint64)
    found = {
        (int(row), int(hit)): int(bits)
        for part in HashNeighbors(stored, radius).search(queries)
        for row, hit, bits in zip(*part, strict=True)
    }
    distances = np.bitwise_count(queries[:, None] ^ stored)
    expected = {(int(r), int(h)): int(distances[r, h]) for r, h in np.argwhere(distances <= radius)}
    assert found == expected
    assert len(expected) >= 300 * min(radius + 1, 13) // 13


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30))
def test_clusters_are_the_components_of_the_graph(edges: list[tuple[int, int]]) -> None:
    clusters, neighbors = Clusters(20), defaultdict[int, set[int]](set)
    for first, second in edges:
        clusters.join(first, second)
        neighbors[first].add(second)
        neighbors[second].add(first)
    components: list[list[int]] = []
    seen: set[int] = set()
    for row in range(20):
        component, waiting = set[int](), [row]
        while waiting:
            if (at := waiting.pop()) not in component:
                component.add(at)
                waiting += neighbors[at]
        if row not in seen and len(component) > 1:
            components.append(sorted(component))
        seen |= component
    assert clusters.groups() == components
    for first, second in edges:
        assert clusters.joined(np.array([first]), np.array([second]))[0]


@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_found_and_no_others(kind: str) -> None:
    originals = np.stack([spectrum(scene(seed)) for seed in range(12)])
    copies = np.stack([draft_spectrum(COPIES[kind](scene(seed))) for seed in range(6)])
    pairs = {
        (int(first), int(second))
        for found in CopySet(copies).copies_in(CopySet(originals))
        for first, second in zip(found.first, found.second, strict=True)
    }
    assert pairs == {(n, n) for n in range(6)}
    both = CopySet(np.concatenate([originals, copies]))
    within = list(both.copies(COPY_THRESHOLD))
    inside = {
        tuple(sorted((int(a), int(b))))
        for found in within
        for a, b in zip(found.first, found.second, strict=True)
    }
    inside |= {(int(rows[0]), int(row)) for rows in both.same for row in rows[1:]}
    assert inside == {(n, 12 + n) for n in range(6)}


def test_images_with_equal_spectra_are_one_group() -> None:
    same = spectrum(scene(1))
    flat = np.zeros_like(same)
    copy_set = CopySet(np.stack([same, flat, same, flat, spectrum(scene(2))]))
    assert [rows.tolist() for rows in copy_set.same] == [[0, 2]]
    assert not list(copy_set.copies())
    assert not list(CopySet(np.stack([flat, flat])).copies())


def recolored(image: Image.Image) -> Image.Image:
    """The image with the same brightness everywhere and its hues turned by half of the circle."""
    channels = np.array(image.convert("YCbCr"))
    channels[..., 1:] = 255 - channels[..., 1:]
    return Image.fromarray(channels, "YCbCr").convert("RGB")


def test_images_that_differ_in_hue_alone_are_no_copies() -> None:
    images = [scene(seed) for seed in range(8)]
    columns = zip(*(draft_hashes(encoded(image)) for image in images), strict=True)
    originals = CopySet(*map(np.stack, columns))
    for change, is_copy in (
        (recolored, False),
        (lambda image: recolored(image).transpose(Image.Transpose.ROTATE_90), False),
        (lambda image: image.transpose(Image.Transpose.ROTATE_90), True),
        (lambda image: image.convert("L"), True),
        (lambda image: ImageEnhance.Color(image).enhance(0.5), True),
        (lambda image: ImageEnhance.Brightness(image).enhance(1.25), True),
    ):
        changed = zip(*(draft_hashes(encoded(change(image))) for image in images), strict=True)
        found = CopySet(*map(np.stack, changed)).copies_in(originals)
        rows = {int(row) for copies in found for row in copies.first}
        assert rows == (set(range(8)) if is_copy else set())


def test_unrelated_vectors_are_no_look_alikes_and_planted_ones_are() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(600, 16)).astype(np.float32)
    vectors[-5:] = vectors[:5] + 0.02 * rng.normal(size=(5, 16))
    vectors[300] = np.nan  # an image that is gone
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    threshold = look_alike_threshold(vectors, Clusters(600))
    assert threshold is not None
    # Share of independent pairs on the sphere beyond it, counted: within a factor of 20 of one in a million.
    left, right = rng.normal(size=(2, 400_000, 16)).astype(np.float32)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    share = float((np.einsum("nd,nd->n", left, right) / norms >= threshold).mean())
    assert share <= 2e-5
    pairs = {(first, second) for first, second, _ in look_alike_pairs(vectors, threshold, Clusters(600))}
    assert pairs >= {(n, 595 + n) for n in range(5)}
    assert len(pairs) <= 7


@pytest.mark.parametrize("width", [8, 96])
def test_no_look_alike_is_missed(width: int) -> None:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(2500, width)).astype(np.float32)
    vectors[2000:] = vectors[:500] + rng.normal(size=(500, width)) * rng.uniform(0, 1, (500, 1))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    clusters = Clusters(2500)
    clusters.join(0, 2000)
    found = {(a, b): value for a, b, value in look_alike_pairs(vectors, 0.8, clusters)}
    cosines = vectors.astype(np.float64) @ vectors.T
    sure, maybe = (
        set(zip(*(rows.tolist() for rows in np.nonzero(np.triu(cosines, 1) >= least)), strict=True))
        for least in (0.8 + 1e-5, 0.8 - 1e-5)
    )
    assert sure - {(0, 2000)} <= set(found) <= maybe - {(0, 2000)}
    assert len(sure) > 100
    assert all(value == pytest.approx(cosines[pair], abs=1e-5) for pair, value in found.items())


def test_few_images_have_no_null() -> None:
    assert look_alike_threshold(np.eye(MIN_IMAGES - 1, dtype=np.float32), Clusters(MIN_IMAGES - 1)) is None


def test_copies_of_photographs(shared_data: Path) -> None:
    with tarfile.open(shared_data / "flickr8k" / "dev-000.tar") as tar:
        members = [member for member in tar if member.name.endswith(".jpg")][:50]
        images = [
            Image.open(io.BytesIO(file.read())) for m in members if (file := tar.extractfile(m)) is not None
        ]
        originals = CopySet(np.stack([spectrum(image.convert("RGB")) for image in images]))
        for kind, make in COPIES.items():
            copies = CopySet(np.stack([draft_spectrum(make(image.convert("RGB"))) for image in images]))
            pairs = {
                (int(first), int(second))
                for found in copies.copies_in(originals)
                for first, second in zip(found.first, found.second, strict=True)
            }
            assert all(first == second for first, second in pairs), kind
            assert len(pairs) >= 0.97 * len(images), kind
