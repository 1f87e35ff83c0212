"""CLIP: image tower, text tower and a learned temperature (Radford et al. 2021, arXiv 2103.00020, figure 3).

The image tower is a vision transformer or a ResNet (section 2.4: RN50, RN101, RN50x4, RN50x16, RN50x64).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from sightloop.nn.attention import Linear
from sightloop.protocols import ImageTowerConfig, PatchAttention
from sightloop.towers.text import TextConfig, TextTower
from sightloop.towers.vit import Vit
from sightloop.types import Encoded, LogitActivation


@dataclass(frozen=True, slots=True)
class ClipConfig:
    """Sizes of CLIP's two towers, and how each is pooled.

    Args:
        vision: the image tower's config, a `VitConfig` or a `ResnetConfig`; its `build` makes the tower.
        text: the text tower's config.
        embed_dim: width of the shared embedding space.
        end_id: id of EOS, whose state is the text's pooled state.
        end_is_largest_id: pool at the largest id instead (OpenAI's code; checkpoints from before `end_id` was stored).
        sigmoid: the logits have a learned bias, as in SigLIP (Zhai et al. 2023).
        image_projection: whether a linear layer maps the image tower's pooled state into the embedding space; the
            ResNet's attention pooling ends there already.
        labels: names of fine-tuned classes; a linear head on the pooled image state tells them apart.
    """

    vision: ImageTowerConfig
    text: TextConfig
    embed_dim: int
    end_id: int
    end_is_largest_id: bool
    sigmoid: bool = False
    image_projection: bool = True
    labels: tuple[str, ...] = ()


class Clip(nn.Module):
    """Two towers that map images and texts to unit vectors of one space."""

    capabilities = frozenset({"embed", "similarity", "classify"})
    activation: LogitActivation = "softmax"
    embeds_first_token = False

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = config.vision.build()
        self.text = TextTower(config.text)
        if config.image_projection:
            self.image_projection = Linear(config.vision.dim, config.embed_dim, bias=False)
        self.text_projection = Linear(config.text.dim, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(()))  # ln(1 / temperature)
        if config.sigmoid:
            self.logit_bias = nn.Parameter(torch.empty(()))
        if config.labels:
            self.classes = Linear(config.vision.dim, len(config.labels))

    @property
    def objectives(self) -> frozenset[str]:
        """Training objectives that its parts allow."""
        optional = {"siglip": self.config.sigmoid, "mim": self.config.vision.has_class_token}
        return frozenset({"clip", "classes"} | {name for name in optional if optional[name]})

    @property
    def embed_dim(self) -> int:
        """Width of the embedding space."""
        return self.config.embed_dim

    def encode_image(self, pixels: Tensor) -> Encoded:
        """Image tower: pixels `[B, 3, S, S]` -> tokens `[B, N, D]`, pooled `[B, D]`."""
        return self.vision(pixels)

    def embed_image(self, image: Encoded) -> Tensor:
        """B encoded images -> `[B, P]`, unit length."""
        assert image.pooled is not None  # both kinds of tower pool
        pooled = self.image_projection(image.pooled) if self.config.image_projection else image.pooled
        return nn.functional.normalize(pooled, dim=-1)

    def embed_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids `[R, L]`, lengths `[R]` -> `[R, P]`, unit length. Tokens after EOS have no effect."""
        tokens = self.text(ids, lengths=lengths, causal=True).tokens  # [R, L, D]
        if self.config.end_is_largest_id:
            end = ids.argmax(dim=1)
        else:
            end = (ids == self.config.end_id).int().argmax(dim=1)
        pooled = tokens[torch.arange(ids.shape[0], device=ids.device), end]  # [R, D]
        return nn.functional.normalize(self.text_projection(pooled), dim=-1)

    def class_logits(self, similarity: Tensor) -> Tensor:
        """Cosines `[...]` -> logits `[...]`: times the learned scale, plus the bias if there is one."""
        logits = similarity * self.logit_scale.exp()
        return logits + self.logit_bias if self.config.sigmoid else logits

    def patch_attention(self, score: Literal["match", "similarity"]) -> PatchAttention | None:
        """The image tower's attention, if it is a transformer."""
        return (
            self.vision.patch_attention() if score == "similarity" and isinstance(self.vision, Vit) else None
        )

    def label_logits(self, image: Encoded) -> Tensor:
        """B encoded images -> logits `[B, C]` of the fine-tuned classes."""
        return self.classes(image.pooled)

    def add_label_head(self, labels: tuple[str, ...]) -> nn.Module:
        """Replaces the head for fine-tuned classes and returns it, to be initialized."""
        self.config = replace(self.config, labels=labels)
        self.classes = Linear(self.config.vision.dim, len(labels))
        return self.classes
