"""SigLIP and SigLIP 2: two towers and a sigmoid for every pair (Zhai et al. 2023, arXiv 2303.15343; Tschannen et al.
2025, arXiv 2502.14786)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sightloop.nn.attention import Linear
from sightloop.towers.text import TextConfig, TextTower
from sightloop.towers.vit import Vit, VitConfig
from sightloop.types import Encoded


@dataclass(frozen=True, slots=True)
class SiglipConfig:
    """embed_dim: width of the shared embedding, which is the image tower's own.

    labels: classes of images that were learned, which one more layer tells apart.
    """

    vision: VitConfig
    text: TextConfig
    embed_dim: int
    labels: tuple[str, ...] = ()


class Siglip(nn.Module):
    """Images and texts to unit vectors of one space; each pair's logit is a verdict of its own."""

    capabilities = frozenset({"embed", "similarity", "classify"})
    activation = "sigmoid"

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        if config.embed_dim != config.vision.dim:
            raise ValueError(f"texts of width {config.embed_dim} and images of width {config.vision.dim}")
        self.config = config
        self.vision = Vit(config.vision)
        self.text = TextTower(config.text)
        self.text_projection = Linear(config.text.dim, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.empty(()))  # ln(1 / temperature)
        self.logit_bias = nn.Parameter(torch.empty(()))
        if config.labels:
            self.classes = Linear(config.vision.dim, len(config.labels))

    def encode_image(self, pixels: Tensor) -> Encoded:
        """pixels `[B, 3, H, W]` -> Encoded(tokens `[B, N, D]`, pooled `[B, D]`)."""
        return self.vision(pixels)

    def embed_image(self, image: Encoded) -> Tensor:
        """-> `[B, P]`, unit length."""
        assert image.pooled is not None
        return nn.functional.normalize(image.pooled, dim=-1)

    def embed_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids `[R, L]`, filled up by the tokenizer -> `[R, P]`, unit length.

        The last position stands for the text, whatever is there, and all positions are read, the fill too: so it was
        trained. lengths is what every embedder is given; none is shorter than L.
        """
        return nn.functional.normalize(self.text_projection(self.text(ids).tokens[:, -1]), dim=-1)

    def class_logits(self, similarity: Tensor) -> Tensor:
        """Cosines -> logits: multiplied by the learned scale, plus the bias."""
        return similarity * self.logit_scale.exp() + self.logit_bias

    def label_logits(self, image: Encoded) -> Tensor:
        """The learned classes: `[B, len(labels)]`."""
        return self.classes(image.pooled)
