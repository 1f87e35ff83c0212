"""Text transformer: the encoders and decoders of every family, which differ only in their `TextConfig`.

CLIP's causal text tower; BERT with optional image memory (BLIP, Q-Former); encoders and decoders of T5 and BART; OPT,
Llama, Mistral and Gemma, which continue a prefix of image and text embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """Sizes and options of a text transformer.

    Args:
        vocab: rows V of the token embedding.
        positions: learned positions; 0 for none.
        dim: width D.
        layers: number of blocks.
        heads: query heads of each block.
        mlp_dim: width of the MLPs' hidden layer.
        activation: of the MLPs, a key of `nn.blocks.ACTIVATIONS`.
        eps: of the norms.
        post_norm: BERT's order of norms, with a norm on the embeddings, instead of CLIP's, with a final norm.
        memory_dim: width of the memory that cross-attention reads; None for no cross-attention.
        attention: options of the attention heads.
        norm: kind of the norms.
        gated: the MLPs are gated, see `BlockConfig`.
        mlp_bias: whether the MLPs' linear layers have a bias.
        sandwich: branches also end in a norm, see `BlockConfig`.
        position_offset: row of the position table that holds position 0 (2 in OPT and BART).
        rotary: base of the rotary positions; 0 for none.
        relative: number of T5's relative position buckets; 0 for none.
        relative_distance: distance from which all share T5's last bucket.
        word_scale: factor of the token embeddings (sqrt(D) in Gemma).
        windows: attention window of each layer in tokens, 0 for all; () for no window in any layer.
        cross_every: every how many blocks one has cross-attention, the first block included (2 in the Q-Former).
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
        """The config of a block with cross-attention, if `memory_dim` is set."""
        return BlockConfig(*(getattr(self, name) for name in BlockConfig._fields))


