"""BLIP: an image tower, a text encoder that embeds (ITC) and matches (ITM), and a text decoder that writes (LM).

Li et al. 2022, arXiv 2201.12086, section 3.1 and figure 2. A checkpoint may hold any of the parts. `models.fusion` has
other ways in which image and text may meet.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from sightloop.models.blip_config import BlipConfig
from sightloop.models.fusion import EarlyFusion, LateFusion, build_fusion
from sightloop.models.fusion import FusionKind as FusionKind
from sightloop.models.text_decoder import Decoder, share_weights
from sightloop.models.text_decoder import LmHead as LmHead
from sightloop.nn.attention import Linear, mask_from_lengths
from sightloop.protocols import AttentiveTower, PatchAttention, require
from sightloop.towers.text import TextTower
from sightloop.towers.vit import VitConfig
from sightloop.types import Encoded, LogitActivation


class Blip(nn.Module):
    """BLIP: all heads over one image tower; parts that a checkpoint lacks are absent."""

    activation: LogitActivation = "softmax"

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = config.vision.build()
        if config.encoder:
            self.encoder = TextTower(config.text)
        if config.decoder:
            layers = config.decoder_layers or config.text.layers
            reads = replace(config.text, memory_dim=config.decoder_memory_dim, layers=layers)
            self.decoder = Decoder(reads, tied_words=config.tied_words)
        if config.shared:
            share_weights(self.encoder, self.decoder, blocks=config.fusion == "cross")
        sizes = config.vision.dim, config.embed_dim or 0, config.fusion_layers
        self.fusion = build_fusion(config.fusion, config.text, *sizes)
        if config.embed_dim is not None:
            self.image_projection = Linear(config.vision.dim, config.embed_dim)
            self.text_projection = Linear(config.text.dim, config.embed_dim)
        if config.matching:
            self.match_head = Linear(config.text.dim, 2)
        if config.attributes:
            self.attribute_head = Linear(config.text.dim, len(config.attributes))
        if config.labels:
            self.classes = Linear(config.vision.dim, len(config.labels))
        if config.temperature:
            self.temperature = nn.Parameter(torch.empty(()))

    @property
    def capabilities(self) -> frozenset[str]:
        """Verbs that this checkpoint's parts allow."""
        config = self.config
        embeds = config.encoder and config.embed_dim is not None
        # Unless it says so, one with encoder and decoder but no matching head was fine-tuned for questions.
        writes = config.decoder and (config.answers or not config.encoder or config.matching)
        parts = {
            "embed": embeds,
            "similarity": embeds,
            "classify": (embeds and config.temperature) or bool(config.labels),
            "match": config.matching,
            "rank": config.matching and embeds,
            "caption": writes and config.fusion != "early",  # whose image tokens have not seen each other
            "answer": config.answers or (config.decoder and config.encoder and not config.matching),
        }
        return frozenset(name for name in parts if parts[name])

    @property
    def objectives(self) -> frozenset[str]:
        """Training objectives that its parts allow."""
        config = self.config
        embeds = config.embed_dim is not None and config.temperature
        early = config.fusion == "early"
        talks = config.encoder and config.fusion == "cross" and config.vision.dim == config.text.dim
        parts = {
            "itc": embeds and config.encoder,
            "itm": embeds and config.matching,
            "lm": config.decoder and config.decoder_memory_dim == config.vision.dim and not early,
            "vqa": config.decoder and config.encoder and config.decoder_memory_dim == config.text.dim,
            "mlm": config.encoder and config.fusion != "late",
            "mim": isinstance(config.vision, VitConfig) and config.vision.has_class_token and not early,
            "classes": True,
            "dialogue": talks and config.matching,
            "attributes": talks and config.matching,
            "reply": talks and config.decoder and config.decoder_memory_dim == config.text.dim,
        }
        return frozenset(name for name in parts if parts[name])

    @property
    def embeds_first_token(self) -> bool:
        """Whether an image's embedding depends on its first token alone."""
        return self.config.fusion != "early"

    @property
    def matches_embeddings(self) -> bool:
        """Whether ITM judges from the vectors of ITC alone."""
        return self.config.fusion == "late"

    @property
    def embed_dim(self) -> int:
        """Width of the ITC space, 0 without the projections."""
        return self.config.embed_dim or 0

    @property
    def pad_id(self) -> int:
        """Id of padding."""
        return self.config.pad_id

    @property
    def match_cosine(self) -> float | None:
        """Weight of the ITC cosine in the logit of "match"; None if it cannot be added."""
        return self.config.match_cosine

    def encode_image(self, pixels: Tensor) -> Encoded:
        """Image tower: pixels `[B, 3, S, S]` -> tokens `[B, N, D]`, pooled `[B, D]`."""
        return self.vision(pixels)

    def embed_image(self, image: Encoded) -> Tensor:
        """B encoded images -> `[B, P]`, unit length (ITC)."""
        return nn.functional.normalize(self.image_projection(self._image_state(image)), dim=-1)

    def embed_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids `[R, L]`, lengths `[R]` -> `[R, P]`, unit length (ITC)."""
        if isinstance(self.fusion, EarlyFusion):
            first = self.fusion.text_state(self.encoder, ids, lengths)
        else:
            first = self.encoder(ids, lengths=lengths).tokens[:, 0]
        return nn.functional.normalize(self.text_projection(first), dim=-1)

    def class_logits(self, similarity: Tensor) -> Tensor:
        """Cosines `[...]` -> logits `[...]`: divided by the learned ITC temperature."""
        return similarity / self.temperature

    def label_logits(self, image: Encoded) -> Tensor:
        """B encoded images -> logits `[B, C]` of the fine-tuned classes."""
        return self.classes(self._image_state(image) if self.config.fusion == "early" else image.pooled)

    def add_label_head(self, labels: tuple[str, ...]) -> nn.Module:
        """Replaces the head for fine-tuned classes and returns it, to be initialized."""
        self.config = replace(self.config, labels=labels)
        self.classes = Linear(self.config.vision.dim, len(labels))
        return self.classes

    def learn_dialogue(self, attributes: tuple[str, ...]) -> nn.Module | None:
        """Says that ITM judges answers; returns a new head for attributes, to be initialized, where names differ."""
        is_new = attributes != self.config.attributes
        self.config = replace(self.config, dialogue=True, attributes=attributes)
        if is_new and attributes:
            self.attribute_head = Linear(self.config.text.dim, len(attributes))
        return self.attribute_head if is_new and attributes else None

    def encode_text(self, image: Encoded, ids: Tensor, lengths: Tensor) -> Encoded:
        """Text read with its image (the image-grounded encoder of figure 2, or another fusion).

        Args:
            image: B encoded images, with a mask where captions come after them (`read_caption`).
            ids: `[R, L]`, R a multiple of B, the texts of one image together.
            lengths: `[R]`, tokens without padding.

        Returns:
            tokens `[R, L, D]`, of "late" `[R, 1, D]`; pooled `[R, D]`, from which ITM judges; mask `[R, L]` or None.
        """
        if isinstance(self.fusion, LateFusion):
            return self.fusion(self.embed_image(image), self.embed_text(ids, lengths))
        mask = mask_from_lengths(lengths, ids.shape[1])[:, 0, 0]
        if self.config.encoder_start is not None:
            ids = ids.clone()
            ids[:, 0] = self.config.encoder_start
        if self.fusion is not None:
            return self.fusion(self.encoder, image.tokens, ids, mask)
        memory, seen = (
            self.encoder.memory(image.tokens),
            None if image.mask is None else image.mask[:, None, None],
        )
        tokens = self.encoder(ids, lengths=lengths, memory=memory, memory_mask=seen).tokens
        return Encoded(tokens, tokens[:, 0], mask)

    def read_caption(self, image: Encoded, ids: Tensor, lengths: Tensor) -> Encoded:
        """What a dialogue is about (section 5.5): B images followed by their captions, ids `[B, L]`, lengths `[B]`."""
        caption = self.encoder(ids, lengths=lengths).tokens
        here = torch.ones(image.tokens.shape[:2], dtype=torch.bool, device=ids.device)
        mask = torch.cat([here, mask_from_lengths(lengths, ids.shape[1])[:, 0, 0]], 1)
        return Encoded(torch.cat([image.tokens, caption.to(image.tokens.dtype)], 1), mask=mask)

    def judge_answers(self, memory: Encoded, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """ITM logits `[R, 2]` and attribute logits `[R, A]` of "history question? answer" `[R, L]` over B memories."""
        state = self.encode_text(memory, ids, lengths).tokens[:, 0]
        return self.match_head(state), self.attribute_head(state) if self.config.attributes else state[:, :0]

    def match_logits(self, image: Encoded, ids: Tensor, lengths: Tensor) -> Tensor:
        """ITM logits `[R, 2]`, (no match, match): ids `[R, L]` over B images, the texts of one image together."""
        if self.matches_embeddings:
            return self.match_embeddings(self.embed_image(image), self.embed_text(ids, lengths))
        states = self.encode_text(image, ids, lengths)
        if not self.config.match_cosine:
            return self.match_head(states.pooled)
        return self._judge(states, self.embed_image(image), self.embed_text(ids, lengths))

    def match_embeddings(self, image: Tensor, text: Tensor) -> Tensor:
        """ITM logits `[R, 2]` of "late" fusion: unit vectors of B images `[B, P]` and their texts `[R, P]`."""
        assert isinstance(self.fusion, LateFusion)
        return self._judge(self.fusion(image, text), image, text)

    def _judge(self, states: Encoded, image: Tensor, text: Tensor) -> Tensor:
        logits = self.match_head(states.pooled)
        cosines = (text.unflatten(0, (len(image), -1)) @ image[..., None]).flatten()
        logits[:, 1] += self.config.match_cosine * cosines
        return logits

    def patch_attention(self, score: Literal["match", "similarity"]) -> PatchAttention | None:
        """The words' cross-attention (ITM), or the image tower's attention (ITC); None where a fusion has neither."""
        if isinstance(self.fusion, EarlyFusion) or (score == "match" and self.matches_embeddings):
            return None
        if score == "similarity" or isinstance(self.fusion, LateFusion):
            return require(self.vision, AttentiveTower).patch_attention()
        layers = self.encoder.layers if self.fusion is None else self.fusion.text_layers
        skip = int(self.config.vision.has_class_token)
        return PatchAttention([block.cross for block in layers], "text", skip)

    def calibrate_match(self, threshold: float, match_cosine: float) -> None:
        """Subtracts a threshold from the logit of "match", and sets the weight of the ITC cosine."""
        self.config = replace(self.config, match_cosine=match_cosine)
        bias = self.match_head.bias
        assert bias is not None
        with torch.no_grad():
            bias[1] -= threshold

    def frame_text(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Tokenized texts, ids `[R, L]` and lengths `[R]`, with the decoder's first token in place of [CLS]."""
        ids = ids.clone()
        ids[:, 0] = self.config.start_id
        return ids, lengths

    def decoder_states(self, memory: Encoded, ids: Tensor) -> Tensor:
        """For training: ids `[R, L]` over B memories, tokens `[B, N, D]` -> states `[R, L, D]`, causal."""
        mask = None if memory.mask is None else memory.mask[:, None, None, :]
        tower = self.decoder.text
        return tower(ids, causal=True, memory=tower.memory(memory.tokens), memory_mask=mask).tokens

    def lm_logits(self, states: Tensor) -> Tensor:
        """The decoder's states `[..., D]` -> next-token logits `[..., V]`."""
        return self.decoder.head(states)

    def _image_state(self, image: Encoded) -> Tensor:
        early = self.fusion if isinstance(self.fusion, EarlyFusion) else None
        return image.tokens[:, 0] if early is None else early.image_state(self.encoder, image.tokens)
