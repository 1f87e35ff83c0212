"""BLIP: an image tower, a text encoder that embeds (ITC) and matches (ITM), and a text decoder that writes (LM).

Li et al. 2022, arXiv 2201.12086, section 3.1 and figure 2. A checkpoint may hold any of the parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from sightloop.nn.attention import Linear
from sightloop.nn.blocks import ACTIVATIONS
from sightloop.protocols import AttentiveTower, ImageTowerConfig, PatchAttention, require
from sightloop.towers.text import DecodeState, TextConfig, TextTower
from sightloop.towers.vit import VitConfig
from sightloop.types import Encoded, LogitActivation


@dataclass(frozen=True, slots=True)
class BlipConfig:
    """Sizes of BLIP's towers, which parts there are, and the special tokens.

    Args:
        vision: the image tower's config: a vision transformer, or an EfficientNet-Lite0.
        text: config of the text encoder and, with another memory, of the text decoder.
        decoder_memory_dim: width of the decoder's memory: image tokens, or in VQA the question's states.
        encoder: whether there is a text encoder.
        decoder: whether there is a text decoder.
        matching: whether there is an ITM head.
        embed_dim: width of the ITC space, None without the projections.
        temperature: whether there is a learned ITC temperature.
        shared: encoder and decoder share all parameters but those of self-attention (the paper's table 3).
        tied_words: the LM head's matrix is the token embedding.
        start_id: id that the decoder reads first ([DEC]).
        end_id: id of EOS ([SEP]).
        pad_id: id of padding.
        encoder_start: id that the text encoder reads first beside an image ([ENC] in the original code); None to keep
            [CLS], as `transformers` does.
        answers: the one decoder captions images and answers questions from their states; it reads both, so image and
            text tower have one width.
        labels: names of fine-tuned classes; a linear head on the class token's state tells them apart.
        match_cosine: weight of the ITC cosine that is added to the ITM logit of "match"; 0 in the paper, set by
            `training.calibration`.

    Raises:
        ValueError: `answers` without encoder and decoder of one width.
    """

    vision: ImageTowerConfig
    text: TextConfig
    decoder_memory_dim: int | None
    encoder: bool
    decoder: bool
    matching: bool
    embed_dim: int | None
    temperature: bool
    shared: bool
    tied_words: bool
    start_id: int
    end_id: int
    pad_id: int
    encoder_start: int | None
    answers: bool = False
    labels: tuple[str, ...] = ()
    match_cosine: float = 0.0

    def __post_init__(self) -> None:
        widths = {self.vision.dim, self.text.dim, self.decoder_memory_dim}
        if self.answers and (len(widths) > 1 or not (self.encoder and self.decoder)):
            here = f"{self.vision.dim}, {self.text.dim} and {self.decoder_memory_dim}"
            raise ValueError(f"answers: needs an encoder, a decoder and one width of all, not {here}")


class LmHead(nn.Module):
    """BERT's language modeling head: dense, activation, norm, then a logit for every word: `[..., D]` -> `[..., V]`."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = Linear(config.dim, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.words = Linear(config.dim, config.vocab)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.words(self.norm(self.activation(self.dense(x))))


class Decoder(nn.Module):
    """Text decoder over a memory (image tokens, or the states of a question): text tower and LM head."""

    def __init__(self, config: TextConfig, *, tied_words: bool) -> None:
        super().__init__()
        self.text = TextTower(config)
        self.head = LmHead(config)
        if tied_words:
            self.head.words.weight = self.text.word_weight

    def start(self, memory: Encoded, capacity: int) -> DecodeState:
        """Decoder state with one row a memory, tokens `[B, N, D]`, for up to `capacity` tokens a row."""
        return self.text.start(memory, capacity)

    def next_logits(self, ids: Tensor, state: DecodeState) -> Tensor:
        """Appends ids `[R, L]` -> logits `[R, V]` of the token after them."""
        return self.head(self.text.step(ids, state)[:, -1])

    def all_logits(self, ids: Tensor, state: DecodeState) -> Tensor:
        """Appends ids `[R, L]` -> logits `[R, L, V]` of the token after each of them."""
        return self.head(self.text.step(ids, state))


class Blip(nn.Module):
    """BLIP: all heads over one image tower; parts that a checkpoint lacks are absent."""

    activation: LogitActivation = "softmax"
    embeds_first_token = True

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = config.vision.build()
        if config.encoder:
            self.encoder = TextTower(config.text)
        if config.decoder:
            reads = replace(config.text, memory_dim=config.decoder_memory_dim)
            self.decoder = Decoder(reads, tied_words=config.tied_words)
        if config.shared:
            _share(self.encoder, self.decoder)
        if config.embed_dim is not None:
            self.image_projection = Linear(config.vision.dim, config.embed_dim)
            self.text_projection = Linear(config.text.dim, config.embed_dim)
        if config.matching:
            self.match_head = Linear(config.text.dim, 2)
        if config.labels:
            self.classes = Linear(config.vision.dim, len(config.labels))
        if config.temperature:
            self.temperature = nn.Parameter(torch.empty(()))

    @property
    def capabilities(self) -> frozenset[str]:
        """Verbs that this checkpoint's parts allow."""
        config = self.config
        embeds = config.encoder and config.embed_dim is not None
        parts = {
            "embed": embeds,
            "similarity": embeds,
            "classify": (embeds and config.temperature) or bool(config.labels),
            "match": config.matching,
            "rank": config.matching and embeds,
            # Unless it says so, one with encoder and decoder but no matching head was fine-tuned for questions.
            "caption": config.decoder and (config.answers or not config.encoder or config.matching),
            "answer": config.answers or (config.decoder and config.encoder and not config.matching),
        }
        return frozenset(name for name in parts if parts[name])

    @property
    def objectives(self) -> frozenset[str]:
        """Training objectives that its parts allow."""
        config = self.config
        embeds = config.embed_dim is not None and config.temperature
        parts = {
            "itc": embeds and config.encoder,
            "itm": embeds and config.matching,
            "lm": config.decoder and config.decoder_memory_dim == config.vision.dim,
            "vqa": config.decoder and config.encoder and config.decoder_memory_dim == config.text.dim,
            "mlm": config.encoder,
            "mim": isinstance(config.vision, VitConfig) and config.vision.has_class_token,
            "classes": True,
        }
        return frozenset(name for name in parts if parts[name])

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
        return nn.functional.normalize(self.image_projection(image.tokens[:, 0]), dim=-1)

    def embed_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids `[R, L]`, lengths `[R]` -> `[R, P]`, unit length (ITC)."""
        first = self.encoder(ids, lengths=lengths).tokens[:, 0]
        return nn.functional.normalize(self.text_projection(first), dim=-1)

    def class_logits(self, similarity: Tensor) -> Tensor:
        """Cosines `[...]` -> logits `[...]`: divided by the learned ITC temperature."""
        return similarity / self.temperature

    def label_logits(self, image: Encoded) -> Tensor:
        """B encoded images -> logits `[B, C]` of the fine-tuned classes."""
        return self.classes(image.pooled)

    def add_label_head(self, labels: tuple[str, ...]) -> nn.Module:
        """Replaces the head for fine-tuned classes and returns it, to be initialized."""
        self.config = replace(self.config, labels=labels)
        self.classes = Linear(self.config.vision.dim, len(labels))
        return self.classes

    def encode_text(self, image: Encoded, ids: Tensor, lengths: Tensor) -> Encoded:
        """Text encoder with cross-attention to the image (the image-grounded encoder of figure 2).

        Args:
            image: B encoded images.
            ids: `[R, L]`, R a multiple of B, the texts of one image together.
            lengths: `[R]`, tokens without padding.

        Returns:
            tokens `[R, L, D]`, pooled `[R, D]` (the first token's state), mask `[R, L]`.
        """
        if self.config.encoder_start is not None:
            ids = ids.clone()
            ids[:, 0] = self.config.encoder_start
        memory = self.encoder.memory(image.tokens)
        tokens = self.encoder(ids, lengths=lengths, memory=memory).tokens
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        return Encoded(tokens, tokens[:, 0], mask)

    def match_logits(self, image: Encoded, ids: Tensor, lengths: Tensor) -> Tensor:
        """ITM logits `[R, 2]`, (no match, match): ids `[R, L]` over B images, the texts of one image together."""
        logits = self.match_head(self.encode_text(image, ids, lengths).pooled)
        if self.config.match_cosine:
            texts = self.embed_text(ids, lengths).unflatten(0, (len(image.tokens), -1))
            cosines = (texts @ self.embed_image(image)[..., None]).flatten()
            logits[:, 1] += self.config.match_cosine * cosines
        return logits

    def patch_attention(self, score: Literal["match", "similarity"]) -> PatchAttention | None:
        """The text encoder's cross-attention (ITM), or the image tower's attention (ITC)."""
        if score == "similarity":
            return require(self.vision, AttentiveTower).patch_attention()
        skip = int(self.config.vision.has_class_token)
        return PatchAttention([block.cross for block in self.encoder.layers], "text", skip)

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


def _share(encoder: TextTower, writer: Decoder) -> None:
    """Gives the decoder the encoder's modules, all but self-attention and its norm (the paper, section 3.1)."""
    decoder = writer.text
    if writer.head.words.weight is decoder.word.weight:  # stays tied, to the embedding that both now have
        writer.head.words.weight = encoder.word_weight
    decoder.word, decoder.position, decoder.norm = encoder.word, encoder.position, encoder.norm
    for source, target in zip(encoder.blocks, decoder.blocks, strict=True):
        for name in ("cross", "norm_cross", "mlp", "norm2"):
            setattr(target, name, getattr(source, name))
