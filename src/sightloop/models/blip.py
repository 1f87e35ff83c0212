"""BLIP: one image tower; a text encoder that embeds (ITC) and judges (ITM); a text decoder that writes (LM).

Li et al. 2022, arXiv 2201.12086, section 3.1 and figure 2. A checkpoint may hold any of the parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from sightloop.nn.attention import Linear
from sightloop.nn.blocks import ACTIVATIONS
from sightloop.towers.text import DecodeState, TextConfig, TextTower
from sightloop.towers.vit import Vit, VitConfig
from sightloop.types import Encoded


@dataclass(frozen=True, slots=True)
class BlipConfig:
    """The towers' sizes, which parts there are, and the special tokens.

    decoder_memory_dim: width of what the decoder reads: an image's tokens, or in VQA the states of the question.
    embed_dim: width of the ITC space, None without the projections. shared: encoder and decoder share all parameters
    but those of self-attention (the paper's table 3). tied_words: the LM head's matrix is the word embedding.
    encoder_start: the id that the text encoder reads first when it looks at an image, None to keep [CLS]: the
    original code puts [ENC] there, `transformers` does not. answers: beside captions, the one decoder also answers
    from the states of a question; it reads both, so images and texts then have one width (ValueError if not).
    labels: classes of images that were learned, which one more layer tells apart. match_cosine: what ITC's cosine
    adds to ITM's logit of a match, times; 0 in the paper (`training.calibration` sets it).
    """

    vision: VitConfig
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
    """BERT's language-modelling head: dense, activation, norm, then a score for every word `[..., D]` -> `[..., V]`."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = Linear(config.dim, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.words = Linear(config.dim, config.vocab)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.words(self.norm(self.activation(self.dense(x))))


class Decoder(nn.Module):
    """Text tower and LM head: writes a text for a memory (image tokens, or the states of a question)."""

    def __init__(self, config: TextConfig, *, tied_words: bool) -> None:
        super().__init__()
        self.text = TextTower(config)
        self.head = LmHead(config)
        if tied_words:
            self.head.words.weight = cast(nn.Parameter, self.text.word.weight)

    def start(self, memory: Encoded, capacity: int) -> DecodeState:
        """A decoding state with one row a memory, for up to `capacity` tokens a row."""
        return self.text.start(memory, capacity)

    def next_logits(self, ids: Tensor, state: DecodeState) -> Tensor:
        """Scores of the token after ids: ids `[R, L]` -> `[R, V]`."""
        return self.head(self.text.step(ids, state)[:, -1])

    def all_logits(self, ids: Tensor, state: DecodeState) -> Tensor:
        """Scores of the token after each of ids: ids `[R, L]` -> `[R, L, V]`."""
        return self.head(self.text.step(ids, state))


class Blip(nn.Module):
    """All heads of BLIP over one image tower; what a checkpoint lacks is absent."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = Vit(config.vision)
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
        """The verbs that this checkpoint's parts allow."""
        config = self.config
        embeds = config.encoder and config.embed_dim is not None
        there = {
            "embed": embeds,
            "similarity": embeds,
            "classify": (embeds and config.temperature) or bool(config.labels),
            "match": config.matching,
            "rank": config.matching and embeds,
            # Unless it says so, one with encoder and decoder but no matching head was fine-tuned for questions.
            "caption": config.decoder and (config.answers or not config.encoder or config.matching),
            "answer": config.answers or (config.decoder and config.encoder and not config.matching),
        }
        return frozenset(job for job in there if there[job])

    def encode_image(self, pixels: Tensor) -> Encoded:
        """pixels `[B, 3, S, S]` -> Encoded(tokens `[B, N, D]`, pooled `[B, D]`)."""
        return self.vision(pixels)

    def embed_image(self, image: Encoded) -> Tensor:
        """-> `[B, P]`, unit length (ITC)."""
        return nn.functional.normalize(self.image_projection(image.tokens[:, 0]), dim=-1)

    def embed_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids `[R, L]`, lengths `[R]` -> `[R, P]`, unit length (ITC)."""
        first = self.encoder(ids, lengths=lengths).tokens[:, 0]
        return nn.functional.normalize(self.text_projection(first), dim=-1)

    def class_logits(self, similarity: Tensor) -> Tensor:
        """Cosines -> logits: divided by the learned ITC temperature."""
        return similarity / self.temperature

    def label_logits(self, image: Encoded) -> Tensor:
        """The learned classes: `[B, len(labels)]`."""
        return self.classes(image.pooled)

    def encode_text(self, image: Encoded, ids: Tensor, lengths: Tensor) -> Encoded:
        """Texts read beside their image: ids `[R, L]`, R a multiple of B, the rows of one image together."""
        if self.config.encoder_start is not None:
            ids = ids.clone()
            ids[:, 0] = self.config.encoder_start
        memory = self.encoder.memory(image.tokens)
        tokens = self.encoder(ids, lengths=lengths, memory=memory).tokens
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        return Encoded(tokens, tokens[:, 0], mask)

    def match_logits(self, image: Encoded, ids: Tensor, lengths: Tensor) -> Tensor:
        """ITM: `[R, 2]`, (no match, match), for R texts over B images, the texts of one image together."""
        logits = self.match_head(self.encode_text(image, ids, lengths).pooled)
        if self.config.match_cosine:
            texts = self.embed_text(ids, lengths).unflatten(0, (len(image.tokens), -1))
            cosines = (texts @ self.embed_image(image)[..., None]).flatten()
            logits[:, 1] += self.config.match_cosine * cosines
        return logits


def _share(encoder: TextTower, writer: Decoder) -> None:
    """Give the decoder the encoder's modules, all but self-attention and its norm (the paper, section 3.1)."""
    decoder = writer.text
    if writer.head.words.weight is decoder.word.weight:  # stays tied, to the words that both now have
        writer.head.words.weight = cast(nn.Parameter, encoder.word.weight)
    decoder.word, decoder.position, decoder.norm = encoder.word, encoder.position, encoder.norm
    for theirs, ours in zip(encoder.blocks, decoder.blocks, strict=True):
        for name in ("cross", "norm_cross", "mlp", "norm2"):
            setattr(ours, name, getattr(theirs, name))
