"""Caption noise: shares, seed, and what each kind does to a caption."""

from __future__ import annotations

from collections import Counter

import pytest

from sightloop.data.datasets.caption_noise import DEFAULT_SHARES, NOISE_KINDS, add_caption_noise
from sightloop.data.datasets.synthetic import synthetic_world
from sightloop.errors import UsageError

SCENES = list(synthetic_world("train", 150, 1))  # rendered once


def test_shares_and_kinds() -> None:
    noisy = list(add_caption_noise(SCENES, 3))
    counts = Counter(sample.extra["noise"] for sample in noisy)
    for kind in NOISE_KINDS:
        assert counts[kind] / len(noisy) == pytest.approx(DEFAULT_SHARES[kind], abs=0.12)
    for sample, clean in zip(noisy, SCENES, strict=True):
        assert (sample.key, sample.image) == (clean.key, clean.image)
        text, original = sample.captions[0], clean.captions[0]
        assert sample.extra["true"] == original
        kind = sample.extra["noise"]
        assert (text == original) == (kind == "")
        assert kind != "truncated" or (original.startswith(text) and len(text) < len(original))


def test_the_noise_is_a_function_of_the_seed() -> None:
    first = [sample.captions for sample in add_caption_noise(SCENES, 0)]
    assert first == [sample.captions for sample in add_caption_noise(SCENES, 0)]
    assert first != [sample.captions for sample in add_caption_noise(SCENES, 1)]


def test_no_shares_give_no_noise() -> None:
    assert [s.captions for s in add_caption_noise(SCENES, 0, {})] == [s.captions for s in SCENES]
    with pytest.raises(UsageError, match="in total at most 1"):
        list(add_caption_noise(SCENES, 0, {"junk": 0.9, "generic": 0.2}))
