"""The options of a bootstrap."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias, get_args

from sightloop.errors import UsageError
from sightloop.tasks.generate import Decoding
from sightloop.types import JsonDict

Mode: TypeAlias = Literal["both", "captioner-only", "filter-only"]


Keep: TypeAlias = Literal["matching", "best", "top-k-itc"]


@dataclass(frozen=True, slots=True)
class CapFiltOptions:
    """How to bootstrap. What is not about speed or memory alone is a part of the job: OUT keeps it.

    mode: "both"; "captioner-only" adds synthetic texts and judges nothing; "filter-only" writes none.
    keep: "matching", every text with an ITM probability of `threshold` or more; "best", the best of those of each
    image; "top-k-itc", the `top` best of each image by ITC similarity, as BLIP-2 does it (Li et al. 2023, section
    3.3), by `ranker` or else the filter.
    captions: synthetic texts an image, drawn by nucleus sampling with `top_p` from the seed and the image alone, or
    with `num_beams` searched. min_tokens, max_tokens: of one; the end counts. prompt: what each starts with.
    to: the kind of the output's shards. by_reference: they hold the paths of images that are files of their own, not
    the images; for Parquet. block: samples in one, at most. group: images in one pass of a model, None
    for 8 on a CPU and 32 elsewhere; threads: of one process, None for torch's choice. These two change the last bits
    of float32, so they stay as a job began.
    engine: "local" for processes of this machine, "ray" for actors of a cluster (`bootstrap.cluster`).
    workers: how many; batch_size: images held ready for the models of each; readers: decoder processes of each.
    isolate: images are decoded by processes that they may take down.
    """

    mode: Mode = "both"
    keep: Keep = "matching"
    threshold: float = 0.5
    top: int = 2
    ranker: str | None = None
    captions: int = 1
    top_p: float = 0.9
    num_beams: int = 1
    min_tokens: int = 5
    max_tokens: int = 20
    prompt: str | None = None
    seed: int = 0
    to: Literal["tar", "parquet"] = "tar"
    by_reference: bool = False
    block: int = 1000
    group: int | None = None
    threads: int | None = None
    engine: Literal["local", "ray"] = "local"
    workers: int = 1
    batch_size: int | None = None
    readers: int = 2
    isolate: bool = True
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_pixels: int = 128 * 1024 * 1024

    def __post_init__(self) -> None:
        """Raises `UsageError` for a value out of range."""
        for name, allowed in (("mode", Mode), ("keep", Keep)):
            if getattr(self, name) not in get_args(allowed):
                raise UsageError(f"{name}={getattr(self, name)!r}: there are {', '.join(get_args(allowed))}")
        for name, allowed in (("to", ("tar", "parquet")), ("engine", ("local", "ray"))):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name}={getattr(self, name)!r}: there are {', '.join(allowed)}")
        if self.by_reference and self.to != "parquet":
            raise UsageError(f"by_reference: to={self.to!r} holds the images; take parquet")
        if not 0 <= self.threshold <= 1:
            raise UsageError(f"threshold={self.threshold}: must be from 0 to 1")
        counts = "top captions num_beams block group threads workers batch_size readers max_pixels"
        for name in counts.split():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}={value}: must be at least 1")
        if self.mode == "captioner-only" and self.keep != "matching":
            raise UsageError(f"keep_last={self.keep!r}: captioner-only judges nothing; use mode both")
        if self.ranker is not None and self.keep != "top-k-itc":
            raise UsageError("ranker: is for keep=top-k-itc alone")
        self.decoding()

    def decoding(self) -> JsonDict:
        """The captioner's decoding, in the words of `tasks.generate.Decoding`."""
        how: JsonDict = {"min_new_tokens": self.min_tokens, "max_new_tokens": self.max_tokens}
        how |= {"num_beams": self.num_beams} if self.num_beams > 1 else {"top_p": self.top_p}
        return asdict(Decoding(**how, num_return=self.captions, seed=self.seed))
