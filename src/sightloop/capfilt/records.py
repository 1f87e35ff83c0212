"""Records of a CapFilt run: a sample while its shard is processed, and the counts of a finished shard."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from sightloop.capfilt.filtering import TEXT_SOURCES, CandidateText
from sightloop.types import ImageSpec, JsonDict, Pixels, Sample

ITM_BINS = 20  # of the histograms of ITM probabilities, of equal width over 0..1


@dataclass(eq=False)
class ShardItem:
    """One sample of a shard while it is processed.

    Attributes:
        source: Name of the input shard (or folder, or table) that it comes from.
        key: Its key in the dataset.
        sample: The sample; None if it cannot be read.
        data: Its encoded image.
        ending: Ending of the image's file name (".jpg").
        reason: Why it failed; "" if it did not.
        decoder_died: Whether it failed because the decoder process died.
        pixels: The image, preprocessed for each of the models.
        texts: Its web texts, then its synthetic ones.
    """

    source: str
    key: str
    sample: Sample | None = None
    data: bytes = b""
    ending: str = ""
    reason: str = ""
    decoder_died: bool = False
    pixels: dict[ImageSpec, Pixels] = field(default_factory=dict[ImageSpec, Pixels])
    texts: list[CandidateText] = field(default_factory=list[CandidateText])


class FailedSample(NamedTuple):
    """A sample that is not in the output: the input shard that it comes from, its key, and why it failed."""

    source: str
    key: str
    reason: str


@dataclass(eq=False)
class ShardTally:
    """Counts of one shard, from which the report's totals are computed without reading the evidence.

    Attributes:
        samples: Samples of the input.
        written: Samples of the output.
        failed: Samples that could not be processed.
        texts: Texts by source and reason ("web matched").
        itm: Histogram of ITM probabilities for each source of texts, `ITM_BINS` bins.
    """

    samples: int = 0
    written: int = 0
    failed: list[FailedSample] = field(default_factory=list[FailedSample])
    texts: Counter[str] = field(default_factory=Counter[str])
    itm: dict[str, list[int]] = field(
        default_factory=lambda: {source: [0] * ITM_BINS for source in TEXT_SOURCES}
    )

    def add(self, item: ShardItem, written: bool) -> None:
        """Counts one sample. written: whether it is in the output."""
        self.samples += 1
        self.written += written
        if item.reason:
            self.failed.append(FailedSample(item.source, item.key, item.reason))
        for text in item.texts:
            self.texts[f"{text.source} {text.reason}"] += 1
            if text.itm is not None:
                self.itm[text.source][min(ITM_BINS - 1, int(text.itm * ITM_BINS))] += 1

    def to_json(self) -> JsonDict:
        """Its members of the shard's manifest entry; equal shards give equal text."""
        return {
            "samples": self.samples,
            "written": self.written,
            "texts": dict(sorted(self.texts.items())),
            "itm": self.itm,
            "failed": [list(failed) for failed in self.failed],
        }
