"""BLIP: an image tower, a text encoder that embeds (ITC) and matches (ITM), and a text decoder that writes (LM).

Li et al. 2022, arXiv 2201.12086, section 3.1 and figure 2. A checkpoint may hold any of the parts. `models.fusion` has
other ways in which image and text may meet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from sightloop.models.fusion import EarlyFusion, FusionKind, LateFusion, build_fusion, fits
from sightloop.models.text_decoder import Decoder, LmHead
from sightloop.nn.attention import Linear, mask_from_lengths
from sightloop.protocols import AttentiveTower, ImageTowerConfig, PatchAttention, require
from sightloop.towers.text import TextConfig, TextTower
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
        fusion: how image and text meet; "cross" is BLIP's. For the others `shared` means the embeddings alone.
        fusion_layers: co-attention layers of "both", 0 for the others.
        decoder_layers: layers of the text decoder, 0 for as many as the encoder's.

    Raises:
        ValueError: `answers` without encoder and decoder of one width; parts that do not fit the fusion.
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
    fusion: FusionKind = "cross"
    fusion_layers: int = 0
    decoder_layers: int = 0

    def __post_init__(self) -> None:
        widths = {self.vision.dim, self.text.dim, self.decoder_memory_dim}
        if self.answers and (len(widths) > 1 or not (self.encoder and self.decoder)):
            here = f"{self.vision.dim}, {self.text.dim} and {self.decoder_memory_dim}"
            raise ValueError(f"answers: needs an encoder, a decoder and one width of all, not {here}")
        towers = self.encoder and self.embed_dim is not None and self.text.memory_dim is None
        is_stem = isinstance(self.vision, VitConfig) and not self.vision.layers
        is_patches = is_stem and self.vision.dim == self.text.dim
        if not fits(self.fusion, self.fusion_layers, towers=towers, is_patches=is_patches):
            raise ValueError(f"fusion {self.fusion}: does not fit the other parts")


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
            _share(self.encoder, self.decoder, blocks=config.fusion == "cross")
        sizes = config.vision.dim, config.embed_dim or 0, config.fusion_layers
        self.fusion = build_fusion(config.fusion, config.text, *sizes)
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
        parts = {
            "itc": embeds and config.encoder,
            "itm": embeds and config.matching,
            "lm": config.decoder and config.decoder_memory_dim == config.vision.dim and not early,
            "vqa": config.decoder and config.encoder and config.decoder_memory_dim == config.text.dim,
            "mlm": config.encoder and config.fusion != "late",
            "mim": isinstance(config.vision, VitConfig) and config.vision.has_class_token and not early,
            "classes": True,
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

    def encode_text(self, image: Encoded, ids: Tensor, lengths: Tensor) -> Encoded:
        """Text read with its image (the image-grounded encoder of figure 2, or another fusion).

        Args:
            image: B encoded images.
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
        tokens = self.encoder(ids, lengths=lengths, memory=self.encoder.memory(image.tokens)).tokens
        return Encoded(tokens, tokens[:, 0], mask)

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


def _share(encoder: TextTower, writer: Decoder, *, blocks: bool) -> None:
    """Gives the decoder the encoder's embeddings and, with `blocks`, all but self-attention (paper, section 3.1)."""
    decoder = writer.text
    head: LmHead = writer.head
    if head.words.weight is decoder.word.weight:  # stays tied, to the embedding that both now have
        head.words.weight = encoder.word_weight
    decoder.word, decoder.position, decoder.norm = encoder.word, encoder.position, encoder.norm
    if blocks:
        for source, target in zip(encoder.blocks, decoder.blocks, strict=True):
            for name in ("cross", "norm_cross", "mlp", "norm2"):
                setattr(target, name, getattr(source, name))
