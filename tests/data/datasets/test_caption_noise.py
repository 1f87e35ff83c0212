"""Noise that is known: its shares, its seed, and that it is noise."""

from __future__ import annotations

from collections import Counter

import pytest

from sightloop.data.datasets.caption_noise import DEFAULT_SHARES, KINDS, add_caption_noise
from sightloop.data.datasets.synthetic import synthetic_world
from sightloop.errors import UsageError

SCENES = list(synthetic_world("train", 150, 1))  # rendered once


def test_shares_and_kinds() -> None:
    made = list(add_caption_noise(SCENES, 3))
    counts = Counter(sample.extra["noise"] for sample in made)
    for kind in KINDS:
        assert counts[kind] / len(made) == pytest.approx(DEFAULT_SHARES[kind], abs=0.12)
    for sample, before in zip(made, SCENES, strict=True):
        assert (sample.key, sample.image) == (before.key, before.image)
        text, own = sample.captions[0], before.captions[0]
        assert sample.extra["true"] == own
        kind = sample.extra["noise"]
        assert (text == own) == (kind == "")
        assert kind != "truncated" or (own.startswith(text) and len(text) < len(own))


def test_a_function_of_seed_and_key() -> None:
    first = [sample.captions for sample in add_caption_noise(SCENES, 0)]
    assert first == [sample.captions for sample in add_caption_noise(SCENES, 0)]
    assert first != [sample.captions for sample in add_caption_noise(SCENES, 1)]


def test_no_share_is_no_noise() -> None:
    assert [s.captions for s in add_caption_noise(SCENES, 0, {})] == [s.captions for s in SCENES]
    with pytest.raises(UsageError, match="at most 1"):
        list(add_caption_noise(SCENES, 0, {"junk": 0.9, "generic": 0.2}))
