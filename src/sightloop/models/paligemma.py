"""PaliGemma and PaliGemma 2: patches of a SigLIP tower, projected, stand before the words that Gemma goes on from.

Beyer et al. 2024, arXiv 2407.07726; Steiner et al. 2024, arXiv 2412.03555 (the same over Gemma 2). Picture and prompt
see each other whole, what is written is causal (figure 2). Boxes and masks are words too: `tasks.location_tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from sightloop.nn.attention import Linear
from sightloop.towers.text import LanguageConfig, LanguageModel, TextConfig, with_pictures
from sightloop.towers.vit import Vit, VitConfig
from sightloop.types import Encoded

# Section 3.2.3 and appendix E: the task stands first, its language where it has one, and a line's end after all.
PROMPTS: Mapping[str, str] = {
    "caption": "<image><bos>caption en\n",
    "answer": "<image><bos>answer en {}\n",
    "find": "<image><bos>detect {}\n",
    "locate": "<image><bos>detect {}\n",
    "segment": "<image><bos>segment {}\n",
    "prompt": "<image><bos>{}\n",
}
# What is written for a job that finds things, as a key of tasks.region_parser.PARSERS.
_FINDS = {"find": "located", "locate": "located", "segment": "segments"}


@dataclass(frozen=True, slots=True)
class Config:
    """Both towers. image_id: the id in whose place a picture's tokens stand; it may lie beyond the word table."""

    vision: VitConfig
    language: LanguageConfig
    image_id: int
    end_id: int
    start_ids: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()

    @property
    def text(self) -> TextConfig:
        """The language tower's sizes."""
        return self.language.text


class PaliGemma(nn.Module):
    """Image tower, one linear layer, language model. finds, joint: see `inference.regions`."""

    jobs = frozenset(("caption", "answer", "detect", "locate", "segment"))
    prompts: ClassVar[Mapping[str, str]] = PROMPTS
    finds: ClassVar[Mapping[str, str]] = _FINDS
    joint = " ; "

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.vision = Vit(config.vision)
        self.projector = Linear(config.vision.dim, config.text.dim)
        self.language = LanguageModel(config.language)

    def encode_image(self, pixels: Tensor) -> Encoded:
        """pixels `[B, 3, S, S]` -> Encoded(tokens `[B, (S / patch)^2, D]`)."""
        return Encoded(self.projector(self.vision(pixels).tokens))

    def begin(self, image_tokens: Tensor, ids: Tensor, real: Tensor) -> Encoded:
        """What `language` goes on from: ids `[R, L]`, padded in front where `real` is False, with the tokens `[K, D]`
        of all their pictures in place of `image_id`."""
        words = self.language.text.words(ids.masked_fill(ids == self.config.image_id, 0))
        return Encoded(with_pictures(words, image_tokens, ids, self.config.image_id, real), mask=real)