class DecodeState:
    """State of a decoder between steps, for R rows over B memories.

    Attributes:
        caches: keys and values of self-attention, one cache per layer.
        memory: keys and values of cross-attention per layer, None for layers without; empty without a memory.
        memory_mask: bool `[B, 1, 1, N]`, True = attend; None for no padding in the memory.
        length: tokens in the caches.
        valid_mask: bool `[R, capacity]`, False for a prefix's padding; None without padding.
        padding: int64 `[R]`, tokens of padding before each row's prefix; None without padding.
        last_states: states of each prefix's last token, `[R, D]`; None without a prefix.
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
        """Replace row i by a copy of row `rows[i]`, int64 `[R']`; rows of one memory must stay consecutive."""
        for cache in self.caches:
            cache.select(rows, self.length)
        if self.valid_mask is not None and self.padding is not None:
            self.valid_mask, self.padding = self.valid_mask[rows], self.padding[rows]


class TextTower(nn.Module):
    """Text transformer: token ids `[R, L]` -> Encoded(tokens `[R, L, D]`)."""

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

    @property
    def layers(self) -> list[Block]:
        """The blocks, in order."""
        return [block for block in self.blocks if isinstance(block, Block)]

    @property
    def word_weight(self) -> nn.Parameter:
        """The token embedding `[V, D]`, to be tied."""
        assert isinstance(self.word.weight, nn.Parameter)
        return self.word.weight

    def memory(self, tokens: Tensor) -> list[KeyValue | None]:
        """Cross-attention keys and values of a memory `[B, N, memory_dim]` per layer, None for layers without."""
        crosses = [getattr(block, "cross", None) for block in self.blocks]
        return [None if cross is None else cross.memory(tokens) for cross in crosses]

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Token embeddings without positions: int64 `[R, L]` -> `[R, L, D]`."""
        embeddings = self.word(ids)
        return embeddings if self.config.word_scale == 1.0 else embeddings * self.config.word_scale

    def add_positions(self, x: Tensor, positions: Tensor) -> Tensor:
        """Input of the first block: embeddings plus learned positions and, with `post_norm`, the norm.

        Args:
            x: `[R, L, D]`.
            positions: int64 `[1 or R, L]`.

        Returns:
            `[R, L, D]`.
        """
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
        """Encode texts, all positions at once.

        Args:
            ids: int64 `[R, L]`.
            lengths: int64 `[R]`, tokens of each row before the padding at its end; None for no padding.
            causal: position i attends to positions 0 .. i.
            memory: from `self.memory`, for cross-attention.
            memory_mask: bool `[B, 1, 1, N]`, True = attend.

        Returns:
            Encoded(tokens `[R, L, D]`).
        """
        valid_mask = None
        # A causal mask already hides padding at the end from all tokens before it.
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
        """`forward` for embeddings of tokens, images or both (`inputs_embeds` of `transformers`).

        Args:
            x: `[R, L, D]`, without positions.
            valid_mask: bool `[R, L]`, False = padding, on either side.
            prefix_mask: bool `[R, L]`, True = bidirectional prefix of a causal text (prefix-LM).
            causal, memory, memory_mask: see `forward`.

        Returns:
            States `[R, L, D]`.
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
        """Decoding state with one row per memory.

        Args:
            memory: tokens `[B, N, memory_dim]`, mask bool `[B, N]` or None.
            capacity: number of tokens that a row may reach.
        """
        mask = None if memory.mask is None else memory.mask[:, None, None, :]
        caches = self._allocate_caches(memory.tokens, capacity)
        return DecodeState(caches, self.memory(memory.tokens), mask)

    def prefill(self, prefix: Encoded, capacity: int, *, bidirectional: bool = False) -> DecodeState:
        """Decoding state after a prefix of embeddings.

        Args:
            prefix: tokens `[R, L, D]`; mask bool `[R, L]`, False = padding, which must be on the left, so that the next
                token of every row has the same index.
            capacity: number of tokens that may follow in a row.
            bidirectional: the prefix's tokens attend to each other in both directions (prefix-LM).

        Returns:
            The state, with `last_states` `[R, D]` set.
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
        """Decode the next L tokens of every row, causally: int64 `[R, L]` -> states `[R, L, D]`; advances `state`."""
        positions = torch.arange(state.length, state.length + ids.shape[1], device=ids.device)[None]  # [1, L]
        valid_mask = state.valid_mask
        if valid_mask is not None and state.padding is not None:
            positions = positions - state.padding[:, None]  # [R, L]
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
        """Positions, blocks and final norm: `[R, L, D]` -> `[R, L, D]`; x follows the `state.length` cached tokens."""
        config, start = self.config, state.length
        x = self.add_positions(x, positions)
        rope = None
        if config.rotary:
            head_dim = config.attention.width or config.dim // config.heads
            rope = rope_table(positions, head_dim, config.rotary, x.dtype)
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
                rope=rope,
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
        """Mask (or T5's bias, masked) of the L positions of x from `start` on over N = start + L keys.

        bool `[R, 1, 1 or L, N]`, or floats `[1 or R, H, L, N]` with relative positions; None if there is nothing to
        mask, or only the causal order, for which attention has a faster kernel.
        """
        end = start + x.shape[1]
        mask = None if valid_mask is None else valid_mask[:, None, None, :]
        if causal:
            is_narrow = 0 < window < end
            is_plain = valid_mask is None and prefix_mask is None and not is_narrow
            if not is_plain or (self.config.relative and x.shape[1] > 1):
                valid_mask = x.new_ones(1, end, dtype=torch.bool) if valid_mask is None else valid_mask
                mask = attention_mask(
                    valid_mask, prefix_mask=prefix_mask, window=window if is_narrow else 0, start=start
                )
        if not self.config.relative:
            return mask
        keys = torch.arange(end, device=x.device)
        buckets = relative_buckets(
            keys[start:], keys, self.config.relative, self.config.relative_distance, bidirectional=not causal
        )  # [L, N]
        bias = self.relative(buckets).permute(2, 0, 1)[None]  # [1, H, L, N]
        return bias if mask is None else bias.masked_fill(~mask, torch.finfo(bias.dtype).min)

    def _allocate_caches(self, like: Tensor, capacity: int) -> list[KeyValueCache]:
        """One empty cache per layer, for as many rows as `like` `[R, ...]`, in its dtype and on its device."""
        return [
            KeyValueCache((like.shape[0], block.attn.kv_heads, capacity, block.attn.width), like)
            for block in self.blocks
            if isinstance(block, Block)
        ]


