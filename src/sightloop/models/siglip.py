"""SigLIP and SigLIP 2: two towers trained with a sigmoid for every pair (Zhai et al. 2023, arXiv 2303.15343; Tschannen
et al. 2025, arXiv 2502.14786, NaFlex included)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from sightloop.nn.attention import Linear
from sightloop.protocols import PatchAttention
from sightloop.towers.text import TextConfig, TextTower
from sightloop.towers.vit import Vit, VitConfig
from sightloop.types import Encoded, LogitActivation


@dataclass(frozen=True, slots=True)
class SiglipConfig:
    """Sizes of SigLIP's two towers.

    Args:
        vision: the image tower's config; its attention pooling ends in the embedding space.
        text: the text tower's config.
        embed_dim: width of the shared embedding space, `vision.dim`.
        labels: names of fine-tuned classes; a linear head on the pooled image state tells them apart.
    """

    vision: VitConfig
    text: TextConfig
    embed_dim: int
    labels: tuple[str, ...] = ()


class Siglip(nn.Module):
    """Two towers that map images and texts to unit vectors of one space; each pair's logit is read on its own."""

    capabilities = frozenset({"embed", "similarity", "classify"})
    objectives = frozenset({"clip", "siglip", "classes"})
    activation: LogitActivation = "sigmoid"
    embeds_first_token = False

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

    @property
    def embed_dim(self) -> int:
        """Width of the embedding space."""
        return self.config.embed_dim

    def encode_image(self, pixels: Tensor) -> Encoded:
        """Image tower: pixels `[B, 3, H, W]` -> tokens `[B, N, D]`, pooled `[B, D]`."""
        return self.vision(pixels)

    def embed_image(self, image: Encoded) -> Tensor:
        """B encoded images -> `[B, P]`, unit length."""
        assert image.pooled is not None
        return nn.functional.normalize(image.pooled, dim=-1)

    def embed_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids `[R, L]`, padded to the tokenizer's length -> `[R, P]`, unit length.

        The state at the last position is the text's pooled state, and padding is attended to: it was trained so.
        `lengths` is not read.
        """
        return nn.functional.normalize(self.text_projection(self.text(ids).tokens[:, -1]), dim=-1)

    def class_logits(self, similarity: Tensor) -> Tensor:
        """Cosines `[...]` -> logits `[...]`: times the learned scale, plus the bias."""
        return similarity * self.logit_scale.exp() + self.logit_bias

    def patch_attention(self, score: Literal["match", "similarity"]) -> PatchAttention | None:
        """The image tower's attention pooling."""
        return self.vision.patch_attention() if score == "similarity" else None

    def label_logits(self, image: Encoded) -> Tensor:
        """B encoded images -> logits `[B, C]` of the fine-tuned classes."""
        return self.classes(image.pooled)

    def add_label_head(self, labels: tuple[str, ...]) -> nn.Module:
        """Replaces the head for fine-tuned classes and returns it, to be initialized."""
        self.config = replace(self.config, labels=labels)
        self.classes = Linear(self.config.vision.dim, len(labels))
        return self.classes
