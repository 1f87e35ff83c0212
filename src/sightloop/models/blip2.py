"""BLIP-2: a few learned queries read a frozen image tower and tell a frozen language model what they saw.

Li et al. 2023, arXiv 2301.12597, section 3. Stage 1 teaches the queries beside texts (ITC, ITM, LM); stage 2 puts them
in front of the words of a language model, OPT or T5. A checkpoint holds one of the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from sightloop.models.blip import LmHead
from sightloop.models.chat_templates import QUESTIONS, render_questions
from sightloop.nn.attention import Linear, attention_mask
from sightloop.nn.blocks import Block
from sightloop.towers.text import LanguageConfig, LanguageModel, TextConfig, TextTower, insert_image_tokens
from sightloop.towers.vit import Vit, VitConfig
from sightloop.types import Encoded


@dataclass(frozen=True, slots=True)
class Blip2Config:
    """queries: the Q-Former, whose "words" are the queries. texts: its other side, which reads words (stage 1), with
    ITC's width `embed_dim` and, if `matching`, the ITM head. language: what writes (stage 2), and `encoder`, T5's.

    image_id: the id in a prompt that stands for one query's state. start_ids: what the language model's text starts
    from: nothing (OPT) or its first token (T5); in stage 1 the first token of a text that is written. end_id, pad_id:
    of the language model, or of `texts`. writes: `texts` has the head that stage 1 trains and nothing needs later.
    Raises ValueError unless it is one of the two stages.
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
        """The tower that reads what a caller writes."""
        return self.texts or self.encoder or cast(LanguageConfig, self.language).text


