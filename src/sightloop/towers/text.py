"""The text transformer: encoders and decoders of every family, differing in data only.

CLIP's causal text tower; BERT with optional image memory (BLIP, Q-Former); encoders and decoders of T5 and BART; OPT,
Llama, Mistral and Gemma, which go on from a prefix of images and words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from sightloop.nn.attention import (
    STANDARD_HEADS,
    HeadConfig,
    KeyValue,
    KeyValueCache,
    Linear,
    attention_mask,
    mask_from_lengths,
    relative_buckets,
    rope_table,
)
from sightloop.nn.blocks import Block, BlockConfig, NormKind, build_norm
from sightloop.types import Encoded


@dataclass(frozen=True, slots=True)
class TextConfig:
    """Sizes. post_norm: BERT's order of norms (and a norm on the embeddings) instead of CLIP's (and a last norm).

    positions: learned ones, 0 for none; the first is row `position_offset` of the table. rotary: the base of rotary
    positions, 0 for none. relative: T5's buckets of distances up to `relative_distance`, 0 for none. word_scale: what
    word vectors are multiplied with. windows: for each layer how far back it sees, 0 for all; () for all layers.
    memory_dim: width of the image tokens that cross-attention reads, None for none; every `cross_every`-th block reads
    them, from the first on. The rest: see `BlockConfig`.
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
    attention: HeadConfig = STANDARD_HEADS
    norm: NormKind = "layer"
    gated: bool = False
    mlp_bias: bool = True
    sandwich: bool = False
    position_offset: int = 0
    rotary: float = 0.0
    relative: int = 0
    relative_distance: int = 128
    word_scale: float = 1.0
    windows: tuple[int, ...] = ()
    cross_every: int = 1

    @property
    def block(self) -> BlockConfig:
        """The shape of each block."""
        return BlockConfig(*(getattr(self, name) for name in BlockConfig._fields))


class DecodeState:
    """What a decoder keeps between steps: one cache a layer, the memory's keys and values, the length so far.

    real: bool `[R, capacity]`, False where a row's prefix was padded in front; padding `[R]`: how much.
    last: the states `[R, D]` of a prefix's last tokens, until they are asked for.
    """

    def __init__(
        self, caches: list[KeyValueCache], memory: list[KeyValue | None], memory_mask: Tensor | None
    ) -> None:
        self.caches = caches
        self.memory = memory
        self.memory_mask = memory_mask
        self.length = 0
        self.valid_mask: Tensor | None = None
        self.padding: Tensor | None = None
        self.last_states: Tensor | None = None

    def select(self, rows: Tensor) -> None:
        """Row i goes on from row `rows[i]` `[R']`; rows of one memory stay together."""
        for cache in self.caches:
            cache.select(rows, self.length)
        if self.valid_mask is not None and self.padding is not None:
            self.valid_mask, self.padding = self.valid_mask[rows], self.padding[rows]


