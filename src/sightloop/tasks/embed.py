"""Embedding and zero-shot classification: images and texts as unit vectors of one space."""

from __future__ import annotations

import torch
from torch import Tensor

from sightloop.protocols import Embedder, LabelClassifier
from sightloop.tasks.finite import (
    require_finite as require_finite,
)  # what callers check results of this file with
from sightloop.types import Encoded, LogitActivation


@torch.inference_mode()
def embed_images(network: Embedder, images: Encoded) -> Tensor:
    """B encoded images -> float32 `[B, P]`, or `[B, Q, P]` if an image has several vectors; unit length.

    Of videos, tokens `[B, F * N, D]`, BLIP's ITC (eval_retrieval_video.py): the mean of the frames' projected class
    tokens, made of unit length. The projection is linear: that of the mean is the mean of those. Where a vector is of
    more than the first token (BLIP-2), the mean of the frames' unit vectors.
    """
    if images.frames == 1:
        return network.embed_image(images).float()
    by_frame = images.tokens.unflatten(1, (images.frames, -1))  # [B, F, N, D]
    if network.embeds_first_token:
        mean = by_frame[:, :, 0].float().mean(dim=1, keepdim=True).to(by_frame.dtype)
        return network.embed_image(Encoded(mean, images.pooled)).float()
    vectors = network.embed_image(Encoded(by_frame.flatten(0, 1))).float().unflatten(0, (-1, images.frames))
    return torch.nn.functional.normalize(vectors.mean(dim=1), dim=-1)


@torch.inference_mode()
def embed_texts(network: Embedder, ids: Tensor, lengths: Tensor) -> Tensor:
    """ids `[R, L]`, lengths `[R]` -> float32 `[R, P]`, unit length."""
    return network.embed_text(ids, lengths).float()


def similarities(images: Tensor, texts: Tensor) -> Tensor:
    """Cosines of images and texts.

    Args:
        images: `[B, P]`, or `[B, Q, P]`: the vector nearest to the text counts (BLIP-2, Li et al. 2023, section 3.1).
        texts: `[R, P]`.

    Returns:
        `[B, R]`.
    """
    cosines = images @ texts.t()
    return cosines if images.dim() == 2 else cosines.amax(dim=1)


@torch.inference_mode()
def class_probabilities(
    network: Embedder, images: Tensor, classes: Tensor, activation: LogitActivation
) -> Tensor:
    """Zero-shot probabilities.

    Args:
        network: scales the cosines.
        images: embeddings `[B, P]` or `[B, Q, P]`.
        classes: embeddings `[C, P]`.
        activation: "softmax" (rows sum to 1) or "sigmoid".

    Returns:
        float32 `[B, C]`.
    """
    logits = network.class_logits(similarities(images, classes)).float()
    return logits.sigmoid() if activation == "sigmoid" else logits.softmax(dim=-1)


@torch.inference_mode()
def label_probabilities(network: LabelClassifier, images: Encoded) -> Tensor:
    """B encoded images -> float32 `[B, C]` over the fine-tuned classes; rows sum to 1."""
    return network.label_logits(images).float().softmax(dim=-1)


def ensemble(texts: Tensor, templates: int) -> Tensor:
    """Class embeddings averaged over templates (Radford et al. 2021, section 3.1.4).

    Args:
        texts: `[C * templates, P]`, the templates of one class together.
        templates: how many a class has.

    Returns:
        `[C, P]`, unit length.
    """
    mean = texts.view(-1, templates, texts.shape[1]).mean(dim=1)
    return torch.nn.functional.normalize(mean, dim=-1)
