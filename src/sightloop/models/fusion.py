"""How a BLIP's image and text meet: late, across (BLIP itself), both ways (METER) or early (ViLT).

late    image -> u, text -> v; an MLP reads [u, v, u * v, |u - v|]
cross   the words read the image: BLIP's own text encoder
both    the words read the image and the image reads the words, layer by layer (Dou et al. 2022, arXiv 2111.02387)
early   patches and words are one sequence in one stack (Kim et al. 2021, arXiv 2102.03334)
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from sightloop.nn.attention import Linear, mask_from_lengths
from sightloop.nn.blocks import ACTIVATIONS, Block
from sightloop.towers.text import TextConfig, TextTower
from sightloop.types import Encoded

FusionKind: TypeAlias = Literal["late", "cross", "both", "early"]


class LateFusion(nn.Module):
    """MLP on [u, v, u * v, |u - v|] of two unit vectors: image `[B, P]`, text `[R, P]` -> one token, `[R, 1, D]`.

    The features of Conneau et al. 2017 (arXiv 1705.02364), section 3.1.

    Args:
        text: config of the text encoder.
        width: P.
    """

    def __init__(self, text: TextConfig, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear(4 * width, text.mlp_dim), Linear(text.mlp_dim, text.dim)
        self.activation = ACTIVATIONS[text.activation]
        self.scale = width**0.5  # entries of unit vectors are about 1 / sqrt(P)

    def forward(self, image: Tensor, text: Tensor) -> Encoded:
        v = text * self.scale
        u = (image * self.scale).repeat_interleave(len(v) // len(image), 0)
        pooled = self.fc2(self.activation(self.fc1(torch.cat([u, v, u * v, (u - v).abs()], dim=1))))
        return Encoded(pooled[:, None], pooled)


class MutualFusion(nn.Module):
    """Co-attention layers (METER, section 3.1): in both streams self-attention, cross-attention to the other, MLP.

    Args:
        text: config of the text encoder, whose states come in.
        image_dim: width of the image tokens.
        layers: number of layers.
    """

    def __init__(self, text: TextConfig, image_dim: int, layers: int) -> None:
        super().__init__()
        block = text.block._replace(memory_dim=text.dim)
        self.image_in = Linear(image_dim, text.dim)
        self.text_blocks = nn.ModuleList(Block(block) for _ in range(layers))
        self.image_blocks = nn.ModuleList(Block(block) for _ in range(layers))
        self.pool = Linear(2 * text.dim, text.dim)

    def forward(self, encoder: TextTower, image: Tensor, ids: Tensor, mask: Tensor) -> Encoded:
        """Image `[B, N, D_v]`, ids `[R, L]`, mask `[R, L]` -> states `[R, L, D]`, pooled `[R, D]` of both streams."""
        x = encoder(ids, lengths=mask.sum(1)).tokens
        y = self.image_in(image).repeat_interleave(len(ids) // len(image), 0)
        valid = _attended(mask)
        for reader, viewer in zip(self.text_layers, self.image_layers, strict=True):
            # Both read the other's states of the layer before.
            read, seen = reader.cross.memory(y), viewer.cross.memory(x)
            x, y = reader(x, mask=valid, memory=read), viewer(y, memory=seen, memory_mask=valid)
        pooled = self.pool(torch.cat([x[:, 0], y[:, 0]], dim=1)).tanh()
        return Encoded(x, pooled, mask)

    @property
    def text_layers(self) -> list[Block]:
        """The blocks of the text stream, in order."""
        return [block for block in self.text_blocks if isinstance(block, Block)]

    @property
    def image_layers(self) -> list[Block]:
        """The blocks of the image stream, in order."""
        return [block for block in self.image_blocks if isinstance(block, Block)]


class EarlyFusion(nn.Module):
    """One stack for patches and words, told apart by type embeddings (ViLT, section 3.1); its blocks are the encoder's.

    Each modality can go through alone (VLMo, Bao et al. 2022, arXiv 2111.02358), for ITC.

    Args:
        text: config of the text encoder, whose blocks are the stack.
    """

    def __init__(self, text: TextConfig) -> None:
        super().__init__()
        self.types = nn.Parameter(torch.empty(2, text.dim))  # of patches, of words

    def forward(self, encoder: TextTower, image: Tensor, ids: Tensor, mask: Tensor) -> Encoded:
        """Image `[B, N, D]`, ids `[R, L]`, mask `[R, L]` -> states of the words `[R, L, D]`, pooled `[R, D]`."""
        patches = (image + self.types[0]).repeat_interleave(len(ids) // len(image), 0)
        x = torch.cat([patches, self._words(encoder, ids)], dim=1)  # [R, N + L, D]
        valid = torch.cat([mask.new_ones(len(ids), image.shape[1]), mask], dim=1)
        words = _run(encoder, x, valid)[:, image.shape[1] :]
        return Encoded(words, words[:, 0], mask)

    def image_state(self, encoder: TextTower, image: Tensor) -> Tensor:
        """Patches alone: `[B, N, D]` -> state of the first one `[B, D]`."""
        return _run(encoder, image + self.types[0], None)[:, 0]

    def text_state(self, encoder: TextTower, ids: Tensor, lengths: Tensor) -> Tensor:
        """Words alone: ids `[R, L]`, lengths `[R]` -> state of the first one `[R, D]`."""
        mask = mask_from_lengths(lengths, ids.shape[1])[:, 0, 0]
        return _run(encoder, self._words(encoder, ids), mask)[:, 0]

    def _words(self, encoder: TextTower, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        return encoder.add_positions(encoder.embed_tokens(ids), positions) + self.types[1]


def fits(kind: FusionKind, layers: int, *, towers: bool, is_patches: bool) -> bool:
    """Whether the parts of a BLIP fit a fusion.

    Args:
        kind: the fusion.
        layers: co-attention layers.
        towers: there are projections and a text encoder without cross-attention.
        is_patches: the image tower cuts patches of the text's width, and no more.
    """
    parts = towers or kind == "cross"
    return parts and (kind == "both") == (layers > 0) and (is_patches or kind != "early")


def build_fusion(
    kind: FusionKind, text: TextConfig, image_dim: int, width: int, layers: int
) -> LateFusion | MutualFusion | EarlyFusion | None:
    """Where image and text meet behind a text encoder of this config; None for "cross", the encoder itself.

    Args:
        kind: the fusion.
        text: config of the text encoder.
        image_dim: width of the image tokens.
        width: P of the unit vectors.
        layers: co-attention layers of "both".
    """
    if kind == "late":
        return LateFusion(text, width)
    if kind == "both":
        return MutualFusion(text, image_dim, layers)
    return EarlyFusion(text) if kind == "early" else None


def _run(encoder: TextTower, x: Tensor, mask: Tensor | None) -> Tensor:
    """The blocks of a tower on embeddings that have their positions: `[R, L, D]` -> `[R, L, D]`."""
    valid = None if mask is None else _attended(mask)
    for block in encoder.layers:
        x = block(x, mask=valid)
    return x if encoder.config.post_norm else encoder.norm(x)


def _attended(mask: Tensor) -> Tensor | None:
    """bool `[R, L]` -> the mask of attention `[R, 1, 1, L]`; None without padding, for which kernels are faster."""
    return None if bool(mask.all()) else mask[:, None, None]