class TextTower(nn.Module):
    """Token ids `[R, L]` -> Encoded(tokens `[R, L, D]`)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.word = _empty_embedding(config.vocab, config.dim)
        if config.positions:
            self.position = _empty_embedding(config.positions + config.position_offset, config.dim)
        if config.relative:
            self.relative = _empty_embedding(config.relative, config.heads)
        self.norm = build_norm(config.norm, config.dim, config.eps)
        shapes = (config.block, config.block._replace(memory_dim=None))
        self.blocks = nn.ModuleList(Block(shapes[i % config.cross_every > 0]) for i in range(config.layers))

    def memory(self, tokens: Tensor) -> list[KeyValue | None]:
        """Each layer's cross-attention keys and values of a memory `[B, N, memory_dim]`, None where it has none."""
        crosses = [getattr(block, "cross", None) for block in self.blocks]
        return [None if cross is None else cross.memory(tokens) for cross in crosses]

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """The vectors of words, without positions: `[R, L]` -> `[R, L, D]`."""
        vectors = self.word(ids)
        return vectors if self.config.word_scale == 1.0 else vectors * self.config.word_scale

    def add_positions(self, x: Tensor, positions: Tensor) -> Tensor:
        """What the first block reads: vectors of words with their positions and, in BERT's order, the norm."""
        if self.config.positions:
            x = x + self.position(positions + self.config.position_offset)
        return self.norm(x) if self.config.post_norm else x

    def forward(
        self,
        ids: Tensor,
        *,
        lengths: Tensor | None = None,
        causal: bool = False,
        memory: list[KeyValue | None] | None = None,
        memory_mask: Tensor | None = None,
    ) -> Encoded:
        """All positions at once. lengths `[R]`: positions beyond are padding and not attended to."""
        valid_mask = None
        # Under a causal mask, padding at the end is never seen by what stands before it.
        if lengths is not None and not causal and int(lengths.min()) < ids.shape[1]:
            valid_mask = mask_from_lengths(lengths, ids.shape[1])[:, 0, 0]
        x = self.embed_tokens(ids)
        return Encoded(
            self.forward_embeddings(
                x, valid_mask=valid_mask, causal=causal, memory=memory, memory_mask=memory_mask
            )
        )

    def forward_embeddings(
        self,
        x: Tensor,
        *,
        valid_mask: Tensor | None = None,
        prefix_mask: Tensor | None = None,
        causal: bool = False,
        memory: list[KeyValue | None] | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """Vectors of words (and of what stands among them, such as images) -> states, both `[R, L, D]`.

        real: bool `[R, L]`, False = padding, on either side. whole: bool `[R, L]`, a prefix that sees itself whole
        although the rest is causal (prefix-LM).
        """
        state = DecodeState([], memory or [], memory_mask)
        return self._forward(
            x,
            _count_positions(x, valid_mask),
            state,
            valid_mask=valid_mask,
            prefix_mask=prefix_mask,
            causal=causal,
        )

    def start(self, memory: Encoded, capacity: int) -> DecodeState:
        """A decoding state with one row a memory, for up to `capacity` tokens a row."""
        mask = None if memory.mask is None else memory.mask[:, None, None, :]
        caches = self._allocate_caches(memory.tokens, capacity)
        return DecodeState(caches, self.memory(memory.tokens), mask)

    def prefill(self, prefix: Encoded, capacity: int, *, bidirectional: bool = False) -> DecodeState:
        """A decoding state after a prefix of vectors `[R, L, D]`, for up to `capacity` more tokens a row.

        prefix.mask: bool `[R, L]`, False = padding, which stands in front so that all rows go on at one place.
        whole: the prefix sees itself whole (prefix-LM). `state.last` holds the last token's states.
        """
        x, valid_mask = prefix.tokens, prefix.mask
        rows, length = x.shape[:2]
        state = DecodeState(self._allocate_caches(x, length + capacity), [], None)
        if valid_mask is not None and not bool(valid_mask.all()):
            state.valid_mask = torch.cat([valid_mask, valid_mask.new_ones(rows, capacity)], dim=1)
            state.padding = length - valid_mask.sum(dim=1)
        prefix_mask = torch.ones_like(x[..., 0], dtype=torch.bool) if bidirectional else None
        states = self._forward(
            x,
            _count_positions(x, valid_mask),
            state,
            valid_mask=valid_mask,
            prefix_mask=prefix_mask,
            causal=True,
        )
        state.last_states = states[:, -1]
        return state

    def step(self, ids: Tensor, state: DecodeState) -> Tensor:
        """The next L tokens of every row, causally, with what the state holds: ids `[R, L]` -> `[R, L, D]`."""
        positions = torch.arange(state.length, state.length + ids.shape[1], device=ids.device)[None]
        valid_mask = state.valid_mask
        if valid_mask is not None and state.padding is not None:
            positions = positions - state.padding[:, None]
            valid_mask = valid_mask[:, : state.length + ids.shape[1]]
        return self._forward(self.embed_tokens(ids), positions, state, valid_mask=valid_mask, causal=True)

    def _forward(
        self,
        x: Tensor,
        positions: Tensor,
        state: DecodeState,
        *,
        valid_mask: Tensor | None,
        prefix_mask: Tensor | None = None,
        causal: bool,
    ) -> Tensor:
        """Positions, blocks and norms; with caches, what stands before x is `state.length` tokens long."""
        config, start = self.config, state.length
        x = self.add_positions(x, positions)
        turn = None
        if config.rotary:
            width = config.attention.width or config.dim // config.heads
            turn = rope_table(positions, width, config.rotary, x.dtype)
        masks = {
            window: self._self_attention_mask(x, start, window, valid_mask, prefix_mask, causal)
            for window in set(config.windows) or {0}
        }
        for i, block in enumerate(self.blocks):
            mask = masks[config.windows[i] if config.windows else 0]
            x = block(
                x,
                mask=mask,
                causal=causal and mask is None and not state.caches,
                memory=state.memory[i] if state.memory else None,
                memory_mask=state.memory_mask,
                cache=(state.caches[i], start) if state.caches else None,
                turn=turn,
            )
        if state.caches:
            state.length += x.shape[1]
        return x if config.post_norm else self.norm(x)

    def _self_attention_mask(
        self,
        x: Tensor,
        start: int,
        window: int,
        valid_mask: Tensor | None,
        prefix_mask: Tensor | None,
        causal: bool,
    ) -> Tensor | None:
        """What the positions of x, from `start` on, attend to; None where the causal order alone limits, or nothing."""
        end = start + x.shape[1]
        seen = None if valid_mask is None else valid_mask[:, None, None, :]
        if causal:
            narrow = 0 < window < end
            plain = valid_mask is None and prefix_mask is None and not narrow
            if not plain or (self.config.relative and x.shape[1] > 1):
                valid_mask = x.new_ones(1, end, dtype=torch.bool) if valid_mask is None else valid_mask
                seen = attention_mask(
                    valid_mask, prefix_mask=prefix_mask, window=window if narrow else 0, start=start
                )
        if not self.config.relative:
            return seen
        keys = torch.arange(end, device=x.device)
        places = relative_buckets(
            keys[start:], keys, self.config.relative, self.config.relative_distance, bidirectional=not causal
        )
        bias = self.relative(places).permute(2, 0, 1)[None]  # [1, H, L, N]
        return bias if seen is None else bias.masked_fill(~seen, torch.finfo(bias.dtype).min)

    def _allocate_caches(self, like: Tensor, capacity: int) -> list[KeyValueCache]:
        attn = cast(Block, self.blocks[0]).attn
        return [
            KeyValueCache((like.shape[0], attn.kv_heads, capacity, attn.width), like) for _ in self.blocks
        ]


def _count_positions(x: Tensor, valid_mask: Tensor | None) -> Tensor:
    """0, 1, ... along each row of x `[R, L, D]`, counted from its first token that is no padding: `[1 or R, L]`."""
    if valid_mask is None:
        return torch.arange(x.shape[1], device=x.device)[None]
    return (valid_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def _empty_embedding(rows: int, dim: int) -> nn.Embedding:
    """Without random values: to draw them where no memory is ("meta"), torch loads its compiler for 0.7 s."""
    return nn.Embedding.from_pretrained(torch.empty(rows, dim), freeze=False)


def insert_image_tokens(
    embeddings: Tensor, image_tokens: Tensor, ids: Tensor, image_id: int, valid_mask: Tensor
) -> Tensor:
    """The word vectors `[R, L, D]` with image tokens `[K, D]` where `ids` has the image's id, in order."""
    is_image = (ids == image_id) & valid_mask
    return embeddings.masked_scatter(is_image[..., None], image_tokens.to(embeddings.dtype))


@dataclass(frozen=True, slots=True)
class LanguageConfig:
    """tied: the head's matrix is the word table. head_bias: a bias on every word's score.

    state_scale: what states are multiplied with before the head (T5, where tied). softcap c: scores become
    c tanh(scores / c) (Gemma 2). bidirectional_prefix: a prefix sees itself whole (prefix-LM), else causally.
    """

    text: TextConfig
    tied: bool = False
    head_bias: bool = False
    state_scale: float = 1.0
    softcap: float = 0.0
    bidirectional_prefix: bool = False


class LanguageModel(nn.Module):
    """A decoder with its head.

    With `text.memory_dim` it reads a memory and starts from a first token (T5, BART); without, it goes on from a prefix
    of vectors (OPT, Llama, Gemma), and its first `next_logits` is asked with no ids, `[R, 0]`.
    """

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.text = TextTower(config.text)
        self.head = Linear(config.text.dim, config.text.vocab, bias=config.head_bias)
        if config.tied:
            self.head.weight = cast(nn.Parameter, self.text.word.weight)

    def logits(self, states: Tensor) -> Tensor:
        """States `[..., D]` -> scores of the next token `[..., V]`."""
        scale, cap = self.config.state_scale, self.config.softcap
        scores = self.head(states if scale == 1.0 else states * scale)
        return (scores / cap).tanh() * cap if cap else scores

    def start(self, memory_or_prefix: Encoded, capacity: int) -> DecodeState:
        """A decoding state for up to `capacity` tokens a row: given is the memory `[B, N, memory_dim]`, or the prefix
        `[B, N, D]`, padded in front."""
        if self.config.text.memory_dim is not None:
            return self.text.start(memory_or_prefix, capacity)
        return self.text.prefill(memory_or_prefix, capacity, bidirectional=self.config.bidirectional_prefix)

    def next_logits(self, ids: Tensor, state: DecodeState) -> Tensor:
        """Scores of the token after ids: ids `[R, L]` -> `[R, V]`; L = 0: after the prefix."""
        if ids.shape[1]:
            return self.logits(self.text.step(ids, state)[:, -1])
        assert state.last_states is not None, "without ids there must be a prefix"
        return self.logits(state.last_states)

    def all_logits(self, ids: Tensor, state: DecodeState) -> Tensor:
        """Scores of the token after each of ids: ids `[R, L]` -> `[R, L, V]`."""
        return self.logits(self.text.step(ids, state))
