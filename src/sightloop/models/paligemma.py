"""PaliGemma and PaliGemma 2: patches of a SigLIP tower, projected, stand before the words that Gemma goes on from.

Beyer et al. 2024, arXiv 2407.07726; Steiner et al. 2024, arXiv 2412.03555 (the same over Gemma 2). Image and prompt
see each other whole, what is written is causal (figure 2). Boxes and masks are words too: `tasks.location_tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn

from sightloop.nn.attention import Linear
from sightloop.towers.text import LanguageConfig, LanguageModel, TextConfig, insert_image_tokens
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
class PaliGemmaConfig:
    """Both towers. image_id: the id in whose place an image's tokens stand; it may lie beyond the word table."""

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

    capabilities = frozenset(("caption", "answer", "detect", "locate", "segment"))
    prompts: ClassVar[Mapping[str, str]] = PROMPTS
    region_formats: ClassVar[Mapping[str, str]] = _FINDS
    phrase_separator = " ; "

    def __init__(self, config: PaliGemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = Vit(config.vision)
        self.projector = Linear(config.vision.dim, config.text.dim)
        self.language = LanguageModel(config.language)

    def encode_image(self, pixels: Tensor) -> Encoded:
        """pixels `[B, 3, S, S]` -> Encoded(tokens `[B, (S / patch)^2, D]`)."""
        return Encoded(self.projector(self.vision(pixels).tokens))

    def build_prefix(self, image_tokens: Tensor, ids: Tensor, valid_mask: Tensor) -> Encoded:
        """What `language` goes on from: ids `[R, L]`, padded in front where `real` is False, with the tokens `[K, D]`
        of all their images in place of `image_id`."""
        words = self.language.text.embed_tokens(ids.masked_fill(ids == self.config.image_id, 0))
        return Encoded(
            insert_image_tokens(words, image_tokens, ids, self.config.image_id, valid_mask), mask=valid_mask
        )


_GRID = 4


class Residual(nn.Module):
    """Convolutions of 3x3, 3x3 and 1x1, beside a residual: `[B, C, H, W]` -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class MaskDecoder(nn.Module):
    """Decoder of segmentation tokens: the codebook and decoder of a VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937;
    Ning et al. 2023, arXiv 2301.02229), as PaliGemma reads them (section 3.2.4); weights: the published `vae-oid.npz`.

    Segment words `[B, 16]`, row by row -> how much of each place is the thing's: `[B, 64, 64]`, 0..1.

    words: how many there are. code: the width of a word's vector. width: of the first layers; each but the first of the
    four that double the sides halves it.
    """

    def __init__(self, words: int, code: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, code)
        layers: list[nn.Module] = [nn.Conv2d(code, width, 1), nn.ReLU(), Residual(width), Residual(width)]
        for before, after in pairwise((width, width, width // 2, width // 4, width // 8)):
            layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(width // 8, 1, 1))

    def forward(self, segments: Tensor) -> Tensor:
        grid = self.words(segments).unflatten(1, (_GRID, _GRID)).permute(0, 3, 1, 2)  # [B, C, 4, 4]
        return (self.decoder(grid)[:, 0] * 0.5 + 0.5).clamp(0, 1)
