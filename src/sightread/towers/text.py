"""Text transformers: CLIP's causal text tower, and BERT with optional image memory (BLIP's encoder and decoder)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from sightread.nn.attention import Cache, KeyValue, Linear, mask_from_lengths
from sightread.nn.blocks import ACTIVATIONS, Block, BlockConfig
from sightread.types import Encoded


@dataclass(frozen=True, slots=True)
class TextConfig:
    """Sizes. post_norm: BERT's order of norms (and a norm on the embeddings) instead of CLIP's (and a last norm).

    memory_dim: width of the image tokens that cross-attention reads, None for none.
    """

    vocab: int
    positions: int
    dim: int
    layers: int
    heads: int
    mlp_dim: int
    activation: str
    eps: float
    post_norm: bool
    memory_dim: int | None = None


class State:
    """What a decoder keeps between steps: one cache a layer, the memory's keys and values, the length so far."""

    def __init__(self, caches: list[Cache], memory: list[KeyValue], memory_mask: Tensor | None) -> None:
        self.caches = caches
        self.memory = memory
        self.memory_mask = memory_mask
        self.length = 0

    def select(self, rows: Tensor) -> None:
        """Row i goes on from row `rows[i]` `[R']`; rows of one memory stay together."""
        for cache in self.caches:
            cache.select(rows, self.length)


class TextTower(nn.Module):
    """Token ids `[R, L]` -> Encoded(tokens `[R, L, D]`)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.word = _table(config.vocab, config.dim)
        self.position = _table(config.positions, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=config.eps)
        block = BlockConfig(
            config.dim,
            config.heads,
            config.mlp_dim,
            config.activation,
            config.eps,
            config.post_norm,
            config.memory_dim,
        )
        self.blocks = nn.ModuleList(Block(block) for _ in range(config.layers))

    def memory(self, tokens: Tensor) -> list[KeyValue]:
        """Each layer's cross-attention keys and values of a memory `[B, N, memory_dim]`."""
        return [cast(Block, block).cross.memory(tokens) for block in self.blocks]

    def forward(
        self,
        ids: Tensor,
        *,
        lengths: Tensor | None = None,
        causal: bool = False,
        memory: list[KeyValue] | None = None,
        memory_mask: Tensor | None = None,
    ) -> Encoded:
        """All positions at once. lengths `[R]`: positions beyond are padding and not attended to."""
        mask = None
        # Under a causal mask, padding at the end is never seen by what stands before it.
        if lengths is not None and not causal and int(lengths.min()) < ids.shape[1]:
            mask = mask_from_lengths(lengths, ids.shape[1])
        x = self._embed(ids, 0)
        for i, block in enumerate(self.blocks):
            layer_memory = None if memory is None else memory[i]
            x = block(x, mask=mask, causal=causal, memory=layer_memory, memory_mask=memory_mask)
        return Encoded(x if self.config.post_norm else self.norm(x))

    def start(self, memory: Encoded, capacity: int) -> State:
        """A decoding state with one row a memory, for up to `capacity` tokens a row."""
        rows, head = memory.tokens.shape[0], self.config.dim // self.config.heads
        caches = [Cache((rows, self.config.heads, capacity, head), memory.tokens) for _ in self.blocks]
        mask = None if memory.mask is None else memory.mask[:, None, None, :]
        return State(caches, self.memory(memory.tokens), mask)

    def step(self, ids: Tensor, state: State) -> Tensor:
        """The next L tokens of every row, causally, with what the state holds: ids `[R, L]` -> `[R, L, D]`."""
        x = self._embed(ids, state.length)
        for i, block in enumerate(self.blocks):
            x = block(
                x,
                memory=state.memory[i],
                memory_mask=state.memory_mask,
                cache=(state.caches[i], state.length),
            )
        state.length += ids.shape[1]
        return x if self.config.post_norm else self.norm(x)

    def _embed(self, ids: Tensor, start: int) -> Tensor:
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        x = self.word(ids) + self.position(positions)
        return self.norm(x) if self.config.post_norm else x


def _table(rows: int, dim: int) -> nn.Embedding:
    """Without random values: to draw them where no memory is ("meta"), torch loads its compiler for 0.7 s."""
    return nn.Embedding.from_pretrained(torch.empty(rows, dim), freeze=False)


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
