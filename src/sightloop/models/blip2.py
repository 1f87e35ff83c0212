"""BLIP-2: learned queries (the Q-Former) read a frozen image tower and feed a frozen language model.

Li et al. 2023, arXiv 2301.12597, section 3. Stage 1 trains the queries beside texts (ITC, ITM, LM); stage 2 puts them
before the words of a language model, OPT or T5. A checkpoint holds one of the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sightloop.models.chat_templates import QUESTION_PROMPTS, render_questions
from sightloop.models.text_decoder import LmHead
from sightloop.nn.attention import Linear, attention_mask
from sightloop.protocols import PatchAttention
from sightloop.towers.text import LanguageConfig, LanguageModel, TextConfig, TextTower, insert_image_tokens
from sightloop.towers.vit import Vit, VitConfig
from sightloop.types import Encoded, LogitActivation, Message


@dataclass(frozen=True, slots=True)
class Blip2Config:
    """Sizes of BLIP-2's parts, and the special tokens.

    Args:
        vision: the image tower's config.
        queries: the Q-Former's image side; its "vocabulary" is the queries.
        texts: the Q-Former's text side (stage 1), None in stage 2.
        language: the language model (stage 2), None in stage 1.
        encoder: T5's encoder, None with OPT.
        embed_dim: width of the ITC space, None without the projections.
        matching: whether there is an ITM head.
        temperature: whether there is a learned ITC temperature.
        image_id: id in a prompt that is replaced by one query's state.
        start_ids: ids that the language model's text starts from: () with OPT, T5's first token; in stage 1 the first
            token of a caption.
        end_id: id of EOS, of the language model or of `texts`.
        pad_id: id of padding.
        writes: `texts` has the LM head that stage 1 trains and nothing needs later.
        labels: names of fine-tuned classes; always ().

    Raises:
        ValueError: not exactly one of `texts` and `language` is set.
    """

    vision: VitConfig
    queries: TextConfig
    texts: TextConfig | None
    language: LanguageConfig | None
    encoder: TextConfig | None
    embed_dim: int | None
    matching: bool
    temperature: bool
    image_id: int
    start_ids: tuple[int, ...]
    end_id: int
    pad_id: int
    writes: bool = False
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.texts is None) == (self.language is None):
            raise ValueError("BLIP-2 has either the text side of stage 1 or the language model of stage 2")

    @property
    def text(self) -> TextConfig:
        """Config of the tower that reads what a caller writes."""
        if self.language is None or self.encoder is not None:
            text = self.texts or self.encoder
            assert text is not None  # one of the two stages
            return text
        return self.language.text


class Blip2(nn.Module):
    """Image tower, Q-Former, and the heads of stage 1 or the language model of stage 2."""

    prompts: ClassVar[Mapping[str, str]] = QUESTION_PROMPTS
    activation: LogitActivation = "softmax"
    embeds_first_token = False

    def __init__(self, config: Blip2Config) -> None:
        super().__init__()
        self.config = config
        self.vision = Vit(config.vision)
        self.queries = TextTower(config.queries)
        if config.language is not None:
            self.projection = Linear(config.queries.dim, config.language.text.dim)
            self.language = LanguageModel(config.language)
        if config.encoder is not None:
            self.encoder = TextTower(config.encoder)
            self.encoder.word = self.language.text.word
        if config.texts is not None:
            self.texts = TextTower(config.texts)
            _share(self.queries, self.texts)
            if config.writes:
                self.head = LmHead(config.texts)
                self.head.words.weight = self.texts.word_weight
        if config.embed_dim is not None:
            self.image_projection = Linear(config.queries.dim, config.embed_dim)
            self.text_projection = Linear(config.queries.dim, config.embed_dim)
        if config.matching:
            self.match_head = Linear(config.queries.dim, 2)
        if config.temperature:
            self.temperature = nn.Parameter(torch.empty(()))

    @property
    def capabilities(self) -> frozenset[str]:
        """Verbs that this checkpoint's parts allow."""
        config = self.config
        writes, embeds = config.language is not None, config.embed_dim is not None
        parts = {"caption": writes, "answer": writes, "chat": writes, "embed": embeds, "similarity": embeds}
        parts |= {"classify": embeds and config.temperature, "match": config.matching}
        parts["rank"] = embeds and config.matching
        return frozenset(name for name in parts if parts[name])

    @property
    def objectives(self) -> frozenset[str]:
        """Training objectives that its parts allow."""
        config = self.config
        embeds = config.embed_dim is not None and config.temperature
        parts = {
            "itc": embeds,
            "itm": embeds and config.matching,
            "lm": config.writes or config.language is not None,
            "prompted": config.language is not None and not config.start_ids,
        }
        return frozenset(name for name in parts if parts[name])

    def render_chat(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation, IMAGE_PLACEHOLDER for each of its images."""
        return render_questions(messages)

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
        return None

    @property
    def answer_start(self) -> tuple[int, ...]:
        """Ids that every answer begins with: none."""
        return ()

    def encode_image(self, pixels: Tensor) -> Encoded:
        """Image memory of the checkpoint's stage.

        Args:
            pixels: `[B, 3, S, S]`.

        Returns:
            Stage 1: the image tower's tokens `[B, N, D]`. Stage 2: the queries' states in the language model's width,
            `[B, Q, D]`.
        """
        image = self.vision(pixels)
        return image if self.config.language is None else Encoded(self.projection(self.encode_queries(image)))

    def encode_queries(self, image: Encoded) -> Tensor:
        """The Q-Former over images alone: the image tower's tokens `[B, N, D]` -> queries' states `[B, Q, D]`."""
        queries = self.queries.word.weight.expand(image.tokens.shape[0], -1, -1)
        return self.queries.forward_embeddings(queries, memory=self.queries.memory(image.tokens))

    def build_prefix(self, image_tokens: Tensor, ids: Tensor, valid_mask: Tensor) -> Encoded:
        """Prefix of the language model, or T5's encoder output: image tokens first, then the words, BOS included.

        Args:
            image_tokens: `[K, D]`, those of all images in the order of their places in `ids`.
            ids: `[R, L]`, `image_id` for each image token.
            valid_mask: bool `[R, L]`, False for padding, which comes first.

        Returns:
            tokens `[R, L, D]`, mask `valid_mask`.
        """
        # Stable sort by class: padding (0), image tokens (1), words (2).
        order = (valid_mask.long() + (valid_mask & (ids != self.config.image_id))).argsort(dim=1, stable=True)
        ids = ids.gather(1, order)
        words = self.language.text.embed_tokens(ids)  # [R, L, D]
        x = insert_image_tokens(words, image_tokens, ids, self.config.image_id, valid_mask)
        if self.config.encoder is None:
            return Encoded(x, mask=valid_mask)
        return Encoded(self.encoder.forward_embeddings(x, valid_mask=valid_mask), mask=valid_mask)

    def embed_image(self, image: Encoded) -> Tensor:
        """B encoded images -> `[B, Q, P]`, a unit vector for each query (ITC).

        The similarity of a text is that of its nearest query (section 3.1).
        """
        return nn.functional.normalize(self.image_projection(self.encode_queries(image)), dim=-1)

    def embed_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids `[R, L]`, lengths `[R]` -> `[R, P]`, unit length (ITC)."""
        first = self.texts(ids, lengths=lengths).tokens[:, 0]
        return nn.functional.normalize(self.text_projection(first), dim=-1)

    def class_logits(self, similarity: Tensor) -> Tensor:
        """Cosines `[...]` -> logits `[...]`: divided by the learned ITC temperature."""
        return similarity / self.temperature

    def match_logits(self, image: Encoded, ids: Tensor, lengths: Tensor) -> Tensor:
        """ITM logits `[R, 2]`, (no match, match), means over the queries: ids `[R, L]`, those of one image together."""
        count = self.config.queries.vocab
        valid_mask = torch.arange(count + ids.shape[1], device=ids.device) < (count + lengths)[:, None]
        states = self.encode_pairs(image, ids, valid_mask[:, None, None])
        return self.match_head(states[:, :count]).mean(dim=1)

    def patch_attention(self, score: Literal["match", "similarity"]) -> PatchAttention | None:
        """The Q-Former's cross-attention, which both scores read the image by."""
        layers = [block.cross for block in self.queries.layers if hasattr(block, "cross")]
        return PatchAttention(layers, "queries", int(self.config.vision.has_class_token))

    def calibrate_match(self, threshold: float, match_cosine: float) -> None:
        """Subtracts a threshold from the logit of "match"; the weight of the ITC cosine stays 0."""
        bias = self.match_head.bias
        assert bias is not None
        with torch.no_grad():
            bias[1] -= threshold

    def encode_pairs(self, image: Encoded, ids: Tensor, mask: Tensor) -> Tensor:
        """The Q-Former over queries and words; only the queries cross-attend to the image (figure 2).

        Args:
            image: the image tower's tokens `[B, N, D]`.
            ids: `[R, L]`, R a multiple of B, the texts of one image together.
            mask: bool `[R, 1, 1 or Q + L, Q + L]`, True = attend.

        Returns:
            States `[R, Q + L, D]`.
        """
        count = self.config.queries.vocab
        queries = self.queries.word.weight.expand(ids.shape[0], -1, -1)  # [R, Q, D]
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        words = self.texts.add_positions(self.texts.embed_tokens(ids), positions)  # [R, L, D]
        x = torch.cat([self.queries.add_positions(queries, positions), words], dim=1)
        layers = zip(self.queries.layers, self.texts.layers, self.queries.memory(image.tokens), strict=True)
        for query_block, text_block, memory in layers:
            x = query_block.self_attention_half(x, mask)  # shared by both sides
            query_states = query_block.mlp_half(x[:, :count], memory)
            x = torch.cat([query_states, text_block.mlp_half(x[:, count:])], dim=1)
        return x

    def frame_text(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Tokenized texts, ids `[R, L]` and lengths `[R]`, with the first and last token that the decoder expects.

        Stage 1 replaces the first token by [DEC]. OPT's tokenizer adds no EOS, T5's no first token: `[R, L + 1]`.
        """
        start, count = self.config.start_ids, len(ids)
        if self.config.language is None:
            ids = ids.clone()
            ids[:, 0] = start[0]
            return ids, lengths
        if start:
            return torch.cat([ids.new_full((count, 1), start[0]), ids], dim=1), lengths + 1
        ids = nn.functional.pad(ids, (0, 1), value=self.config.pad_id)
        return ids.scatter(1, lengths[:, None], self.config.end_id), lengths + 1

    def decoder_states(self, memory: Encoded, ids: Tensor) -> Tensor:
        """For training: ids `[R, L]` over the B memories of `encode_image` -> states `[R, L, D]`.

        A word attends to the queries and to the words before it.
        """
        rows, count = ids.shape[0], self.config.queries.vocab
        if self.config.language is None:
            valid_mask = torch.ones(rows, count + ids.shape[1], dtype=torch.bool, device=ids.device)
            prefix_mask = (torch.arange(valid_mask.shape[1], device=ids.device) < count).expand_as(valid_mask)
            mask = attention_mask(valid_mask, prefix_mask=prefix_mask)
            return self.encode_pairs(memory, ids, mask)[:, count:]
        tower = self.language.text
        words = tower.embed_tokens(ids)
        if self.config.encoder is None:
            prefix = memory.tokens.repeat_interleave(rows // memory.tokens.shape[0], dim=0)
            return tower.forward_embeddings(torch.cat([prefix, words], dim=1), causal=True)[:, count:]
        end = tower.embed_tokens(ids.new_full((memory.tokens.shape[0], 1), self.config.end_id))
        encoded = self.encoder.forward_embeddings(torch.cat([memory.tokens, end], dim=1))
        return tower.forward_embeddings(words, causal=True, memory=tower.memory(encoded))

    def lm_logits(self, states: Tensor) -> Tensor:
        """The decoder's states `[..., D]` -> next-token logits `[..., V]`."""
        return self.head(states) if self.config.language is None else self.language.logits(states)


def _share(queries: TextTower, texts: TextTower) -> None:
    """Gives both sides of the Q-Former one self-attention and one norm of their input (section 3.1)."""
    texts.norm = queries.norm
    for query_block, text_block in zip(queries.layers, texts.layers, strict=True):
        text_block.attn, text_block.norm1 = query_block.attn, query_block.norm1
