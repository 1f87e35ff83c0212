"""BLIP's text decoder: a text tower over a memory, with BERT's language modeling head."""

from __future__ import annotations

from torch import Tensor, nn

from sightloop.nn.attention import Linear
from sightloop.nn.blocks import ACTIVATIONS
from sightloop.towers.text import DecodeState, TextConfig, TextTower
from sightloop.types import Encoded


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


def share_weights(encoder: TextTower, writer: Decoder, *, blocks: bool) -> None:
    """Gives the decoder the encoder's embeddings and, with `blocks`, all but self-attention (BLIP, section 3.1)."""
    decoder = writer.text
    head: LmHead = writer.head
    if head.words.weight is decoder.word.weight:  # stays tied, to the embedding that both now have
        head.words.weight = encoder.word_weight
    decoder.word, decoder.position, decoder.norm = encoder.word, encoder.position, encoder.norm
    if blocks:
        for source, target in zip(encoder.blocks, decoder.blocks, strict=True):
            for name in ("cross", "norm_cross", "mlp", "norm2"):
                setattr(target, name, getattr(source, name))
