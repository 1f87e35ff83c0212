"""CLIP: two towers and a temperature (Radford et al. 2021, arXiv 2103.00020, figure 3); its image tower is a vision
transformer or a ResNet (section 2.4: RN50, RN101, RN50x4, RN50x16, RN50x64)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sightloop.nn.attention import Linear
from sightloop.towers.resnet import Resnet, ResnetConfig
from sightloop.towers.text import TextConfig, TextTower
from sightloop.towers.vit import Vit, VitConfig
from sightloop.types import Encoded


@dataclass(frozen=True, slots=True)
class ClipConfig:
    """embed_dim: width of the shared embedding. end_id: the token whose state stands for the text.

    end_is_largest_id: pool at the largest id instead (checkpoints converted before the id was stored; OpenAI's code).
    sigmoid: trained with a bias on every pair's logit, as SigLIP is (Zhai et al. 2023).
    labels: classes of pictures that were learned, which one more layer tells apart.
    """

    vision: VitConfig
    text: TextConfig
    embed_dim: int
    end_id: int
    end_is_largest_id: bool
    sigmoid: bool = False
    labels: tuple[str, ...] = ()


class Clip(nn.Module):
    """Pictures and texts to unit vectors of one space."""

    jobs = frozenset({"embed", "similarity", "classify"})

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = Vit(config.vision)
        self.text = TextTower(config.text)
        self.image_projection = Linear(config.vision.dim, config.embed_dim, bias=False)
        self.text_projection = Linear(config.text.dim, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(()))  # ln(1 / temperature)
        if config.sigmoid:
            self.logit_bias = nn.Parameter(torch.empty(()))
        if config.labels:
            self.classes = Linear(config.vision.dim, len(config.labels))

    def encode_image(self, pixels: Tensor) -> Encoded:
        """pixels `[B, 3, S, S]` -> Encoded(tokens `[B, N, D]`, pooled `[B, D]`)."""
        return self.vision(pixels)

    def embed_image(self, image: Encoded) -> Tensor:
        """-> `[B, P]`, unit length."""
        return nn.functional.normalize(self.image_projection(image.pooled), dim=-1)

    def embed_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids `[R, L]`, lengths `[R]` -> `[R, P]`, unit length. What follows the end token changes nothing."""
        tokens = self.text(ids, lengths=lengths, causal=True).tokens
        if self.config.end_is_largest_id:
            end = ids.argmax(dim=1)
        else:
            end = (ids == self.config.end_id).int().argmax(dim=1)
        pooled = tokens[torch.arange(ids.shape[0], device=ids.device), end]
        return nn.functional.normalize(self.text_projection(pooled), dim=-1)

    def class_logits(self, similarity: Tensor) -> Tensor:
        """Cosines -> logits: multiplied by the learned scale, and the bias where there is one."""
        logits = similarity * self.logit_scale.exp()
        return logits + self.logit_bias if self.config.sigmoid else logits

    def label_logits(self, image: Encoded) -> Tensor:
        """The learned classes: `[B, len(labels)]`."""
        return self.classes(image.pooled)


@dataclass(frozen=True, slots=True)
class ClipResnetConfig:
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

    def __init__(self, config: ClipResnetConfig) -> None:
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
