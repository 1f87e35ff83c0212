"""CLIP with a ResNet for pictures (Radford et al. 2021, section 2.4): RN50, RN101, RN50x4, RN50x16, RN50x64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sightloop.nn.attention import Linear
from sightloop.towers.resnet import Resnet, ResnetConfig
from sightloop.towers.text import TextConfig, TextTower
from sightloop.types import Encoded


@dataclass(frozen=True, slots=True)
class Config:
    """The pooling of the ResNet ends in the shared embedding: its width is `vision.dim`.

    labels: classes of pictures that were learned, which one more layer tells apart.
    """

    vision: ResnetConfig
    text: TextConfig
    labels: tuple[str, ...] = ()

    @property
    def embed_dim(self) -> int:
        """Width of the shared embedding."""
        return self.vision.dim


class ClipResnet(nn.Module):
    """Pictures and texts to unit vectors of one space."""

    jobs = frozenset({"embed", "similarity", "classify"})

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.vision = Resnet(config.vision)
        self.text = TextTower(config.text)
        self.text_projection = Linear(config.text.dim, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(()))  # ln(1 / temperature)
        if config.labels:
            self.classes = Linear(config.embed_dim, len(config.labels))

    def encode_image(self, pixels: Tensor) -> Encoded:
        """pixels `[B, 3, S, S]` -> Encoded(tokens `[B, N, C]`, pooled `[B, P]`)."""
        return self.vision(pixels)

    def embed_image(self, image: Encoded) -> Tensor:
        """-> `[B, P]`, unit length."""
        assert image.pooled is not None
        return nn.functional.normalize(image.pooled, dim=-1)

    def embed_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids `[R, L]`, lengths `[R]` -> `[R, P]`, unit length. The end token is the largest id, as in all of them."""
        tokens = self.text(ids, lengths=lengths, causal=True).tokens
        ends = tokens[torch.arange(ids.shape[0], device=ids.device), ids.argmax(dim=1)]
        return nn.functional.normalize(self.text_projection(ends), dim=-1)

    def class_logits(self, similarity: Tensor) -> Tensor:
        """Cosines -> logits: multiplied by the learned scale."""
        return similarity * self.logit_scale.exp()

    def label_logits(self, image: Encoded) -> Tensor:
        """The learned classes: `[B, len(labels)]`."""
        return self.classes(image.pooled)