def _count_positions(x: Tensor, valid_mask: Tensor | None) -> Tensor:
    """Positions of x `[R, L, D]`, 0 at each row's first valid token (and in the padding before): `[1 or R, L]`."""
    if valid_mask is None:
        return torch.arange(x.shape[1], device=x.device)[None]
    return (valid_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def _empty_embedding(rows: int, dim: int) -> nn.Embedding:
    """Embedding without random values: drawing them on the "meta" device makes torch load its compiler (0.7 s)."""
    return nn.Embedding.from_pretrained(torch.empty(rows, dim), freeze=False)


def insert_image_tokens(
    embeddings: Tensor, image_tokens: Tensor, ids: Tensor, image_id: int, valid_mask: Tensor
) -> Tensor:
    """Replace the embeddings of image placeholders by image tokens, in order.

    Args:
        embeddings: token embeddings `[R, L, D]`.
        image_tokens: `[K, D]`, one for each valid placeholder in `ids`.
        ids: int64 `[R, L]`.
        image_id: id of the placeholder.
        valid_mask: bool `[R, L]`, False = padding.

    Returns:
        `[R, L, D]`.
    """
    is_image = (ids == image_id) & valid_mask
    return embeddings.masked_scatter(is_image[..., None], image_tokens.to(embeddings.dtype))


@dataclass(frozen=True, slots=True)
class LanguageConfig:
    """Config of a decoder with a language-modeling head.

    Args:
        text: the decoder.
        tied: the head's matrix is the token embedding.
        head_bias: the head has a bias.
        state_scale: factor of the states before the head (dim^-0.5 in T5 with tied embeddings).
        softcap: c > 0 maps logits to c tanh(logits / c) (Gemma 2, section 2); 0 for off.
        bidirectional_prefix: a prefix's tokens attend to each other in both directions (prefix-LM), else causally.
    """

    text: TextConfig
    tied: bool = False
    head_bias: bool = False
    state_scale: float = 1.0
    softcap: float = 0.0
    bidirectional_prefix: bool = False


class LanguageModel(nn.Module):
    """Decoder with a language-modeling head.

    With `text.memory_dim` it reads a memory and starts from a first token (T5, BART). Without, it continues a prefix of
    embeddings (OPT, Llama, Gemma): the first `next_logits` then takes no ids, `[R, 0]`.
    """

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.text = TextTower(config.text)
        self.head = Linear(config.text.dim, config.text.vocab, bias=config.head_bias)
        if config.tied:
            self.head.weight = self.text.word_weight

    def logits(self, states: Tensor) -> Tensor:
        """Logits of the next token: states `[..., D]` -> `[..., V]`."""
        scale, cap = self.config.state_scale, self.config.softcap
        logits = self.head(states if scale == 1.0 else states * scale)
        return (logits / cap).tanh() * cap if cap else logits

    def start(self, memory: Encoded, capacity: int) -> DecodeState:
        """Decoding state for up to `capacity` tokens a row.

        Args:
            memory: with `text.memory_dim` the tokens that cross-attention reads, `[B, N, memory_dim]`; without, the
                prefix to continue, `[R, N, D]`, padded on the left.
            capacity: tokens that a row may reach, or that may follow the prefix.
        """
        if self.config.text.memory_dim is not None:
            return self.text.start(memory, capacity)
        return self.text.prefill(memory, capacity, bidirectional=self.config.bidirectional_prefix)

    def next_logits(self, ids: Tensor, state: DecodeState) -> Tensor:
        """Logits of the token after `ids`: int64 `[R, L]` -> `[R, V]`; L = 0 for the token after the prefix."""
        if ids.shape[1]:
            return self.logits(self.text.step(ids, state)[:, -1])
        assert state.last_states is not None, "without ids there must be a prefix"
        return self.logits(state.last_states)

    def all_logits(self, ids: Tensor, state: DecodeState) -> Tensor:
        """Logits of the token after each of `ids`: int64 `[R, L]` -> `[R, L, V]`."""
        return self.logits(self.text.step(ids, state))
