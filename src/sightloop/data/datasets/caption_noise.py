"""Artificial caption noise of the kinds found on the web, to measure a filter with.

    mismatched   the caption of another image
    junk         machine-made alt text: IMG_2041.JPG, "click to enlarge", prices, dates
    truncated    the first words only
    generic      true of nearly every image: "image", "a photo"

The noise of a sample is a function of the seed and its key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias, get_args

import numpy as np

from sightloop.data.rng import generator
from sightloop.errors import UsageError
from sightloop.types import Sample

Noise: TypeAlias = Literal["mismatched", "junk", "truncated", "generic"]

NOISE_KINDS: tuple[Noise, ...] = get_args(Noise)
# Half of the captions are noise, most of it mismatched, which harms training most.
DEFAULT_SHARES: Mapping[Noise, float] = {"mismatched": 0.3, "junk": 0.1, "truncated": 0.05, "generic": 0.05}
_GENERIC = (
    "image",
    "a photo",
    "picture",
    "a picture of something",
    "photo of the day",
    "untitled",
    "stock image",
)
_JUNK = (
    "IMG_{n:04d}.JPG",
    "DSC{n:05d}",
    "click to enlarge",
    "{n} x {m} px",
    "free shipping on orders over ${n}",
    "posted on {d:02d}/{e:02d}/2014",
    "page {d} of {n}",
    "thumbnail {d}",
    "sale {d}% off, only ${n}.99",
    "photo-{n}-{m}.jpg",
)


def add_caption_noise(
    samples: Sequence[Sample], seed: int = 0, shares: Mapping[Noise, float] = DEFAULT_SHARES
) -> Iterator[Sample]:
    """Samples reduced to their first caption, a share of which is replaced by noise.

    `extra["noise"]` is the kind of noise ("" for none) and `extra["true"]` the original caption. Questions and regions
    are removed, because they would contradict the noise. A mismatched caption differs from the original.

    Args:
        samples: each with at least one caption.
        seed: of the noise.
        shares: share of each kind, 0..1, at most 1 in total.

    Raises:
        UsageError: unknown kinds or invalid shares.
    """
    if set(shares) - set(NOISE_KINDS) or min(shares.values(), default=0) < 0 or sum(shares.values()) > 1:
        raise UsageError(
            f"shares {dict(shares)}: kinds are {', '.join(NOISE_KINDS)}; shares are at least 0, in total at most 1."
        )
    for sample in samples:
        random = generator("noise", seed, sample.key)
        # The kind whose interval of shares has the number: 0..0.3 mismatched, 0.3..0.4 junk, ...
        number, kind = random.random(), ""
        for name in NOISE_KINDS:
            share = shares.get(name, 0.0)
            if 0 <= number < share:
                kind = name
            number -= share
        original = sample.captions[0]
        text = original if not kind else _noisy_caption(kind, original, samples, random)
        extra = {"noise": kind, "true": original}
        yield replace(sample, captions=(text,), questions=(), regions=(), extra=extra)


def _noisy_caption(kind: str, original: str, samples: Sequence[Sample], random: np.random.Generator) -> str:
    if kind == "truncated":
        words = original.split()
        return " ".join(words[: max(1, int(random.integers(1, max(2, len(words) - 1))))])
    if kind == "generic":
        return str(random.choice(_GENERIC))
    if kind == "junk":
        n, m = random.integers(1, 2000, 2).tolist()
        d, e = random.integers(1, 12, 2).tolist()
        return str(random.choice(_JUNK)).format(n=n, m=m, d=d, e=e)
    for _ in range(20):  # gives up, for sets with few different captions
        other = samples[int(random.integers(len(samples)))].captions[0]
        if other != original:
            return other
    return str(random.choice(_GENERIC))
