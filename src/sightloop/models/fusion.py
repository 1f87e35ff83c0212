"""BLIP's heads on other fusions of image and text than its cross-attention: late, both ways (METER), early (ViLT).

    late    image -> u, text -> v; an MLP reads [u, v, u * v, |u - v|]
    cross   the words read the image: `models.blip`
    both    the words read the image and the image reads the words, layer by layer (Dou et al. 2022, arXiv 2111.02387)
    early   patches and words are one sequence in one stack (Kim et al. 2021, arXiv 2102.03334)

All have BLIP's projections (ITC), ITM head and answer decoder, so that `match`, `rank` and `answer` are BLIP's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from sightloop.models.blip import Blip, BlipConfig, Decoder
from sightloop.nn.attention import Linear
from sightloop.nn.blocks import ACTIVATIONS, Block
from sightloop.protocols import PatchAttention
from sightloop.towers.text import TextTower
from sightloop.types import Encoded

FusionKind: TypeAlias = Literal["late", "both", "early"]


@dataclass(frozen=True, slots=True)
class FusionConfig(BlipConfig):
    """Sizes of a BLIP with another fusion.

    Args:
        fusion: how image and text meet.
        fusion_layers: co-attention layers of "both", after the towers' own; 0 for the others.
        decoder_layers: layers of the text decoder, which shares embeddings alone with the encoder (`shared`).

    Raises:
        ValueError: a text encoder with cross-attention or none at all; "both" without layers; "early" with a block in
            the image tower, or of another width.
    """

    fusion: FusionKind = "both"
    fusion_layers: int = 0
    decoder_layers: int = 1

    def __post_init__(self) -> None:
        BlipConfig.__post_init__(self)
        if not self.encoder or self.text.memory_dim is not None or self.embed_dim is None:
            raise ValueError("fusion: needs projections and a text encoder without cross-attention")
        if (self.fusion == "both") != (self.fusion_layers > 0):
            raise ValueError(f"fusion_layers: {self.fusion_layers} do not fit fusion {self.fusion}")
        if self.fusion == "early" and (self.vision.layers or self.vision.dim != self.text.dim):
            raise ValueError("early: the image tower is the patch embedding alone, of the text's width")


class LateFusion(nn.Module):
    """MLP on [u, v, u * v, |u - v|] of two unit vectors: image `[B, P]`, text `[R, P]` -> one token, `[R, 1, D]`.

    The features of Conneau et al. 2017 (arXiv 1705.02364), section 3.1.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        text, width = config.text, config.embed_dim or 0
        self.fc1, self.fc2 = Linear(4 * width, text.mlp_dim), Linear(text.mlp_dim, text.dim)
        self.activation = ACTIVATIONS[text.activation]
        self.scale = width**0.5  # entries of unit vectors are about 1 / sqrt(P)

    def forward(self, image: Tensor, text: Tensor) -> Encoded:
        v = text * self.scale
        u = (image * self.scale).repeat_interleave(len(v) // len(image), 0)
        pooled = self.fc2(self.activation(self.fc1(torch.cat([u, v, u * v, (u - v).abs()], dim=1))))
        return Encoded(pooled[:, None], pooled)


class CoAttention(nn.Module):
    """Co-attention layers (METER, section 3.1): in both streams self-attention, cross-attention to the other, MLP.

    Image tokens `[B, N, D_v]` and text states `[R, L, D]` -> text states `[R, L, D]`, pooled `[R, D]` of both streams.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        dim = config.text.dim
        block = config.text.block._replace(memory_dim=dim)
        self.image_in = Linear(config.vision.dim, dim)
        self.text_blocks = nn.ModuleList(Block(block) for _ in range(config.fusion_layers))
        self.image_blocks = nn.ModuleList(Block(block) for _ in range(config.fusion_layers))
        self.pool = Linear(2 * dim, dim)

    def forward(self, image: Tensor, text: Tensor, mask: Tensor) -> Encoded:
        x, y = text, self.image_in(image).repeat_interleave(len(text) // len(image), 0)
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
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.types = nn.Parameter(torch.empty(2, config.text.dim))  # of patches, of words

    def forward(self, stack: TextTower, image: Tensor, ids: Tensor, mask: Tensor) -> Encoded:
        """Image `[B, N, D]`, ids `[R, L]`, mask `[R, L]` -> states of the words `[R, L, D]`, pooled `[R, D]`."""
        patches = (image + self.types[0]).repeat_interleave(len(ids) // len(image), 0)
        x = torch.cat([patches, self._words(stack, ids)], dim=1)  # [R, N + L, D]
        valid = torch.cat([mask.new_ones(len(ids), image.shape[1]), mask], dim=1)
        words = _run(stack, x, valid)[:, image.shape[1] :]
        return Encoded(words, words[:, 0], mask)

    def image_state(self, stack: TextTower, image: Tensor) -> Tensor:
        """Patches alone: `[B, N, D]` -> state of the first one `[B, D]`."""
        return _run(stack, image + self.types[0], None)[:, 0]

    def text_state(self, stack: TextTower, ids: Tensor, mask: Tensor) -> Tensor:
        """Words alone: ids `[R, L]` -> state of the first one `[R, D]`."""
        return _run(stack, self._words(stack, ids), mask)[:, 0]

    def _words(self, stack: TextTower, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        return stack.add_positions(stack.embed_tokens(ids), positions) + self.types[1]


def _run(stack: TextTower, x: Tensor, mask: Tensor | None) -> Tensor:
    """The blocks of a tower on embeddings that have their positions: `[R, L, D]` -> `[R, L, D]`."""
    valid = None if mask is None else _attended(mask)
    for block in stack.layers:
        x = block(x, mask=valid)
    return x if stack.config.post_norm else stack.norm(x)


def _attended(mask: Tensor) -> Tensor | None:
    """bool `[R, L]` -> the mask of attention `[R, 1, 1, L]`; None without padding, for which kernels are faster."""
    return None if bool(mask.all()) else mask[:, None, None]


class FusionBlip(Blip):
    """BLIP whose image and text meet late, both ways or early."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__(replace(config, decoder=False, shared=False, answers=False))
        self.config = config
        self.kind: FusionKind = config.fusion
        # "early": the image tower only cuts patches.
        self.embeds_first_token = config.fusion != "early"
        if config.decoder:
            text = replace(config.text, memory_dim=config.decoder_memory_dim, layers=config.decoder_layers)
            self.decoder = Decoder(text, tied_words=config.tied_words)
        if config.decoder and config.shared:
            tower = self.decoder.text
            tower.word, tower.position, tower.norm = (
                self.encoder.word,
                self.encoder.position,
                self.encoder.norm,
            )
            if config.tied_words:
                self.decoder.head.words.weight = self.encoder.word_weight
        if config.fusion == "late":
            self.late = LateFusion(config)
        elif config.fusion == "both":
            self.both = CoAttention(config)
        else:
            self.early = EarlyFusion(config)

    @property
    def capabilities(self) -> frozenset[str]:
        """BLIP's, without captions of "early", whose image tokens have not seen each other."""
        return super().capabilities - ({"caption"} if self.kind == "early" else set())

    @property
    def objectives(self) -> frozenset[str]:
        """BLIP's, without what needs states of words ("late") or of patches alone ("early")."""
        lacks = {"late": {"mlm"}, "both": set[str](), "early": {"lm", "mim"}}
        return super().objectives - lacks[self.kind]

    def embed_image(self, image: Encoded) -> Tensor:
        """B encoded images -> `[B, P]`, unit length (ITC)."""
        return nn.functional.normalize(self.image_projection(self._image_state(image)), dim=-1)

    def embed_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids `[R, L]`, lengths `[R]` -> `[R, P]`, unit length (ITC)."""
        if self.kind != "early":
            return super().embed_text(ids, lengths)
        first = self.early.text_state(self.encoder, ids, _valid(ids, lengths))
        return nn.functional.normalize(self.text_projection(first), dim=-1)

    def label_logits(self, image: Encoded) -> Tensor:
        """B encoded images -> logits `[B, C]` of the fine-tuned classes."""
        return self.classes(self._image_state(image))

    def encode_text(self, image: Encoded, ids: Tensor, lengths: Tensor) -> Encoded:
        """Text read with its image.

        Args:
            image: B encoded images.
            ids: `[R, L]`, R a multiple of B, the texts of one image together.
            lengths: `[R]`, tokens without padding.

        Returns:
            tokens `[R, L, D]`, of "late" `[R, 1, D]`; pooled `[R, D]`, from which ITM judges; mask `[R, L]` or None.
        """
        if self.kind == "late":  # the vectors of an index of embeddings are all it needs
            return self.late(self.embed_image(image), self.embed_text(ids, lengths))
        mask = _valid(ids, lengths)
        if self.config.encoder_start is not None:
            ids = ids.clone()
            ids[:, 0] = self.config.encoder_start
        if self.kind == "early":
            return self.early(self.encoder, image.tokens, ids, mask)
        return self.both(image.tokens, self.encoder(ids, lengths=lengths).tokens, mask)

    def patch_attention(self, score: Literal["match", "similarity"]) -> PatchAttention | None:
        """The words' cross-attention ("both", ITM) or the image tower's attention (ITC); None where nothing asks."""
        if self.kind == "early":
            return None
        if score == "similarity":
            return super().patch_attention(score)
        skip = int(self.config.vision.has_class_token)
        if self.kind == "late":
            return None
        return PatchAttention([block.cross for block in self.both.text_layers], "text", skip)

    def _image_state(self, image: Encoded) -> Tensor:
        return (
            self.early.image_state(self.encoder, image.tokens) if self.kind == "early" else image.tokens[:, 0]
        )


def _valid(ids: Tensor, lengths: Tensor) -> Tensor:
    """bool `[R, L]`, False for padding."""
    return torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
