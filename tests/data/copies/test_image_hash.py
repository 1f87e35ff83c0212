"""Spectra and pHashes: of orientations and crops as of the images themselves, of symmetric and flat images."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from sightloop.data.copies import image_hash
from sightloop.data.copies.image_hash import (
    ORIENTATIONS,
    WINDOWS,
    draft_spectrum,
    oriented,
    phash,
    phash_oriented,
    pixels_digest,
    spectrum,
    unit_vectors,
    window_vectors,
)
from tests.data.copies.scenes import encoded, scene


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """What `oriented` says in words, done to pixels."""
    if orientation & 4:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    if orientation & 1:
        image = ImageOps.mirror(image)
    return ImageOps.flip(image) if orientation & 2 else image


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, ORIENTATIONS - 1))
def test_the_spectrum_of_a_turned_image_is_the_turned_spectrum(seed: int, orientation: int) -> None:
    image = scene(seed)
    own, other = spectrum(image)[None], spectrum(turned(image, orientation))[None]
    assert np.abs(oriented(own, orientation).astype(int) - other).max() <= 1  # of 127: rounding
    bits = np.bitwise_count(phash_oriented(own)[0, orientation] ^ phash(other)[0])
    assert bits <= 3  # of 64: coefficients at the median; copies are those within 8


@pytest.mark.parametrize("window", [WINDOWS[1], WINDOWS[12], WINDOWS[30], WINDOWS[60]])
def test_a_window_of_the_spectrum_is_the_spectrum_of_the_crop(
    window: tuple[float, float, float, float],
) -> None:
    image = scene(3, 400)
    top, bottom, left, right = (round(edge * 400) for edge in window)
    crop = image.crop((left, top, right, bottom))
    through = window_vectors(spectrum(image)[None], np.array([window]))
    assert float(through[0] @ unit_vectors(spectrum(crop)[None])[0]) > 0.98
    bits = np.bitwise_count(phash(spectrum(image)[None], window) ^ phash(spectrum(crop)[None]))
    assert bits[0] <= 4


def test_the_windows_lie_in_the_image_and_differ() -> None:
    edges = np.array(WINDOWS)
    assert edges.min() >= 0
    assert edges.max() <= 1 + 1e-12
    assert len(set(WINDOWS)) == len(WINDOWS)
    assert WINDOWS[0] == image_hash.FULL


def test_the_hash_has_64_bits_that_differ_between_images() -> None:
    hashes = phash(np.stack([spectrum(scene(seed)) for seed in range(40)]))
    distances = np.bitwise_count(hashes[:, None] ^ hashes)[np.triu_indices(40, 1)]
    assert 26 < distances.mean() < 38
    assert distances.min() > 8


def test_noise_does_not_set_the_bits_of_a_symmetric_image() -> None:
    side = np.abs(np.arange(128) - 63.5)
    rings = (np.hypot(side[:, None], side) // 16 % 2 * 200).astype(np.uint8)
    noisy = (rings + np.random.default_rng(0).integers(0, 4, rings.shape)).astype(np.uint8)
    hashes = phash(np.stack([spectrum(Image.fromarray(values)) for values in (rings, noisy)]))
    assert np.bitwise_count(hashes[0] ^ hashes[1]) <= 8


def test_a_flat_image_has_no_spectrum() -> None:
    assert not spectrum(Image.new("RGB", (50, 50), (200, 200, 200))).any()


def test_a_jpeg_decoded_at_reduced_size_has_the_same_hash() -> None:
    data = encoded(scene(5, 600), "JPEG", quality=90)
    whole = spectrum(scene(5, 600))
    assert np.bitwise_count(phash(draft_spectrum(data)[None]) ^ phash(whole[None]))[0] <= 2


def test_digests_are_of_pixels_and_size() -> None:
    image = scene(1)
    assert pixels_digest(image) == pixels_digest(Image.open(io.BytesIO(encoded(image, "BMP"))))
    black = pixels_digest(Image.new("RGB", (4, 9))), pixels_digest(Image.new("RGB", (9, 4)))
    assert black[0] != black[1]