class Blip2(nn.Module):
    """Image tower, Q-Former, and the heads of stage 1 or the language model of stage 2."""

    prompts = QUESTIONS
    render_chat = staticmethod(render_questions)

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
                self.head.words.weight = cast(nn.Parameter, self.texts.word.weight)
        if config.embed_dim is not None:
            self.image_projection = Linear(config.queries.dim, config.embed_dim)
            self.text_projection = Linear(config.queries.dim, config.embed_dim)
        if config.matching:
            self.match_head = Linear(config.queries.dim, 2)
        if config.temperature:
            self.temperature = nn.Parameter(torch.empty(()))

    @property
    def capabilities(self) -> frozenset[str]:
        """The verbs that this checkpoint's parts allow."""
        config = self.config
        writes, embeds = config.language is not None, config.embed_dim is not None
        there = {"caption": writes, "answer": writes, "chat": writes, "embed": embeds, "similarity": embeds}
        there |= {"classify": embeds and config.temperature, "match": config.matching}
        there["rank"] = embeds and config.matching
        return frozenset(job for job in there if there[job])

    def encode_image(self, pixels: Tensor) -> Encoded:
        """pixels `[B, 3, S, S]` -> what the rest reads: the image tower's tokens `[B, N, D]` in stage 1, the queries'
        states among words, `[B, Q, language D]`, in stage 2."""
        image = self.vision(pixels)
        return image if self.config.language is None else Encoded(self.projection(self.encode_queries(image)))

    def encode_queries(self, image: Encoded) -> Tensor:
        """The queries' states after a look at B images `[B, N, D]`, without any text: `[B, Q, queries D]`."""
        asks = self.queries.word.weight.expand(image.tokens.shape[0], -1, -1)
        return self.queries.forward_embeddings(asks, memory=self.queries.memory(image.tokens))

    def build_prefix(self, image_tokens: Tensor, ids: Tensor, valid_mask: Tensor) -> Encoded:
        """What the language model goes on from: image_tokens `[K, D]`, those of all images in order; ids `[R, L]`
        with `image_id` where each stands; real: bool `[R, L]`, False = padding, in front. Images come before all
        words, the first token of a text too."""
        order = (valid_mask.long() + (valid_mask & (ids != self.config.image_id))).argsort(dim=1, stable=True)
        ids = ids.gather(1, order)
        x = insert_image_tokens(
            self.language.text.embed_tokens(ids), image_tokens, ids, self.config.image_id, valid_mask
        )
        if self.config.encoder is None:
            return Encoded(x, mask=valid_mask)
        return Encoded(self.encoder.forward_embeddings(x, valid_mask=valid_mask), mask=valid_mask)

    def embed_image(self, image: Encoded) -> Tensor:
        """-> `[B, Q, P]`, each query's, unit length (ITC). A text is compared with the nearest (section 3.1)."""
        return nn.functional.normalize(self.image_projection(self.encode_queries(image)), dim=-1)

    def embed_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids `[R, L]`, lengths `[R]` -> `[R, P]`, unit length (ITC)."""
        first = self.texts(ids, lengths=lengths).tokens[:, 0]
        return nn.functional.normalize(self.text_projection(first), dim=-1)

    def class_logits(self, similarity: Tensor) -> Tensor:
        """Cosines -> logits: divided by the learned ITC temperature."""
        return similarity / self.temperature

    def match_logits(self, image: Encoded, ids: Tensor, lengths: Tensor) -> Tensor:
        """ITM: `[R, 2]`, (no match, match), for R texts over B images, the texts of one image together. The mean of
        the queries' opinions."""
        count = self.config.queries.vocab
        real = torch.arange(count + ids.shape[1], device=ids.device) < (count + lengths)[:, None]
        states = self.encode_pairs(image, ids, real[:, None, None])
        return self.match_head(states[:, :count]).mean(dim=1)

    def encode_pairs(self, image: Encoded, ids: Tensor, mask: Tensor) -> Tensor:
        """Queries and words that see each other as far as the mask lets them, and queries alone the image
        (figure 2): ids `[R, L]` over B images, mask bool `[R, 1, 1 or Q + L, Q + L]` -> `[R, Q + L, D]`."""
        count = self.config.queries.vocab
        asks = self.queries.word.weight.expand(ids.shape[0], -1, -1)
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        words = self.texts.add_positions(self.texts.embed_tokens(ids), places)
        x = torch.cat([self.queries.add_positions(asks, places), words], dim=1)
        sides = zip(self.queries.blocks, self.texts.blocks, strict=True)
        for (query, text), memory in zip(sides, self.queries.memory(image.tokens), strict=True):
            x = cast(Block, query).self_attention_half(x, mask)
            seen = cast(Block, query).mlp_half(x[:, :count], memory)
            x = torch.cat([seen, cast(Block, text).mlp_half(x[:, count:])], dim=1)
        return x

    def decoder_states(self, image: Encoded, ids: Tensor) -> Tensor:
        """For training: states `[R, L, D]` of texts that are written, ids `[R, L]` with their first token, over B
        images of `encode_image`; what `head` or `language.logits` reads. A word sees queries and words before it."""
        rows, count = ids.shape[0], self.config.queries.vocab
        if self.config.language is None:
            real = torch.ones(rows, count + ids.shape[1], dtype=torch.bool, device=ids.device)
            whole = (torch.arange(real.shape[1], device=ids.device) < count).expand_as(real)
            return self.encode_pairs(image, ids, attention_mask(real, prefix_mask=whole))[:, count:]
        tower = self.language.text
        words = tower.embed_tokens(ids)
        if self.config.encoder is None:
            before = image.tokens.repeat_interleave(rows // image.tokens.shape[0], dim=0)
            return tower.forward_embeddings(torch.cat([before, words], dim=1), causal=True)[:, count:]
        end = tower.embed_tokens(ids.new_full((image.tokens.shape[0], 1), self.config.end_id))
        seen = self.encoder.forward_embeddings(torch.cat([image.tokens, end], dim=1))
        return tower.forward_embeddings(words, causal=True, memory=tower.memory(seen))


def _share(queries: TextTower, texts: TextTower) -> None:
    """The two sides of the Q-Former have one self-attention, and one norm of what goes in (section 3.1)."""
    texts.norm = queries.norm
    for query, text in zip(queries.blocks, texts.blocks, strict=True):
        text.attn, text.norm1 = query.attn, query.norm1
