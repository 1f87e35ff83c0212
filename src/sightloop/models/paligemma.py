"""PaliGemma and PaliGemma 2: projected SigLIP patch tokens are prepended to the prompt of a Gemma decoder.

Beyer et al. 2024, arXiv 2407.07726; Steiner et al. 2024, arXiv 2412.03555 (the same over Gemma 2). Image and prompt
attend to each other in both directions, the answer is causal (figure 2). Boxes and masks are written as location and
segmentation tokens: `tasks.location_tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn

from sightloop.nn.attention import Linear
from sightloop.towers.text import LanguageConfig, LanguageModel, TextConfig, insert_image_tokens
from sightloop.towers.vit import Vit, VitConfig
from sightloop.types import Encoded

# Section 3.2.3 and appendix E: task, its language if it has one, a newline at the end.
PROMPTS: Mapping[str, str] = {
    "caption": "<image><bos>caption en\n",
    "answer": "<image><bos>answer en {}\n",
    "find": "<image><bos>detect {}\n",
    "locate": "<image><bos>detect {}\n",
    "segment": "<image><bos>segment {}\n",
    "prompt": "<image><bos>{}\n",
}
# Task -> the format of its regions, a key of tasks.region_parser.PARSERS.
_REGION_FORMATS = {"find": "located", "locate": "located", "segment": "segments"}


@dataclass(frozen=True, slots=True)
class PaliGemmaConfig:
    """Sizes of PaliGemma's towers, and the special tokens.

    Args:
        vision: the image tower's config.
        language: the language model's.
        image_id: id of one image token in a prompt; it may lie beyond the vocabulary.
        end_id: id of EOS.
        start_ids: always (); its texts continue the prompt.
        labels: names of fine-tuned classes; always ().
    """

    vision: VitConfig
    language: LanguageConfig
    image_id: int
    end_id: int
    start_ids: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()

    @property
    def text(self) -> TextConfig:
        """The language tower's config."""
        return self.language.text


class PaliGemma(nn.Module):
    """Image tower, linear projector, language model."""

    capabilities = frozenset({"caption", "answer", "detect", "locate", "segment"})
    objectives = frozenset({"prompted"})
    prompts: ClassVar[Mapping[str, str]] = PROMPTS
    region_formats: ClassVar[Mapping[str, str]] = _REGION_FORMATS
    phrase_separator = " ; "
    ignored_phrases: ClassVar[Sequence[str] | None] = None

    def __init__(self, config: PaliGemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = Vit(config.vision)
        self.projector = Linear(config.vision.dim, config.text.dim)
        self.language = LanguageModel(config.language)

    @property
    def answer_start(self) -> tuple[int, ...]:
        """Ids that every answer begins with: none."""
        return ()

    def encode_image(self, pixels: Tensor) -> Encoded:
        """pixels `[B, 3, S, S]` -> image tokens `[B, (S / patch)^2, D]`."""
        return Encoded(self.projector(self.vision(pixels).tokens))

    def build_prefix(self, image_tokens: Tensor, ids: Tensor, valid_mask: Tensor) -> Encoded:
        """Prefix of the language model: word vectors, with image tokens at the places of `image_id`.

        Args:
            image_tokens: `[K, D]`, those of all images in the order of their places.
            ids: `[R, L]`, `image_id` for each image token.
            valid_mask: bool `[R, L]`, False for padding, which comes first.

        Returns:
            tokens `[R, L, D]`, mask `valid_mask`.
        """
        words = self.language.text.embed_tokens(ids.masked_fill(ids == self.config.image_id, 0))
        x = insert_image_tokens(words, image_tokens, ids, self.config.image_id, valid_mask)
        return Encoded(x, mask=valid_mask)


_GRID = 4


class Residual(nn.Module):
    """Residual block of 3x3, 3x3 and 1x1 convolutions: `[B, C, H, W]` -> `[B, C, H, W]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class MaskDecoder(nn.Module):
    """Decoder of segmentation tokens: 16 tokens of a mask, row by row `[B, 16]` -> mask probabilities `[B, 64, 64]`.

    The codebook and decoder of a VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937; Ning et al. 2023, arXiv
    2301.02229), as PaliGemma reads them (section 3.2.4); weights: the published `vae-oid.npz`.

    Args:
        words: size of the codebook.
        code: width of a code.
        width: channels of the first layers; each of the four layers that double the sides, but the first, halves it.
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
