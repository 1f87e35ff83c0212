"""Florence-2: an image tower and an encoder-decoder that writes captions, boxes and outlines alike, as words.

Xiao et al. 2023, arXiv 2311.06242, section 4. Places in the image are 1,000 words of their own, `<loc_0>` to
`<loc_999>`, from left to right and from top to bottom.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from sightloop.nn.attention import Linear
from sightloop.towers.davit import Davit, DavitConfig
from sightloop.towers.text import LanguageConfig, LanguageModel, TextConfig, TextTower
from sightloop.types import Encoded


@dataclass(frozen=True, slots=True)
class FlorenceConfig:
    """text: the encoder, which reads image and prompt; language: the decoder. image_id: the id that stands for one
    image token, which need not be in the vocabulary. grid: rows and columns that have a position. frames: rows of
    the table of times, of which an image is the first. bos_id: what every text begins with, after `start_ids`.
    ignored_phrases: phrases that stand for no thing, whose boxes are left out; None for the usual ones.
    untied_decoder: the
    decoder reads words in a table of its own.
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


_ASK: dict[str, str] = {
    # Our job, or the name of the task in the paper's code -> its question, in the words that it was trained with.
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
# What is written for a job that finds things, as a key of tasks.region_parser.PARSERS.
_FINDS = {
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
    """Images and a prompt -> text. prompts: see `inference.prompting`; finds: see `inference.regions`."""

    capabilities = frozenset({"caption", "detect", "locate", "segment", "read"})
    prompts: ClassVar[dict[str, str]] = {job: f"<image><s>{text}</s>" for job, text in _ASK.items()}
    region_formats: ClassVar[dict[str, str]] = _FINDS

    def __init__(self, config: FlorenceConfig) -> None:
        super().__init__()
        self.config = config
        dim, width = config.vision.dims[-1], config.text.dim
        self.vision = Davit(config.vision)
        self.rows = nn.Parameter(torch.empty(config.grid, dim // 2))
        self.columns = nn.Parameter(torch.empty(config.grid, dim - dim // 2))
        self.register_buffer("times", _waves(config.frames, dim))
        self.projection = Linear(dim, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.encoder = TextTower(config.text)
        self.language = LanguageModel(config.language)
        if not config.untied_decoder:
            self.language.text.word = self.encoder.word
        if config.language.tied:
            self.language.head.weight = cast(nn.Parameter, self.encoder.word.weight)

    def encode_image(self, pixels: Tensor) -> Encoded:
        """pixels `[B, 3, H, W]` -> Encoded(tokens `[B, 1 + N, D]`): the mean of all places, then each place."""
        grid = self.vision.feature_map(pixels)
        _, height, width, _ = grid.shape
        columns = self.columns[:width].expand(height, -1, -1)
        rows = self.rows[:height, None].expand(-1, width, -1)
        places = (grid + torch.cat([columns, rows], dim=-1)).flatten(1, 2)
        places = places + self.get_buffer("times")[0]
        tokens = torch.cat([places.mean(dim=1, keepdim=True), places], dim=1)
        return Encoded(self.norm(self.projection(tokens)))

    def build_prefix(self, image_tokens: Tensor, ids: Tensor, valid_mask: Tensor) -> Encoded:
        """What the decoder reads: images' tokens `[K, D]`, in the order of their places in ids `[R, L]`; real
        `[R, L]`: False = padding. -> Encoded(tokens `[R, L, D]`, mask = real)."""
        places = ids == self.config.image_id
        words = self.encoder.embed_tokens(ids.masked_fill(places, 0))
        words = words.masked_scatter(places[..., None], image_tokens.to(words.dtype))
        return Encoded(self.encoder.forward_embeddings(words, valid_mask=valid_mask), mask=valid_mask)


def _waves(rows: int, dim: int) -> Tensor:
    """Sines and cosines of each row's number in turn, `[rows, dim]` (Vaswani et al. 2017, section 3.5)."""
    half = dim // 2
    with torch.device(
        "cpu"
    ):  # to compute where no memory is ("meta"), torch loads its compiler: 75 MB and 0.7 s
        speeds = torch.exp(torch.arange(half).float() * (-torch.log(torch.tensor(10_000.0)) / half))
        angles = torch.arange(rows)[:, None] * speeds
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
