"""Image-text matching: the ITM head over pairs, many texts against one image at once, and what a score looks at.

Grad-CAM of attention (Selvaraju et al. 2017; on cross-attention Li et al. 2021, ALBEF): for attention weights A of a
layer and a score s, the evidence of an image token is A * max(0, ds/dA), averaged over heads and over the rows that ask
(words of the text, or the class token).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sightloop.protocols import Matcher, WatchedAttention
from sightloop.types import Encoded


@torch.inference_mode()
def match_logits(network: Matcher, image: Encoded, ids: Tensor, lengths: Tensor) -> Tensor:
    """ITM logits of K texts for each of B images.

    Args:
        network: with an ITM head.
        image: B encoded images.
        ids: `[B * K, L]`, the texts of one image together.
        lengths: `[B * K]`, tokens without padding.

    Returns:
        float32 `[B * K, 2]`: (no match, match).
    """
    return network.match_logits(image, ids, lengths).float()


def match_probability(logits: Tensor) -> Tensor:
    """ITM logits `[R, 2]` -> probability of a match `[R]` (Li et al. 2022, section 3.2)."""
    return logits.softmax(dim=-1)[:, 1]


def grad_cam(layers: Sequence[WatchedAttention], score: Callable[[], Tensor]) -> list[Tensor]:
    """Evidence of every attention weight.

    Needs gradients of the attention weights alone: weights of the network may be packed, and stay as they are.

    Args:
        layers: Attention layers that `score` runs, in the order of the forward pass.
        score: Runs the network; returns the scores `[R]` to explain, each of which depends on its own rows alone.

    Returns:
        For each layer float32 `[B, H, Q, N]`: weight times positive part of its gradient; zero where none reaches it.
    """
    with torch.inference_mode(False), torch.enable_grad(), watch(layers) as weights:
        total = score().float().sum()
        gradients = torch.autograd.grad(total, weights, allow_unused=True, materialize_grads=True)
    return [
        (weight.detach() * gradient.clamp(min=0)).float()
        for weight, gradient in zip(weights, gradients, strict=True)
    ]


@contextmanager
def watch(layers: Sequence[WatchedAttention]) -> Generator[list[Tensor]]:
    """Collects the attention weights `[B, H, Q, N]` that this thread computes in the layers, with gradients."""
    thread, seen = threading.get_ident(), list[Tensor]()

    def watcher(weights: Tensor) -> Tensor:
        if threading.get_ident() != thread:  # another request on the same network
            return weights
        if not weights.requires_grad:
            weights = weights.detach().requires_grad_()
        seen.append(weights)
        return weights

    before = [layer.watcher for layer in layers]
    try:
        for layer in layers:
            layer.watcher = watcher
        yield seen
    finally:
        for layer, former in zip(layers, before, strict=True):
            layer.watcher = former
