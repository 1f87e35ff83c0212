"""Florence-2: an image tower and an encoder-decoder that writes captions, boxes and outlines as text.

Xiao et al. 2023, arXiv 2311.06242, section 4. Coordinates are 1,000 location tokens, `<loc_0>` to `<loc_999>`, from
left to right and from top to bottom.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from sightloop.nn.attention import Linear
from sightloop.towers.davit import Davit, DavitConfig
from sightloop.towers.text import LanguageConfig, LanguageModel, TextConfig, TextTower
from sightloop.types import Encoded


@dataclass(frozen=True, slots=True)
class FlorenceConfig:
    """Sizes of Florence-2's towers, and the special tokens.

    Args:
        vision: the image tower's config.
        text: the encoder's, which reads image tokens and prompt.
        language: the decoder's.
        grid: rows and columns that have a learned position.
        frames: rows of the table of temporal positions, of which an image takes the first.
        image_id: id of one image token in a prompt; it need not be in the vocabulary.
        start_ids: ids that the decoder starts from.
        end_id: id of EOS.
        bos_id: first token of every text, after `start_ids`.
        labels: names of fine-tuned classes; always ().
        ignored_phrases: phrases whose boxes are left out of grounding; None for the usual ones.
        untied_decoder: the decoder has its own token embedding.
    """

    vision: DavitConfig
    text: TextConfig
    language: LanguageConfig
    grid: int
    frames: int
    image_id: int
    start_ids: tuple[int, ...]
    end_id: int
    bos_id: int = 0
    labels: tuple[str, ...] = ()
    ignored_phrases: tuple[str, ...] | None = None
    untied_decoder: bool = False


_QUESTIONS: dict[str, str] = {
    # Our task, or the task's name in the paper's code -> the question that it was trained with.
    "caption": "What does the image describe?",
    "<CAPTION>": "What does the image describe?",
    "detailed": "Describe in detail what is shown in the image.",
    "<DETAILED_CAPTION>": "Describe in detail what is shown in the image.",
    "long": "Describe with a paragraph what is shown in the image.",
    "<MORE_DETAILED_CAPTION>": "Describe with a paragraph what is shown in the image.",
    "detect": "Locate the objects with category name in the image.",
    "<OD>": "Locate the objects with category name in the image.",
    "describe": "Locate the objects in the image, with their descriptions.",
    "<DENSE_REGION_CAPTION>": "Locate the objects in the image, with their descriptions.",
    "<REGION_PROPOSAL>": "Locate the region proposals in the image.",
    "<OCR>": "What is the text in the image?",
    "read": "What is the text in the image, with regions?",
    "<OCR_WITH_REGION>": "What is the text in the image, with regions?",
    "find": "Locate {} in the image.",
    "<OPEN_VOCABULARY_DETECTION>": "Locate {} in the image.",
    "locate": "Locate the phrases in the caption: {}",
    "<CAPTION_TO_PHRASE_GROUNDING>": "Locate the phrases in the caption: {}",
    "segment": "Locate {} in the image with mask",
    "<REFERRING_EXPRESSION_SEGMENTATION>": "Locate {} in the image with mask",
    "outline": "What is the polygon mask of region {}",
    "<REGION_TO_SEGMENTATION>": "What is the polygon mask of region {}",
    "category": "What is the region {}?",
    "<REGION_TO_CATEGORY>": "What is the region {}?",
    "region": "What does the region {} describe?",
    "<REGION_TO_DESCRIPTION>": "What does the region {} describe?",
    "words": "What text is in the region {}?",
    "<REGION_TO_OCR>": "What text is in the region {}?",
    "prompt": "{}",
}
# Task -> the format of its regions, a key of tasks.region_parser.PARSERS.
_REGION_FORMATS = {
    "detect": "boxes",
    "find": "anything",
    "describe": "boxes",
    "locate": "phrases",
    "segment": "outlines",
    "outline": "outlines",
    "read": "quads",
    "category": "said",
    "words": "said",
}


class Florence(nn.Module):
    """Image tower, and an encoder-decoder that answers a prompt about the image."""

    capabilities = frozenset({"caption", "detect", "locate", "segment", "read"})
    objectives = frozenset({"prompted"})
    prompts: ClassVar[Mapping[str, str]] = {
        task: f"<image><s>{text}</s>" for task, text in _QUESTIONS.items()
    }
    region_formats: ClassVar[Mapping[str, str]] = _REGION_FORMATS
    phrase_separator = ""

    def __init__(self, config: FlorenceConfig) -> None:
        super().__init__()
        self.config = config
        dim, width = config.vision.dims[-1], config.text.dim
        self.vision = Davit(config.vision)
        self.rows = nn.Parameter(torch.empty(config.grid, dim // 2))
        self.columns = nn.Parameter(torch.empty(config.grid, dim - dim // 2))
        self.register_buffer("times", _temporal_positions(config.frames, dim))
        self.projection = Linear(dim, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.encoder = TextTower(config.text)
        self.language = LanguageModel(config.language)
        if not config.untied_decoder:
            self.language.text.word = self.encoder.word
        if config.language.tied:
            self.language.head.weight = self.encoder.word_weight

    @property
    def ignored_phrases(self) -> Sequence[str] | None:
        """Phrases whose boxes are left out of grounding; None for the usual ones."""
        return self.config.ignored_phrases

    @property
    def answer_start(self) -> tuple[int, ...]:
        """Ids that every answer begins with: BOS."""
        return (self.config.bos_id,)

    def encode_image(self, pixels: Tensor) -> Encoded:
        """pixels `[B, 3, H, W]` -> image tokens `[B, 1 + N, D]`: the mean of all positions, then each position."""
        grid = self.vision.feature_map(pixels)  # [B, h, w, V]
        _, height, width, _ = grid.shape
        columns = self.columns[:width].expand(height, -1, -1)
        rows = self.rows[:height, None].expand(-1, width, -1)
        tokens = (grid + torch.cat([columns, rows], dim=-1)).flatten(1, 2)  # [B, h * w, V]
        tokens = tokens + self.get_buffer("times")[0]
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        return Encoded(self.norm(self.projection(tokens)))

    def build_prefix(self, image_tokens: Tensor, ids: Tensor, valid_mask: Tensor) -> Encoded:
        """The encoder's output over image tokens and prompt, the decoder's memory.

        Args:
            image_tokens: `[K, D]`, those of all images in the order of their places.
            ids: `[R, L]`, `image_id` for each image token.
            valid_mask: bool `[R, L]`, False for padding.

        Returns:
            tokens `[R, L, D]`, mask `valid_mask`.
        """
        is_image = ids == self.config.image_id
        words = self.encoder.embed_tokens(ids.masked_fill(is_image, 0))
        words = words.masked_scatter(is_image[..., None], image_tokens.to(words.dtype))
        return Encoded(self.encoder.forward_embeddings(words, valid_mask=valid_mask), mask=valid_mask)


def _temporal_positions(rows: int, dim: int) -> Tensor:
    """Sinusoidal positions `[rows, dim]`, sine and cosine interleaved (Vaswani et al. 2017, section 3.5)."""
    half = dim // 2
    # Computed on the CPU: on "meta", torch would load its compiler (75 MB, 0.7 s).
    with torch.device("cpu"):
        frequencies = torch.exp(torch.arange(half).float() * (-torch.log(torch.tensor(10_000.0)) / half))
        angles = torch.arange(rows)[:, None] * frequencies
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
