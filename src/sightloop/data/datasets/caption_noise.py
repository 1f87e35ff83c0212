"""Noise as the web has it, made on purpose: captions spoilt in known ways, so that a filter can be measured.

    mismatched   the caption of another image
    junk         alt text as machines leave it: IMG_2041.JPG, "click to enlarge", prices, dates
    truncated    the first words alone
    generic      true of nearly every image: "image", "a photo"

What happens to a sample is a function of the seed and its key.
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

KINDS: tuple[Noise, ...] = get_args(Noise)
# Half of the texts are noise, most of it of other images, which hurts most.
DEFAULT_SHARES: Mapping[Noise, float] = {"mismatched": 0.3, "junk": 0.1, "truncated": 0.05, "generic": 0.05}
_GENERIC = (
    "image",
    "a photo",
    "picture",
    "an image of something",
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
    """The samples with the first caption alone, spoilt for these shares of them; `extra["noise"]` says how ("" if not).

    Questions and regions go, as they would tell what the caption no longer says. A mismatched caption is never the
    sample's own text. Raises `UsageError` for shares that are no shares.
    """
    if set(shares) - set(KINDS) or min(shares.values(), default=0) < 0 or sum(shares.values()) > 1:
        raise UsageError(
            f"shares {dict(shares)}: they are of {', '.join(KINDS)}, not below 0, at most 1 together"
        )
    for index, sample in enumerate(samples):
        random = generator("noise", seed, sample.key)
        drawn, kind = random.random(), ""
        for name in KINDS:
            share = shares.get(name, 0.0)
            if 0 <= drawn < share:
                kind = name
            drawn -= share
        own = sample.captions[0]
        text = own if not kind else _spoilt(kind, own, samples, index, random)
        yield replace(sample, captions=(text,), questions=(), regions=(), extra={"noise": kind, "true": own})


def _spoilt(kind: str, own: str, samples: Sequence[Sample], index: int, random: np.random.Generator) -> str:
    if kind == "truncated":
        words = own.split()
        return " ".join(words[: max(1, int(random.integers(1, max(2, len(words) - 1))))])
    if kind == "generic":
        return str(random.choice(_GENERIC))
    if kind == "junk":
        n, m = random.integers(1, 2000, 2).tolist()
        d, e = random.integers(1, 12, 2).tolist()
        return str(random.choice(_JUNK)).format(n=n, m=m, d=d, e=e)
    for _ in range(20):  # of few different captions there may be no other
        other = samples[int(random.integers(len(samples)))].captions[0]
        if other != own:
            return other
    return str(random.choice(_GENERIC))
