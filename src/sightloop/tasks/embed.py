"""Embeddings, zero-shot classification: images and texts as unit vectors of one space."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from sightloop.types import Encoded

# What a probability of a class says: which of these it is ("softmax"), or whether it is this one ("sigmoid").
LogitActivation = Literal["softmax", "sigmoid"]


class Embedder(Protocol):
    """What a network must offer to embed."""

    def embed_image(self, image: Encoded) -> Tensor: ...

    def embed_text(self, ids: Tensor, lengths: Tensor) -> Tensor: ...

    def class_logits(self, similarity: Tensor) -> Tensor: ...

    def label_logits(self, image: Encoded) -> Tensor: ...


@torch.inference_mode()
def embed_images(net: Embedder, images: Encoded) -> Tensor:
    """B encoded images -> float32 `[B, P]`, or `[B, Q, P]` where an image has several vectors; unit length."""
    return net.embed_image(images).float()


@torch.inference_mode()
def embed_texts(net: Embedder, ids: Tensor, lengths: Tensor) -> Tensor:
    """ids `[R, L]`, lengths `[R]` -> float32 `[R, P]`, unit length."""
    return net.embed_text(ids, lengths).float()


def similarities(images: Tensor, texts: Tensor) -> Tensor:
    """Cosines `[B, R]` of images `[B, P]` with texts `[R, P]`.

    Of several vectors an image, `[B, Q, P]`, the nearest to a text counts (BLIP-2, Li et al. 2023, section 3.1).
    """
    cosines = images @ texts.t()
    return cosines if images.dim() == 2 else cosines.amax(dim=1)


@torch.inference_mode()
def class_probabilities(net: Embedder, images: Tensor, classes: Tensor, reading: LogitActivation) -> Tensor:
    """images as in `similarities`, classes `[C, P]`, unit length -> float32 `[B, C]`; with "softmax" rows sum to 1."""
    logits = net.class_logits(similarities(images, classes)).float()
    return logits.sigmoid() if reading == "sigmoid" else logits.softmax(dim=-1)


@torch.inference_mode()
def label_probabilities(net: Embedder, images: Encoded) -> Tensor:
    """B encoded images -> float32 `[B, C]` over the classes that were learned, rows sum to 1."""
    return net.label_logits(images).float().softmax(dim=-1)


def ensemble(texts: Tensor, templates: int) -> Tensor:
    """One unit vector a class from `[C * templates, P]`: the mean over its templates, normalised again.

    Radford et al. 2021, section 3.1.4: the ensemble is built in embedding space.
    """
    mean = texts.view(-1, templates, texts.shape[1]).mean(dim=1)
    return torch.nn.functional.normalize(mean, dim=-1)
