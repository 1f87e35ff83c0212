"""Texts that a sample is trained with, and their ids: equal ids for texts that say the same, which are no negatives.

A label becomes a text by a template, as in UniCL (Yang et al. 2022, arXiv 2204.03610, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from sightloop.types import Sample


def text_id(text: str) -> int:
    """Id of a text, 0 to 2^63 - 1, independent of letter case and white space."""
    digest = blake2b(_normal(text).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True, slots=True)
class LabelTexts:
    """Texts of samples: the captions, or of a sample without captions its label in each template.

    All texts that a label becomes have the id of the label itself, so that images of one label match each other's texts
    whatever the template. So has a caption that spells a label in a template.

    Args:
        templates: texts with "{}" for the label; () if labels are no texts.
    """

    templates: tuple[str, ...] = ()

    def texts(self, sample: Sample) -> list[str]:
        """All texts of a sample, none of them blank."""
        captions = [text for text in sample.captions if text.strip()]
        label = self._label(sample)
        return captions if captions or not label else [text.replace("{}", label) for text in self.templates]

    def ids(self, sample: Sample, texts: Sequence[str]) -> list[int]:
        """Ids of some of the sample's texts."""
        if any(text.strip() for text in sample.captions):
            return [text_id(self._without_template(text)) for text in texts]
        return [text_id(self._label(sample))] * len(texts)

    def all_ids(self, sample: Sample) -> list[int]:
        """Ids of all texts that are true of a sample: of its captions, and of its label even beside captions."""
        label = self._label(sample)
        captions = [text for text in sample.captions if text.strip()]
        return list(dict.fromkeys([*self.ids(sample, captions), *([text_id(label)] if label else [])]))

    def _label(self, sample: Sample) -> str:
        return (sample.label or "").strip() if self.templates else ""

    def _without_template(self, text: str) -> str:
        """What a caption has in the place of the label, by the longest template that fits; else the caption."""
        words = _normal(text)
        for template in sorted(map(_normal, self.templates), key=len, reverse=True):
            before, _, after = template.partition("{}")
            inside = words[len(before) : len(words) - len(after)]
            if inside.strip() and words == before + inside + after:
                return inside
        return text


def _normal(text: str) -> str:
    """A text without differences of letter case and white space."""
    return " ".join(text.casefold().split())
